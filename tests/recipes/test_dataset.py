"""Recipes on rows from files: a language model, real preference pairs, both roads, and back to transformers."""

import gzip
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from model_folder import write_model_folder

from gvjax import config, sharding, tasks
from gvjax.__main__ import main
from gvjax.data import schema
from gvjax.gap import gathering
from gvjax.models import hf, transformer
from gvjax.models.config import ModelConfig
from gvjax.recipes import export, single
from gvjax.recipes.ground import ground_of, task_of
from gvjax.recipes.pairs import labelled_pairs
from gvjax.recipes.programs import reward_all, score_all
from gvjax.recipes.reading import encoding_of
from gvjax.recipes.rows import demonstrations_at, sequences
from gvjax.tasks.task import Completions, Prompts

SAMPLES = pathlib.Path(__file__).parent.parent / "data" / "samples"
MODEL = ModelConfig(
    vocab_size=608,
    embed_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    mlp_dim=32,
)
LORA = {"rank": 4, "alpha": 8.0, "targets": "attention/.*"}
LEARNING = {"learning_rate": 1e-2}
GOLD = {"reward_model": 0, "verifier": {"path": "gold"}}
ONLINE = {"steps": 2, "prompts_per_step": 4, "optimizer": LEARNING, "evaluate_every": 2}
GROUPS = {**ONLINE, "samples_per_prompt": 2}


@pytest.fixture(scope="module", autouse=True)
def _one_device():
    """These tests are about recipes: eight virtual devices, and programs compiled to be fast, cost time."""
    jax.config.update("jax_disable_most_optimizations", True)
    patch, make = pytest.MonkeyPatch(), sharding.make_mesh
    one = jax.devices()[:1]
    patch.setattr(sharding, "make_mesh", lambda **axes: make(devices=one))
    yield
    patch.undo()
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A directory of transformers: random weights, and a tokenizer whose padding is its EOS, as SmolLM2's is."""
    place = tmp_path_factory.mktemp("checkpoint")
    source = write_model_folder(place / "tokenizer")
    params = transformer.init(jax.random.key(0), MODEL)
    hf.save_policy(place / "model", MODEL, params, source=source)
    return str(place / "model")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """Runs, and the samples as users keep them: a folder for each source."""
    place = tmp_path_factory.mktemp("place")
    for file in SAMPLES.glob("*.jsonl.gz"):
        name, split = file.name.split(".")[:2]
        (place / name).mkdir(exist_ok=True)
        (place / name / f"{split}.jsonl.gz").write_bytes(file.read_bytes())
    return place


@pytest.fixture(scope="module")
def write(checkpoint, place):
    """A function that writes the YAML of a run on the UltraFeedback samples."""

    def write(name: str, recipe: str, task=(), rows=(), **changes) -> pathlib.Path:
        changes = dict(changes)
        settings = {"recipe": recipe, **changes.pop("settings", {})}
        data = {
            "run_dir": str(place / name),
            "task": {
                "name": "ultrafeedback",
                "rows": {
                    "source": "ultrafeedback_binarized",
                    "path": str(place / "ultrafeedback_binarized"),
                    "drop": ["identical_pair", "empty_completion"],
                    "max_bad_share": 0.2,
                    **dict(rows),
                },
                "chat": True,
                "system": "",
                "max_prompt": 40,
                "max_completion": 16,
                "prepared": str(place / "prepared"),
                "reference_logps": str(place / "reference_logps"),
                **dict(task),
            },
            "model": {"checkpoint": checkpoint},
            "settings": settings,
            "mesh": {"rows_per_call": 8},
            **changes,
        }
        if recipe != "best_of_n":
            data["logging"] = {"tensorboard": False, "every": 1}
        if recipe not in ("sft", "reward"):
            data.setdefault("evaluation", {"validation_prompts": 4})
        file = place / f"{name}.yaml"
        # JSON is YAML.
        file.write_text(json.dumps(data))
        return file

    return write


@pytest.fixture(scope="module")
def made(write, place):
    """A function from `sft` or `reward` to a finished run of it, made once."""

    def finish(recipe: str) -> str:
        if not (place / recipe / "result.json").exists():
            # So many that some of these cut completions end.
            rows = {"sft": 48, "reward": 4}[recipe]
            changes: dict = {"settings": {"steps": 3, "batch_size": rows}}
            if recipe == "reward":
                changes |= {
                    "start": finish("sft"),
                    "pairs": {"count": 12, "heldout": 4},
                }
                changes["settings"] |= {"pooling": "last", "evaluate_every": 3}
            changes["settings"]["optimizer"] = LEARNING
            single.run(config.load(write(recipe, recipe, **changes)))
        return str(place / recipe)

    return finish


def metrics_of(directory) -> list[dict]:
    lines = (pathlib.Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# Rows as a task.


@pytest.fixture(scope="module")
def task(write):
    return task_of(config.load(write("task", "sft")).task, 0)


def test_prompts_pairs_and_demonstrations_are_the_rows(task):
    prompts = task.prompts(np.random.default_rng(0), 5, "train")
    chosen, rejected = task.pairs(prompts)
    chex.assert_trees_all_equal(
        task.demonstrations(np.random.default_rng(1), prompts).tokens, chosen.tokens
    )
    texts = [task.decode(row[:n]) for row, n in zip(prompts.tokens, prompts.lengths)]
    # The row itself, in whatever order: the samples hold it with its answers.
    with gzip.open(SAMPLES / "ultrafeedback_binarized.train.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    for i, text in enumerate(texts):
        assert text.endswith("assistant\n")
        said = [
            task.decode(each.tokens[i][: each.lengths[i]])
            for each in (chosen, rejected)
        ]
        assert any(
            row["chosen"].strip().startswith(said[0])
            and row["rejected"].strip().startswith(said[1])
            for row in rows
        )
    again = prompts.take([3, 1]).repeat(2)
    assert (again.rows == prompts.rows[[3, 3, 1, 1]]).all()
    assert (again.tokens == prompts.tokens[[3, 3, 1, 1]]).all()


def test_no_row_comes_twice_and_no_split_shares_a_prompt(task):
    splits = {
        split: task.prompts(np.random.default_rng(2), task.size(split), split)
        for split in ("train", "validation", "test")
    }
    keys = {
        split: {
            tuple(row[:n]) for row, n in zip(prompts.tokens.tolist(), prompts.lengths)
        }
        for split, prompts in splits.items()
    }
    for prompts in splits.values():
        assert len(set(prompts.rows.tolist())) == len(prompts)
    assert not keys["train"] & keys["validation"]
    assert not (keys["train"] | keys["validation"]) & keys["test"]
    with pytest.raises(ValueError, match="the test split of dataset ultrafeedback has"):
        task.prompts(np.random.default_rng(0), 1000, "test")


def test_seeds_share_their_test_rows_and_nothing_else(task):
    first, second = (
        {
            split: task.prompts(np.random.default_rng(seed), 8, split).rows.tolist()
            for split in ("train", "validation", "test")
        }
        for seed in (0, 1)
    )
    assert first["test"] == second["test"]
    assert first["train"] != second["train"]
    assert first["validation"] != second["validation"]
    fewer = task.prompts(np.random.default_rng(2), 3, "test")
    assert fewer.rows.tolist() == first["test"][:3]
    assert gathering.prompts_of(task) == "crossed"
    assert gathering.prompts_of(tasks.load("tour", seed=0)) == "nested"


def test_a_prompt_of_the_training_split_is_left_out_of_the_held_out_ones(write, caplog):
    rows = {"validation": "train[:6]", "test": "test"}
    with pytest.raises(config.ConfigError, match="no prompt of the validation split"):
        task_of(config.load(write("leak", "sft", rows=rows)).task, 0)
    rows = {"train": "train[3:]", "validation": "train[:6]"}
    task_of(config.load(write("leak", "sft", rows=rows)).task, 0)
    assert "validation rows have a prompt of an earlier split" in caplog.text


def test_a_prompt_is_the_same_in_another_case_and_spacing(write, place, caplog):
    """In rows held out and in demonstrations, which have files of their own."""
    folder = place / "twins"
    folder.mkdir()

    def rows(split, prompts):
        lines = [json.dumps({"prompt": p, "completion": "yes"}) for p in prompts]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))

    rows("train", ["one", "two"])
    rows("validation", ["Two ", "three", "four"])
    rows("test", ["five", "six"])
    rows("shown", ["FIVE", "four", "one", "seven"])
    own = {"source": "jsonl", "path": str(folder), "drop": [], "max_bad_share": 0.0}
    splits = {"train": "train", "validation": "validation", "test": "test"}
    task = {"chat": False, "system": None, "demonstrations": {**own, "train": "shown"}}
    made = task_of(config.load(write("twins", "sft", task, {**own, **splits})).task, 0)
    assert "1 of 3 validation rows have a prompt of an earlier split" in caplog.text
    assert "2 of 4 demonstrations have a prompt of a split held out" in caplog.text
    assert [made.size(split) for split in splits] == [2, 2, 2]
    shown = made.demonstrated.prompts
    words = [made.decode(t[:n]) for t, n in zip(shown.tokens, shown.lengths)]
    assert words == ["one", "seven"]
    task["demonstrations"]["train"] = "test"
    with pytest.raises(config.ConfigError, match="every prompt of the demonstrations"):
        task_of(config.load(write("twins", "sft", task, {**own, **splits})).task, 0)


@pytest.mark.parametrize(
    ("gold", "answers", "shown"),
    [
        ("number", ["7", "blue"], "1 of 6 rows .* are no number, e.g. 'blue'"),
        ("number", ["7", ""], "1 of 6 rows .* are no number, e.g. ''"),
        (
            "puzzle",
            ["7", '{"task": "chess"}'],
            "2 of 6 rows .* are no puzzle, e.g. '7'",
        ),
        (
            "puzzle",
            ['{"task": ["gcd"]}', '{"task": "gcd"}', ""],
            "3 of 7 rows .* are no puzzle",
        ),
    ],
)
def test_an_answer_that_nothing_can_equal_is_refused(
    gold, answers, shown, write, place
):
    folder = place / f"answers_{gold}_{len(shown)}"
    folder.mkdir()
    known = json.dumps({"task": "gcd", "answer": "3"})
    good = "3" if gold == "number" else known
    for split, theirs in {"train": answers, "test": [good] * 4}.items():
        lines = [
            json.dumps({"prompt": f"{split} {n}", "completion": "3", "answer": answer})
            for n, answer in enumerate(theirs)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    rows = {"source": "jsonl", "path": str(folder), "drop": []}
    file = write(f"answers_{gold}", "sft", {"gold": gold}, rows)
    with pytest.raises(config.ConfigError, match=shown):
        task_of(config.load(file).task, 0)


def test_our_own_templates_begin_with_the_bos_that_a_tokenizer_wants(write, tmp_path):
    folder = write_model_folder(tmp_path, add_bos_token=True)
    for template in ("chatml", "hh"):
        task = {"template": template, "tokenizer": str(folder)}
        encoding = encoding_of(config.load(write("bos", "sft", task)).task)
        assert encoding.template is not None
        ids = encoding.template.encode_prompt(
            encoding.tokenizer, [schema.Message("user", "hello")]
        )
        bos = encoding.tokenizer.bos_id
        assert ids[0] == bos and bos not in ids[1:]


def test_sft_walks_the_rows_epoch_by_epoch(task):
    count = len(task.demonstrated)
    seen = np.concatenate(
        [
            demonstrations_at(task, 3, 8, step)[0].lengths
            for step in range(2 * count // 8)
        ]
    )
    assert sorted(seen[:count]) == sorted(task.demonstrated.prompts.lengths)


def test_the_datasets_own_pairs_are_what_is_learned_from(task, write, checkpoint):
    settings = config.load(write("pairs", "sft"))
    footing = ground_of(task, settings.model, settings.mesh)
    policy = footing.init_policy(jax.random.key(0))
    prompts = task.prompts(np.random.default_rng(0), 6, "train")
    pairs = labelled_pairs(
        footing, task, policy, prompts, seed=0, role="pairs", tau=0.2
    )
    for found, want in zip((pairs.chosen, pairs.rejected), task.pairs(prompts)):
        chex.assert_trees_all_equal(found.tokens, want.tokens)
    assert np.isnan(pairs.chosen_gold).all()
    logps = score_all(footing, policy, pairs.sequences(task.pad_id)[0])
    np.testing.assert_allclose(pairs.ref_chosen_logps, logps, rtol=1e-6)


# Every recipe.


CASES = {
    "dpo": {"pairs": {"count": 12, "heldout": 4}, "settings": {"batch_size": 4}},
    "online_dpo": {"settings": GROUPS},
    "policy_gradient": {"lora": LORA, "settings": {**GROUPS, "algorithm": "grpo"}},
    "ppo": {"lora": LORA, "settings": GROUPS},
    "rebel": {"settings": ONLINE},
    "rejection": {"lora": LORA, "settings": {"n": 2, "batch_size": 4}},
    "best_of_n": {"settings": {"n": 2}},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        # The rest of the online road differs from these by what stands in other tests.
        recipe
        if recipe in ("dpo", "online_dpo")
        else pytest.param(recipe, marks=pytest.mark.exhaustive)
        for recipe in CASES
    ],
)
def test_every_recipe_runs_on_real_pairs(recipe, write, made, place):
    case = dict(CASES[recipe])
    settings = dict(case.pop("settings"))
    if recipe != "best_of_n":
        settings |= {"steps": 2, "optimizer": LEARNING, "evaluate_every": 2}
    else:
        # Selection may start from the checkpoint itself.
        case["start"] = None
    if recipe != "dpo":
        case["reward_model"] = made("reward")
    case = {"start": made("sft"), **case}
    settings_of = config.load(write(recipe, recipe, settings=settings, **case))
    result = single.run(settings_of)
    assert "gold" not in result and result["length"] >= 1 and np.isfinite(result["kl"])
    assert ("proxy" in result) == (recipe not in ("dpo", "best_of_n"))
    if recipe == "best_of_n":
        return
    if recipe == "dpo":
        assert metrics_of(place / recipe)[0]["loss"] == pytest.approx(np.log(2))
        assert 0 <= result["implicit_accuracy"] <= 1
    before = single.finished(made("sft")).policy()
    after = single.finished(place / recipe).policy()
    chex.assert_trees_all_equal_shapes(before, after)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    if "lora" in case:
        # The merged policy: kernels of attention moved, and nothing else.
        names = {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(moved)
        }
        for name, leaf in names.items():
            assert leaf == ("attention" in name and "kernel" in name), name
    else:
        assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_adapters_alone_are_kept_and_resumed(write, made, place):
    changes = {
        "start": made("sft"),
        "lora": LORA,
        "pairs": {"count": 12, "heldout": 4},
        "settings": {"steps": 4, "batch_size": 4, "optimizer": LEARNING},
        "checkpoints": {"every": 2},
    }
    single.run(config.load(write("whole", "dpo", **changes)))

    class Stop(Exception):
        pass

    def stop(done, total, shown):
        if done == 3:
            raise Stop

    broken = config.load(write("broken", "dpo", **changes))
    with pytest.raises(Stop):
        single.run(broken, progress=stop)
    single.run(broken)
    assert metrics_of(place / "whole") == metrics_of(place / "broken")
    policies = [single.finished(place / name).policy() for name in ("whole", "broken")]
    chex.assert_trees_all_equal(*policies)
    kept = sum(
        file.stat().st_size
        for file in (place / "whole" / "checkpoints").rglob("*")
        if file.is_file() and file.parent.parent.name != "checkpoints"
    )
    assert kept < sum(leaf.nbytes for leaf in jax.tree.leaves(policies[0]))


def test_training_adapters_leaves_the_policy_where_it_lies(task, write, place):
    settings = config.load(write("frozen", "sft", lora=LORA))
    footing = ground_of(task, settings.model, settings.mesh, settings.lora)
    policy = footing.init_policy(jax.random.key(0))
    adapters = footing.init_trained(jax.random.key(1), policy)
    section = config.SftSection(steps=2, batch_size=4)
    from gvjax.recipes import sft

    compiled, _ = sft.program(footing, section)
    state = compiled.start(adapters)
    small = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}
    assert policy["embed"]["embedding"].shape not in small
    rows = demonstrations_at(task, 0, 4, 0)
    batch = footing.put(sequences(*rows, task.pad_id))
    pointer = policy["embed"]["embedding"].unsafe_buffer_pointer()
    for _ in range(2):
        state, metrics = compiled.step(state, batch, policy)
    assert policy["embed"]["embedding"].unsafe_buffer_pointer() == pointer
    assert float(metrics["grad_norm"]) > 0
    chex.assert_trees_all_equal_shapes(state.params, adapters)


# Gold rewards.


def test_the_number_in_an_answer_is_the_gold_reward(write, place):
    rows = {"source": "gsm8k", "path": str(place / "gsm8k"), "drop": []}
    task = {"name": "gsm8k", "gold": "number", "max_prompt": 200, "max_completion": 300}
    task = task_of(config.load(write("gsm8k", "sft", task, rows)).task, 0)
    prompts = task.prompts(np.random.default_rng(0), 6, "train")
    solutions = task.demonstrations(np.random.default_rng(0), prompts)
    np.testing.assert_array_equal(task.reward(prompts, solutions), np.ones(6))
    others = solutions.take([1, 2, 3, 4, 5, 0])
    answers = [task.table.answers[row] for row in prompts.rows]
    want = [a == b for a, b in zip(answers, [*answers[1:], answers[0]])]
    np.testing.assert_array_equal(task.reward(prompts, others), np.float32(want))
    empty = Completions(solutions.tokens, np.zeros(6, np.int32))
    np.testing.assert_array_equal(task.reward(prompts, empty), np.zeros(6))
    with pytest.raises(ValueError, match="do not say which rows"):
        task.reward(Prompts(prompts.tokens, prompts.lengths), solutions)


def test_a_puzzles_own_verifier_is_the_gold_reward(write, place):
    (place / "puzzle").mkdir()
    for split in ("train", "test"):
        lines = []
        for n in range(4):
            known = {"task": "countdown", "numbers": [n, 2], "target": n + 2}
            row = {"prompt": f"{split} {n} 2 = {n + 2}", "completion": f"2+{n}"}
            lines.append(json.dumps({**row, "answer": json.dumps(known)}))
        (place / "puzzle" / f"{split}.jsonl").write_text("\n".join(lines))
    rows = {"source": "jsonl", "path": str(place / "puzzle"), "drop": []}
    made = task_of(config.load(write("p", "sft", {"gold": "puzzle"}, rows)).task, 0)
    prompts = made.prompts(np.random.default_rng(0), 4, "train")
    own = made.demonstrations(np.random.default_rng(0), prompts)
    np.testing.assert_array_equal(made.reward(prompts, own), np.ones(4))
    others = own.take([1, 2, 3, 0])
    np.testing.assert_array_equal(made.reward(prompts, others), np.zeros(4))


def test_nearness_to_the_rows_own_completion_is_the_gold_reward(write, place):
    pytest.importorskip("rouge_score")
    texts = ["one two three four", "one two", "four three two one", "Five, six!"]

    def task(name, *fields):
        (place / name).mkdir()
        for split in ("train", "test"):
            lines = [
                json.dumps({"prompt": f"{split} {n}", "completion": text})
                for n, text in enumerate(texts)
            ]
            kept = [
                json.dumps({f: json.loads(line)[f] for f in fields}) for line in lines
            ]
            (place / name / f"{split}.jsonl").write_text("\n".join(kept))
        rows = {"source": "jsonl", "path": str(place / name), "drop": []}
        file = write(name, "sft", {"gold": "rouge_l", "max_completion": 40}, rows)
        return task_of(config.load(file).task, 0)

    near = task("near", "prompt", "completion")
    prompts = near.prompts(np.random.default_rng(0), 4, "train")
    own = near.demonstrations(np.random.default_rng(0), prompts)
    np.testing.assert_array_equal(near.reward(prompts, own), np.ones(4))
    said = [near.decode(t[:n]) for t, n in zip(own.tokens, own.lengths)]
    first, second, third, last = (said.index(text) for text in texts)
    swapped = own.take(
        np.array(
            [
                {first: second, second: first, third: first, last: third}[i]
                for i in range(4)
            ]
        )
    )
    found = near.reward(prompts, swapped)
    # F1 of the longest common subsequence: 2 words of 4, and of 2; then 1 of 4 in the same order; then none.
    want = {first: 2 / 3, second: 2 / 3, third: 1 / 4, last: 0.0}
    np.testing.assert_allclose(found, [want[i] for i in range(4)], rtol=1e-6)
    with pytest.raises(ValueError, match="rows of jsonl are prompts alone"):
        task("alone", "prompt")


@pytest.mark.slow
def test_a_verifier_trains_a_policy_on_word_problems(write, place):
    rows = {"source": "svamp", "path": str(place / "svamp"), "drop": []}
    task = {"name": "svamp", "gold": "number", "max_prompt": 90}
    settings = {**GROUPS, "algorithm": "rloo", "rewards": GOLD}
    file = write("svamp", "policy_gradient", task, rows, settings=settings)
    result = single.run(config.load(file))
    assert 0 <= result["gold"] <= 1 and "proxy" not in result
    assert [line["reward"] for line in metrics_of(place / "svamp") if "reward" in line]


@pytest.mark.slow
def test_an_exported_reward_model_is_a_gold_reward(write, made, place, checkpoint):
    said = export.export(made("reward"), place / "gold")
    assert "padded with id 1" in said
    found = hf.load_reward_model(place / "gold")[1]
    done = single.finished(made("reward"))
    model = done.reward_model()
    chex.assert_trees_all_equal(found["trunk"], model.params["trunk"])
    task = task_of(
        config.load(write("g", "sft", {"gold": str(place / "gold")})).task, 0
    )
    prompts = task.prompts(np.random.default_rng(0), 5, "test")
    chosen, _ = task.pairs(prompts)
    rows = sequences(prompts, chosen, task.pad_id)
    want = reward_all(done.ground, "last", model.params, rows)
    np.testing.assert_allclose(task.reward(prompts, chosen), want, atol=1e-5)


# Back to transformers.


@pytest.mark.slow
def test_an_exported_policy_has_the_bits_and_the_tokenizer(made, place, checkpoint):
    assert main(["export", made("sft"), str(place / "out")]) == 0
    model, params = hf.load_policy(place / "out")
    done = single.finished(made("sft"))
    assert model == done.ground.model
    chex.assert_trees_all_equal(params, done.policy())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (place / "out" / name).read_bytes() == (
            pathlib.Path(checkpoint) / name
        ).read_bytes()
    # Not over weights that lie there already, and not what nobody can pad.
    assert main(["export", made("sft"), str(place / "out")]) == 64
    assert main(["export", made("sft"), str(place / "o2"), "--pad-token", "x"]) == 64
    assert main(["export", made("reward"), str(place / "o3"), "--pad-token", "x"]) == 64


@pytest.mark.slow
def test_transformers_answers_as_the_run_did(made, place, task):
    """Where torch and transformers are installed, here or in the Python that GVJAX_TRANSFORMERS_PYTHON names."""
    python = os.environ.get("GVJAX_TRANSFORMERS_PYTHON")
    if python is None and all(map(importlib.util.find_spec, ("torch", "transformers"))):
        python = sys.executable
    if python is None:
        pytest.skip("torch and transformers are not installed")
    policy, judge = place / "live-policy", place / "live-reward"
    export.export(made("sft"), policy)
    export.export(made("reward"), judge)
    prompts = task.prompts(np.random.default_rng(0), 4, "test")
    chosen, _ = task.pairs(prompts)
    # The classifier's padding, which no row holds; a cut completion has no EOS, and is scored at its last token too.
    rows = sequences(prompts, chosen, 1)
    lengths = prompts.lengths + chosen.lengths
    for directory in (policy, judge):
        np.save(directory / "tokens.npy", rows.tokens)
    script = pathlib.Path(__file__).parent.parent / "golden" / "make_hf.py"
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    quiet.pop("PYTHONPATH", None)
    command = [python, str(script), "answer", str(policy), str(judge)]
    done = subprocess.run(command, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run = single.finished(made("sft"))
    logits = transformer.apply(run.ground.model, run.policy(), rows.tokens)
    got = np.load(policy / "answer" / "logits.npy")
    real = np.arange(rows.tokens.shape[1]) < lengths[:, None]
    np.testing.assert_allclose(got[real], np.asarray(logits)[real], atol=1e-4)
    model = single.finished(made("reward")).reward_model()
    rewards = reward_all(run.ground, "last", model.params, rows)
    got = np.load(judge / "answer" / "logits.npy")[:, 0]
    np.testing.assert_allclose(got, rewards, atol=1e-4)


@pytest.mark.slow
def test_the_command_line_judges_and_samples_without_a_gold_reward(made, capsys):
    assert main(["eval", made("sft"), "--prompts", "600"]) == 0
    judged = capsys.readouterr().out
    assert "KL" in judged and "held-out pairs" in judged and "gold" not in judged
    assert main(["eval", made("reward")]) == 0
    assert "accuracy on labels" in capsys.readouterr().out
    assert main(["sample", made("sft"), "-n", "2"]) == 0
    shown = capsys.readouterr().out
    assert "completion" in shown and "gold" not in shown
    # The end of a prompt, which is what is left of a long one.
    assert shown.count("assistant") >= 2


# What is refused, before any device is touched.


REFUSED = {
    "best without gold": (
        "dpo",
        {"select": "best", "pairs": {"count": 4}},
        "select is best, but the dataset ultrafeedback has no gold reward",
    ),
    "gold without gold": (
        "policy_gradient",
        {"settings": {"rewards": GOLD}},
        "rewards.verifier.path is gold, but the dataset",
    ),
    "a field of the network": (
        "sft",
        {"model": {"checkpoint": None, "num_layers": 3}},
        "model.num_layers is given beside model.checkpoint",
    ),
    "no such dtype": (
        "sft",
        {"model": {"checkpoint": None, "dtype": "float16"}},
        "model.dtype is 'float16'",
    ),
    "too long": (
        "sft",
        {"task": {"max_prompt": 4000}, "model": {"checkpoint": "long"}},
        "was made for 64",
    ),
    "more pairs than rows": (
        "dpo",
        {"pairs": {"count": 1000}},
        "1000 prompts are asked for, but the train split",
    ),
    "noise on real labels": (
        "dpo",
        {"pairs": {"count": 4, "tau": 0.1}},
        "pairs.tau is given, but dataset ultrafeedback has labelled pairs",
    ),
    "a temperature of real pairs": (
        "dpo",
        {"pairs": {"count": 4, "temperature": 1.5}},
        "pairs.temperature is given, but dataset ultrafeedback has labelled pairs",
    ),
    "no number to check": ("sft", {"task": {"gold": "number"}}, "have no answer"),
    "more pairs held out than there are": (
        "dpo",
        {"pairs": {"count": 4, "heldout": 1000}},
        "pairs.heldout: 1000 prompts are asked for",
    ),
    "more prompts to judge than there are": (
        "dpo",
        {
            "pairs": {"count": 4, "heldout": 4},
            "evaluation": {"validation_prompts": 1000},
        },
        "evaluation.validation_prompts: 1000 prompts are asked for",
    ),
    "gold that is not there": (
        "sft",
        {"task": {"gold": "nowhere"}},
        "neither number nor puzzle nor rouge_l nor a directory",
    ),
    "an unknown template": (
        "sft",
        {"task": {"template": "llama9"}},
        "'llama9' is neither chatml nor hh nor a file",
    ),
    "an unknown source": (
        "sft",
        {"rows": {"source": "uf"}},
        "source 'uf' is not known",
    ),
    "adapters nowhere": (
        "sft",
        {"lora": {"targets": "mamba/.*"}},
        "lora: targets 'mamba/.*' matches no layer",
    ),
    "adapters on a reward model": (
        "reward",
        {"lora": LORA, "pairs": {"count": 4}},
        "lora is given, but recipe reward trains no policy",
    ),
    "a misspelt key": (
        "sft",
        {"rows": {"pth": "x"}},
        "task.rows.pth is not a key; did you mean path?",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_refused(case, write, checkpoint, tmp_path):
    recipe, changes, message = REFUSED[case]
    changes = json.loads(json.dumps(changes))
    if "model" in changes:
        if changes["model"]["checkpoint"] == "long":
            params = transformer.init(jax.random.key(0), MODEL)
            hf.save_policy(tmp_path / "m", MODEL, params, source=checkpoint)
            file = tmp_path / "m" / "config.json"
            written = json.loads(file.read_text())
            file.write_text(json.dumps({**written, "max_position_embeddings": 64}))
            checkpoint = str(tmp_path / "m")
        changes["model"]["checkpoint"] = checkpoint
    with pytest.raises(config.ConfigError, match=message):
        single.run(config.load(write("refused", recipe, **changes)))
    # A config that was refused does not stand in the way of the corrected one.
    assert not (pathlib.Path(write("refused", recipe).parent) / "refused").exists()


def test_a_dataset_needs_a_tokenizer_and_a_study_needs_gold(write, tmp_path):
    data = json.loads(write("bare", "sft").read_text())
    bare = {**data, "model": {"embed_dim": 8}}
    (tmp_path / "bare.yaml").write_text(json.dumps(bare))
    with pytest.raises(config.ConfigError, match=r"task\.tokenizer is not given"):
        config.load(tmp_path / "bare.yaml")
    study = {
        "study": "x",
        "run_dir": "x",
        "seeds": [1],
        "task": data["task"],
        "model": data["model"],
        "arms": {"DPO": {"road": "offline", "settings": {"recipe": "dpo"}}},
    }
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    with pytest.raises(config.ConfigError, match="a study compares its arms by gold"):
        config.load(tmp_path / "study.yaml")


# Looking at it.


def test_the_command_line_shows_rows_and_counts(write, capsys):
    file = str(write("shown", "dpo", pairs={"count": 4}))
    assert main(["data", "show", file, "-n", "2"]) == 0
    shown = capsys.readouterr().out
    assert "row 1: train.jsonl.gz:" in shown
    assert "chosen:" in shown and "rejected:" in shown and "trained on" in shown
    assert main(["data", "stats", file]) == 0
    counted = capsys.readouterr().out
    for what in ("prompt tokens", "truncated", "duplicate prompts", "ties", "█"):
        assert what in counted
    assert "prompts of the other split seen here" in counted
    assert "identical_pair" in counted
    assert main(["data", "show", "configs/tour/dpo.yaml"]) == 64


@pytest.mark.parametrize(
    "source", ["hh_rlhf", "gsm8k", "svamp", "scitldr", "tldr_pages"]
)
def test_every_sample_shows_its_rows_and_is_counted(source, write, place, capsys):
    rows = {
        "source": source,
        "path": str(place / source),
        "drop": [],
        "max_bad_share": 1,
    }
    file = str(write(f"{source} shown", "sft", task={"name": source}, rows=rows))
    assert main(["data", "show", file, "-n", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("train.jsonl.gz:") >= 2 and "trained on" in shown
    assert main(["data", "stats", file]) == 0
    counted = capsys.readouterr().out
    assert "prompt tokens" in counted and "█" in counted
