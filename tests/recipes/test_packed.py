"""Recipes on packed or sorted rows: the same sequences, less padding, few programs, refusals before anything is compiled."""

import concurrent.futures
import dataclasses
import json
import logging
import pathlib
import types

import jax
import numpy as np
import pytest
from kept_runs import make_run, metrics_of, same_bits
from model_folder import write_model_folder

from gvjax import config, lanes, sharding
from gvjax.data.ahead import Ahead
from gvjax.data.batches import Batches
from gvjax.data.tokenizer import ByteTokenizer
from gvjax.models.config import ModelConfig
from gvjax.plan.programs import forward_flops, stage_of
from gvjax.recipes import dpo, loop, packed, reading, reward, rows, sft, single
from gvjax.recipes.dataset import Dataset, Table
from gvjax.recipes.ground import Ground
from gvjax.recipes.inputs import Inputs
from gvjax.recipes.pairs import Pairs
from gvjax.recipes.programs import score_all
from gvjax.recipes.rows import role_key
from gvjax.tasks.task import Completions, Prompts

# Prompts so long that pairs which are not packed share them.
COUNT, PROMPT, COMPLETION = 40, 20, 10
LONGEST = PROMPT + COMPLETION
SAMPLES = pathlib.Path(__file__).parent.parent / "data" / "samples"
MODEL = ModelConfig(vocab_size=259, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16)


@pytest.fixture(scope="module")
def ground():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return Ground(MODEL, mesh, 258, 256, PROMPT, COMPLETION)


def padded(rng, least, width, *, ended=False):
    lengths = rng.integers(least, width + 1, COUNT).astype(np.int32)
    tokens = rng.integers(1, 250, (COUNT, width), np.int32)
    if ended:
        tokens[np.arange(COUNT), lengths - 1] = 258
    return np.where(np.arange(width) < lengths[:, None], tokens, 256), lengths


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    prompts = Prompts(*padded(rng, 2, PROMPT))
    table = Table(
        prompts,
        tuple(Completions(*padded(rng, 1, COMPLETION, ended=True)) for _ in range(2)),
        (None,) * COUNT,
    )
    splits = {split: np.arange(COUNT) for split in ("train", "validation", "test")}
    return Dataset(
        "rows",
        ByteTokenizer(),
        table,
        splits,
        table,
        PROMPT,
        COMPLETION,
        None,
        None,
        "",
    )


@pytest.fixture(scope="module")
def inputs(ground, task):
    policy = ground.init_policy(role_key(0, "policy"))
    chosen, rejected = task.table.completions
    gold = np.full(COUNT, np.nan, np.float32)
    pairs = Pairs(task.table.prompts, chosen, rejected, gold, gold, gold, gold)
    logps = [score_all(ground, policy, side) for side in pairs.sequences(256)]
    pairs = dataclasses.replace(
        pairs, ref_chosen_logps=logps[0], ref_rejected_logps=logps[1]
    )
    few = task.prompts(np.random.default_rng(0), 4, "validation")
    return Inputs(ground, task, 0, policy, policy, few, few, pairs=pairs)


def shares_of_data(run):
    lines = (run.directory / "timing.jsonl").read_text().splitlines()
    return [json.loads(line)["share/data"] for line in lines]


@pytest.mark.parametrize("recipe", [dpo, reward])
def test_packed_pairs_are_learned_from(recipe, inputs, tmp_path):
    """The first losses are checked inside: ln 2 of all the pairs in the rows."""
    kind = {dpo: config.DpoSection, reward: config.RewardSection}[recipe]
    settings = kind(steps=3, batch_size=2, packed_length=128)
    run = make_run(tmp_path)
    options = {"select": "last"} if recipe is dpo else {}
    recipe.train(settings, inputs, run, **options)
    lines = [line for line in metrics_of(run) if "loss" in line]
    assert len(lines) == 3
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert lines[2]["loss"] != lines[1]["loss"]
    shares = shares_of_data(run)
    assert len(shares) == 3 and all(0 <= share < 1 for share in shares)


def test_packed_demonstrations_are_learned_from(ground, task, tmp_path):
    settings = config.SftSection(steps=3, batch_size=2, packed_length=128)
    run = make_run(tmp_path)
    sft.train(settings, ground, task, 0, run)
    losses = [line["loss"] for line in metrics_of(run)]
    # Of a random policy: the logarithm of the vocabulary, about.
    assert losses[0] == pytest.approx(np.log(259), rel=0.1)


def test_every_pair_comes_once_in_an_epoch_and_brings_its_reference(ground, inputs):
    settings = config.DpoSection(batch_size=1, packed_length=128)
    batches = packed.pairs(inputs.pairs, ground, settings, 0, "role")
    seen = [
        row
        for step in range(batches.batches_per_epoch)
        for unit in batches.rows_at(step)
        for row in unit
    ]
    assert sorted(seen) == list(range(COUNT))
    # A pair by itself leaves .45 of its two rows empty.
    assert batches.padding() < 0.05
    batch, (unit,) = batches.batch_at(1), batches.rows_at(1)
    np.testing.assert_array_equal(
        batch.ref_chosen_logps[0, : len(unit)],
        inputs.pairs.ref_chosen_logps[list(unit)],
    )
    other = packed.pairs(inputs.pairs, ground, settings, 1, "role")
    assert batches.rows_at(0) != other.rows_at(0)


@pytest.mark.parametrize(
    ("section", "model", "message"),
    [
        (
            config.DpoSection(packed_length=15),
            {},
            "has up to 30 tokens; use at least that, better 120",
        ),
        (
            config.SftSection(packed_length=128),
            {"learned_positions": 128},
            "positions are learned",
        ),
        (
            config.DpoSection(packed_length=128, loss="aot"),
            {},
            "compares rows with each other",
        ),
        (
            config.SftSection(length_buckets=(16, 31)),
            {},
            r"length_buckets is \[16, 31\], but .* at most 30 tokens",
        ),
        (config.SftSection(length_buckets=(20, 10)), {}, "must be ascending"),
    ],
)
def test_what_cannot_be_packed_is_refused(section, model, message, ground):
    ground = dataclasses.replace(ground, model=dataclasses.replace(MODEL, **model))
    with pytest.raises(config.ConfigError, match=message):
        single.check(section, ground)


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_a_plan_is_of_the_step_on_packed_rows(kind, ground, task, inputs):
    sections = {
        "sft": config.SftSection,
        "reward": config.RewardSection,
        "dpo": config.DpoSection,
    }
    settings = sections[kind](batch_size=2, packed_length=128)
    if kind == "sft":
        rows = packed.demonstrations(task, ground, settings, 0)
    else:
        rows = packed.pairs(inputs.pairs, ground, settings, 0, "role")
    stage = stage_of(kind, settings, ground, pairs=None, evaluated=4)
    step = next(each for each in stage.programs if each.name == "train step")
    (_, planned), _ = step.lower().in_avals
    batch = rows.batch_at(0)
    assert jax.tree.structure(planned) == jax.tree.structure(batch)
    for shape, array in zip(jax.tree.leaves(planned), jax.tree.leaves(batch)):
        assert (shape.dtype, shape.ndim) == (array.dtype, array.ndim)
        # Rows of these data are a little shorter than they may be, and hold about as many pairs.
        assert len(array) == shape.shape[0] and array.shape[1] <= shape.shape[1]
    # As many tokens of every layer as fit, each prompt run with its own completion; forwards and twice back.
    sequences = settings.batch_size * (1 if kind == "sft" else 2)
    alone = 3 * forward_flops(ground, sequences, scored=kind != "reward")
    assert step.work.flops == pytest.approx(alone * 128 / LONGEST)


@pytest.mark.parametrize(
    "how", [{"packed_length": 128}, {"length_buckets": (16,)}], ids=str
)
def test_a_task_that_makes_its_demonstrations_has_none_to_pack(how, ground):
    class Fresh:
        name = "fresh"

    settings = config.SftSection(**how)
    with pytest.raises(config.ConfigError, match="task fresh makes new demonstrations"):
        packed.demonstrations(Fresh(), ground, settings, 0)


def test_too_few_rows_for_a_batch_are_refused(ground, inputs):
    settings = config.DpoSection(batch_size=64, packed_length=128)
    with pytest.raises(config.ConfigError, match="do not make one batch"):
        packed.pairs(inputs.pairs, ground, settings, 0, "role")


def test_rows_are_packed_or_sorted_but_not_both():
    with pytest.raises(ValueError, match="length_buckets is given, but packed rows"):
        config.SftSection(packed_length=128, length_buckets=(16,))


def by_length(ground, task, **changes):
    settings = config.SftSection(batch_size=4, length_buckets=(16, 22), **changes)
    return settings, packed.demonstrations(task, ground, settings, 0)


def test_a_bucketed_batch_is_its_rows_without_the_padding(ground, task):
    _, batches = by_length(ground, task)
    widths = set()
    for step in range(2 * batches.batches_per_epoch):
        batch = batches.batch_at(step)
        which = [row for (row,) in batches.rows_at(step)]
        whole = rows.sequences(*task.demonstrations_of(np.array(which)), ground.pad_id)
        width = batch.tokens.shape[1]
        widths.add(width)
        np.testing.assert_array_equal(batch.tokens, whole.tokens[:, :width])
        np.testing.assert_array_equal(
            batch.completion_mask, whole.completion_mask[:, :width]
        )
        assert not whole.completion_mask[:, width:].any()
        assert batch.segments is None
    # The last is the longest that the config allows, though nobody named it.
    assert widths == {16, 22, LONGEST}


def shapes_of(batches, count):
    return {
        tuple(leaf.shape for leaf in jax.tree.leaves(batches.batch_at(step)))
        for step in range(count)
    }


COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiling():
    """A list that grows by one with every program that anybody compiles."""
    events, listens = [], [True]

    def listen(name, *_, **__):
        if name == COMPILED and listens:
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    listens.clear()


@pytest.mark.parametrize(
    ("how", "shapes"),
    [({"packed_length": 96}, 1), ({"length_buckets": (16, 22)}, 3)],
    ids=["packed", "in buckets"],
)
def test_a_run_compiles_a_step_for_every_shape_and_nothing_after(
    how, shapes, ground, task, tmp_path, compiling, caplog
):
    settings = config.SftSection(steps=24, batch_size=4, **how)
    batches = packed.demonstrations(task, ground, settings, 0)
    counts = []
    run = make_run(tmp_path, progress=lambda *_: counts.append(len(compiling)))
    with caplog.at_level(logging.WARNING, "gvjax.sharding"):
        sft.train(settings, ground, task, 0, run)
    assert len(shapes_of(batches, settings.steps)) == shapes
    assert len(sft.program(ground, settings)[0].programs) == shapes
    assert "compiled again" not in caplog.text
    # Neither the step nor anything beside it once every shape has come.
    met = [len(shapes_of(batches, done)) for done in range(1, settings.steps + 1)]
    assert counts[-1] == counts[met.index(shapes)]
    assert met.index(shapes) < settings.steps - 8


def test_a_step_of_lanes_that_is_compiled_again_says_so(ground, task, caplog):
    settings = config.SftSection(steps=3, batch_size=4, packed_length=64)
    batch = packed.demonstrations(task, ground, settings, 0).batch_at(0)
    compiled, _ = sft.program(ground, settings)

    def work(seed):
        state = compiled.start(ground.init_policy(role_key(seed, "init")))
        for tokens in (batch.tokens, batch.tokens, batch.tokens.astype(np.int16)):
            drifting = dataclasses.replace(batch, tokens=tokens)
            state, _ = compiled.step(state, ground.put(drifting))
            said.append(caplog.text)

    said: list[str] = []
    with caplog.at_level(logging.WARNING, "gvjax.sharding"):
        lanes.Lanes(2).run([lambda: work(0), lambda: work(1)])
    assert said[:4] == [""] * 4
    assert "compiled again for the same shapes" in caplog.text
    assert "int32" in caplog.text and "int16" in caplog.text


@pytest.mark.parametrize(
    ("recipe", "role"), [(dpo, "packed pairs"), (reward, "packed reward pairs")]
)
def test_bucketed_pairs_are_learned_from(recipe, role, inputs, tmp_path):
    """The first losses are checked inside, against the reference of the same pairs padded to the longest."""
    kind = {dpo: config.DpoSection, reward: config.RewardSection}[recipe]
    settings = kind(steps=8, batch_size=4, length_buckets=(20, 26))
    options = {"select": "last"} if recipe is dpo else {}
    run = make_run(tmp_path)
    recipe.train(settings, inputs, run, **options)
    assert len([line for line in metrics_of(run) if "loss" in line]) == settings.steps
    batches = packed.pairs(inputs.pairs, inputs.ground, settings, 0, role)
    shapes = shapes_of(batches, settings.steps)
    assert len(shapes) == 3
    assert len(recipe.program(inputs.ground, settings)[0].programs) == len(shapes)


def test_bucketed_pairs_are_the_pairs_without_the_padding(inputs):
    settings = config.DpoSection(batch_size=4, length_buckets=(20, 26))
    batches = packed.pairs(inputs.pairs, inputs.ground, settings, 0, "role")
    batch_of = inputs.pairs.batches(inputs.ground.pad_id)
    for step in range(batches.batches_per_epoch):
        batch = batches.batch_at(step)
        whole = batch_of(np.array([row for (row,) in batches.rows_at(step)]))
        width = batch.chosen.tokens.shape[1]
        for found, expected in zip(jax.tree.leaves(batch), jax.tree.leaves(whole)):
            kept = expected[:, :width] if expected.ndim == 2 else expected
            np.testing.assert_array_equal(found, kept)
            assert expected.ndim == 1 or (expected[:, width:] % 256 == 0).all()


class Interrupted(Exception):
    pass


def test_an_interrupted_run_in_buckets_goes_on_to_the_same_bits(ground, task, tmp_path):
    settings, batches = by_length(ground, task, steps=13)
    whole = make_run(tmp_path / "run", checkpoint_every=3)
    expected = sft.train(settings, ground, task, 0, whole).params
    # Beyond the first epoch, and not within one bucket.
    assert batches.batches_per_epoch < settings.steps
    assert len({batches.batch_at(step).tokens.shape for step in range(9, 13)}) > 1

    def stop(done, *_):
        if done == 10:
            raise Interrupted

    directory = tmp_path / "again" / "run"
    directory.parent.mkdir()
    broken = make_run(directory, checkpoint_every=3, progress=stop)
    with pytest.raises(Interrupted):
        sft.train(settings, ground, task, 0, broken)
    resumed = []
    run = make_run(directory, progress=lambda done, *_: resumed.append(done))
    found = sft.train(settings, ground, task, 0, run).params
    assert resumed == [10, 11, 12, 13]
    assert same_bits(found, expected)


# The pipeline.


def test_a_step_that_takes_longer_than_a_batch_waits_for_the_first_alone(
    ground, task, tmp_path, monkeypatch
):
    """By a clock that only a step moves, and a batch that is still being made when it is asked for."""
    now, asked = [0.0], [-1]
    settings = config.SftSection(steps=6, batch_size=2, packed_length=64)
    made = {step: concurrent.futures.Future() for step in range(settings.steps)}
    make = Batches.batch_at

    def batch_at(self, step):
        batch = make(self, step)
        if asked[0] == step:
            now[0] += 0.25
        made[step].set_result(None)
        return batch

    class Asked(Ahead):
        def __call__(self, step):
            asked[0] = step
            try:
                return super().__call__(step)
            finally:
                asked[0] = -1

    compiled, schedule = sft.program(ground, settings)

    def step(state, batch, base):
        # As slow as a device that is still at work when the next batch is there.
        later = [made[each] for each in made if each <= int(state.step) + 1]
        concurrent.futures.wait(later, timeout=10)
        now[0] += 0.75
        return compiled.step(state, batch, base)

    slow = types.SimpleNamespace(
        start=compiled.start, step=step, trained_on=compiled.trained_on
    )
    monkeypatch.setattr(Batches, "batch_at", batch_at)
    monkeypatch.setattr(sft, "Ahead", Asked)
    monkeypatch.setattr(sft, "program", lambda *_: (slow, schedule))
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    run = make_run(tmp_path)
    sft.train(settings, ground, task, 0, run)
    assert shares_of_data(run) == [0.25, *[0.0] * 5]


# Padding of the real samples.


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(a dataset of the samples, its ground) by source; rows are cut to the lengths given."""
    place = tmp_path_factory.mktemp("real")
    tokenizer = write_model_folder(place / "tokenizer")
    for file in SAMPLES.glob("*.jsonl.gz"):
        name, split = file.name.split(".")[:2]
        (place / name).mkdir(exist_ok=True)
        (place / name / f"{split}.jsonl.gz").write_bytes(file.read_bytes())

    def dataset(source, max_prompt, max_completion):
        section = config.DatasetSection(
            name=source,
            rows=config.RowsSection(
                source=source, path=str(place / source), max_bad_share=0.2
            ),
            tokenizer=str(tokenizer),
            max_prompt=max_prompt,
            max_completion=max_completion,
            prepared=str(place / "prepared"),
            reference_logps=None,
        )
        return reading.dataset_of(section)

    return dataset


LENGTHS = {
    "hh_rlhf": (192, 128),
    "ultrafeedback_binarized": (384, 256),
    "gsm8k": (256, 256),
    "svamp": (160, 16),
    "scitldr": (1024, 128),
    "tldr_pages": (96, 96),
}
"""Longest prompt and completion: most rows of each are shorter."""


def grounds(ground, task):
    return dataclasses.replace(
        ground,
        prompt_length=task.max_prompt_length,
        completion_length=task.max_completion_length,
    )


@pytest.mark.parametrize("source", LENGTHS)
def test_little_of_packed_demonstrations_is_padding(source, real, ground):
    task = real(source, *LENGTHS[source])
    settings = config.SftSection(batch_size=8, packed_length=4 * sum(LENGTHS[source]))
    batches = packed.demonstrations(task, grounds(ground, task), settings, 0)
    assert padding_of(batches) < 0.05


@pytest.mark.parametrize("kind", [config.RewardSection, config.DpoSection])
@pytest.mark.parametrize("source", ["hh_rlhf", "ultrafeedback_binarized"])
def test_little_of_packed_pairs_is_padding(source, kind, real, ground):
    task = real(source, *LENGTHS[source])
    prompts = task.prompts(np.random.default_rng(0), task.size("train"), "train")
    gold = np.zeros(len(prompts), np.float32)
    pairs = Pairs(prompts, *task.pairs(prompts), gold, gold, gold, gold)
    settings = kind(batch_size=8, packed_length=4 * sum(LENGTHS[source]))
    batches = packed.pairs(pairs, grounds(ground, task), settings, 0, "role")
    assert padding_of(batches) < 0.05


def padding_of(batches):
    """Counted in what steps of three epochs are given, not as the batches count it."""
    empty = []
    for step in range(3 * batches.batches_per_epoch):
        batch = batches.batch_at(step)
        sides = [batch] if hasattr(batch, "tokens") else [batch.chosen, batch.rejected]
        empty += [side.segments == 0 for side in sides]
        assert len(empty[-1]) == 8
    return np.mean(empty)
