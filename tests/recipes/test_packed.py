"""Recipes on packed rows: the same sequences, each once an epoch, less padding, and refusals before anything is compiled."""

import dataclasses

import jax
import numpy as np
import pytest
from kept_runs import make_run, metrics_of

from gvjax import config, sharding
from gvjax.data.tokenizer import ByteTokenizer
from gvjax.models.config import ModelConfig
from gvjax.recipes import dpo, packed, reward, sft, single
from gvjax.recipes.dataset import Dataset, Table
from gvjax.recipes.ground import Ground
from gvjax.recipes.inputs import Inputs
from gvjax.recipes.pairs import Pairs
from gvjax.recipes.programs import score_all
from gvjax.recipes.rows import role_key
from gvjax.tasks.task import Completions, Prompts

# Prompts so long that pairs which are not packed share them.
COUNT, PROMPT, COMPLETION = 40, 20, 10
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
    shares = (tmp_path / "timing.jsonl").read_text()
    assert "share/data" in shares


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
    rows = [
        row
        for step in range(batches.batches_per_epoch)
        for unit in batches.rows_at(step)
        for row in unit
    ]
    assert sorted(rows) == list(range(COUNT))
    # What fills 10.3 rows stands in 12; a pair by itself leaves .45 of its two rows empty.
    assert batches.padding() < 0.15
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
    ],
)
def test_what_cannot_be_packed_is_refused(section, model, message, ground):
    ground = dataclasses.replace(ground, model=dataclasses.replace(MODEL, **model))
    with pytest.raises(config.ConfigError, match=message):
        single.check(section, ground)


def test_a_task_that_makes_its_demonstrations_has_none_to_pack(ground):
    class Fresh:
        name = "fresh"

    settings = config.SftSection(packed_length=128)
    with pytest.raises(config.ConfigError, match="task fresh makes new demonstrations"):
        packed.demonstrations(Fresh(), ground, settings, 0)


def test_too_few_rows_for_a_batch_are_refused(ground, inputs):
    settings = config.DpoSection(batch_size=64, packed_length=128)
    with pytest.raises(config.ConfigError, match="do not make one batch"):
        packed.pairs(inputs.pairs, ground, settings, 0, "role")
