"""Both roads at toy size, end to end: the same numbers however the work was cut, and no work done twice."""

import copy
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
import yaml

from gvjax import config, sharding
from gvjax.gap import planning, progress
from gvjax.gap.stages import Store

TOUR = {"num_nodes": 6, "horizon": 4, "num_goals": 2}
DPO = {"recipe": "dpo", "steps": 4, "evaluate_every": 2, "batch_size": 16, "beta": 1.0}
RLOO = {
    "recipe": "policy_gradient",
    "steps": 2,
    "prompts_per_step": 4,
    "samples_per_prompt": 4,
}
TOY = {
    "study": "toy",
    "run_dir": "run",
    "seeds": [1, 2],
    "task": {"name": "tour", "options": TOUR},
    "model": {
        "embed_dim": 16,
        "num_layers": 1,
        "num_heads": 2,
        "mlp_dim": 32,
        "mlp_gated": False,
        "norm": "layer",
        "learned_positions": 16,
    },
    "sft": {"steps": 20, "batch_size": 32},
    "pairs": {"count": 32, "heldout": 16},
    "reward": {"steps": 6, "batch_size": 16, "early_stop": True, "evaluate_every": 3},
    "evaluation": {"test_prompts": 16, "validation_prompts": 16},
    "best_of_n": [1, 2],
    "augmentation": {"prompts": 32, "samples_per_prompt": 2},
    "arms": {
        "DPO": {
            "road": "offline",
            "select": "best",
            "settings": DPO,
            "sweep": [{"beta": 1.0}, {"optimizer": {"learning_rate": 0.01}}],
        },
        "DPO, more data": {"road": "offline", "data": "augmented", "settings": DPO},
        "RLOO": {"road": "online", "settings": RLOO},
        "RLOO, more prompts": {"road": "online", "data": "augmented", "settings": RLOO},
        "RLOO from DPO": {"road": "online", "start": "DPO", "settings": RLOO},
        "best of 2": {
            "road": "selection",
            "settings": {"recipe": "best_of_n", "n": 2},
        },
    },
    "twins": [
        {
            "task": {"name": "hidden_goals", "options": TOUR},
            "arms": ["DPO", "RLOO"],
        }
    ],
    "contrasts": [
        {"a": "RLOO", "b": "best offline", "margin": 0.05},
        {"a": "RLOO", "b": "best offline", "task": "hidden_goals", "margin": 0.06},
    ],
}
# A seed: SFT; pairs, reward model and best-of-n on both tasks; more pairs; 7 trials on Tour, 3 on the twin.
STAGES = 2 * (1 + 3 * 2 + 1 + 7 + 3)


def start(where: pathlib.Path, name: str, data, *overrides) -> subprocess.Popen:
    """`gvjax compare` in a process with one device, programs shared with the other studies of these tests."""
    (where / f"{name}.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(where / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    command = ["-m", "gvjax", "compare", f"{name}.yaml", f"run_dir={name}"]
    return subprocess.Popen(
        [sys.executable, *command, *overrides],
        cwd=where,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def compare(where, name, data, *overrides) -> str:
    process = start(where, name, data, *overrides)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out + err
    return out


def numbers(directory: pathlib.Path):
    """All results but what may differ: clock times, and where and by how many processes they were made."""

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k != "seconds"}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    results = json.loads((directory / "results.json").read_text())
    for name in ("config", "config_hash", "started"):
        del results[name]
    return timeless(results)


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def unbroken(where) -> str:
    """What a study by one process printed; it stands in `where / "one"`."""
    return compare(where, "one", TOY, "workers=1")


@pytest.mark.slow
def test_every_arm_of_every_seed_is_in_results_and_report(where, unbroken):
    assert f"{STAGES} stages, 1 process" in unbroken
    results = json.loads((where / "one" / "results.json").read_text())
    tour, twin = results["tasks"]
    assert [arm["name"] for arm in tour["arms"]] == ["SFT", *TOY["arms"]]
    assert [arm["name"] for arm in twin["arms"]] == ["SFT", "DPO", "RLOO"]
    for task in (tour, twin):
        for arm in task["arms"]:
            assert [seed["seed"] for seed in arm["seeds"]] == [1, 2]
            for seed in arm["seeds"]:
                assert len(seed["gold"]) == 16
        assert {curve["scorer"] for curve in task["best_of_n"]} == {
            "gold",
            "reward model",
        }
    by_name = {arm["name"]: arm for arm in tour["arms"]}
    assert by_name["DPO, more data"]["road"] == "relabelled"
    more, same = (by_name[name]["seeds"] for name in ("RLOO, more prompts", "RLOO"))
    assert by_name["RLOO, more prompts"]["road"] == "online"
    assert [seed["kl"] for seed in more] != [seed["kl"] for seed in same]
    assert by_name["best of 2"]["seeds"][0]["ledger"]["sampled_tokens"] > 0
    assert by_name["best of 2"]["description"] == "best of n, nothing trained"
    scorer = tour["scorers"][0]["seeds"][0]
    ordered = [value > math.log(0.5) for value in scorer["pair_log_likelihoods"]]
    assert scorer["accuracy"] == sum(ordered) / len(ordered)
    assert results["versions"]["jax"] == jax.__version__
    # A sweep of two, and a reward model beside DPO: the labels are the same 32.
    for name, arm in by_name.items():
        labels = {seed["ledger"]["labels"] for seed in arm["seeds"]}
        assert labels == {0 if name == "SFT" else 32}, name
    assert set(by_name["DPO"]["seeds"][0]["setting"]) == {"optimizer.learning_rate"}
    page = (where / "one" / "report.html").read_text()
    for name in ("RLOO from DPO", "hidden_goals", "best of 2"):
        assert name in page
    # Nothing is fetched from elsewhere.
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page)


@pytest.mark.slow
def test_a_rerun_repeats_nothing_and_changes_nothing(where, unbroken):
    before = (where / "one" / "results.json").read_bytes()
    shown = compare(where, "one", TOY, "workers=1")
    assert f"{STAGES} of {STAGES} stages were done before" in shown
    assert (where / "one" / "results.json").read_bytes() == before


def workers_of(process: subprocess.Popen) -> list[int]:
    listed = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [
        int(child)
        for child in listed.read_text().split()
        if "spawn_main" in pathlib.Path(f"/proc/{child}/cmdline").read_text()
    ]


@pytest.mark.exhaustive
@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_worker_costs_nothing_but_its_stage(where, unbroken):
    process = start(where, "two", TOY, "workers=2")
    for line in process.stdout:
        if "seed 1: reward model" in line:
            break
    os.kill(workers_of(process)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 70, out + err
    assert "its process died with exit code -9" in err
    assert "Traceback" not in err
    shown = compare(where, "two", TOY, "workers=2")
    kept = re.search(rf"(\d+) of {STAGES} stages were done before", shown)
    assert kept and int(kept[1]) >= 3
    # Broken and by two processes, or unbroken and by one: the same bits.
    assert numbers(where / "two") == numbers(where / "one")


def results_by_label(directory: pathlib.Path):
    """(directory, result) of every stage."""
    found = {}
    for path in directory.glob("stages/*-*/result.json"):
        result = json.loads(path.read_text())
        found[result.pop("label")] = path.parent, result
    return found


@pytest.mark.exhaustive
def test_seeds_that_are_done_together_come_to_what_each_comes_to_alone(where, unbroken):
    compare(where, "lanes", TOY, "workers=1", "seeds_together=2")
    alone, together = (results_by_label(where / name) for name in ("one", "lanes"))
    assert set(alone) == set(together)
    for label, (_, expected) in alone.items():
        _, found = together[label]
        for number in {"gold", "kl", "length"} & set(expected):
            assert found[number] == pytest.approx(expected[number], abs=1e-4), label
    before = numbers(where / "lanes")
    # A seed that has to be done again is alone in its lanes.
    for label in ("tour seed 1: DPO 2", "tour seed 2: RLOO"):
        shutil.rmtree(together[label][0])
    shown = compare(where, "lanes", TOY, "workers=2", "seeds_together=2")
    assert f"{STAGES - 2} of {STAGES} stages were done before" in shown
    assert numbers(where / "lanes") == before


def arm(road, recipe, steps=3, **settings):
    settings = {"recipe": recipe, "steps": steps, "evaluate_every": 2, **settings}
    if road == "online":
        settings |= {"prompts_per_step": 4}
        if recipe != "rebel":
            settings |= {"samples_per_prompt": 4}
    return {"road": road, "settings": settings}


EVERY_RECIPE = {
    **{name: part for name, part in TOY.items() if name != "augmentation"},
    "twins": [],
    "best_of_n": [],
    "lora": {"rank": 2},
    "contrasts": TOY["contrasts"][:1],
    "arms": {
        "DPO": arm("offline", "dpo", batch_size=16, nll_weight=0.5),
        "HyPO": arm("offline", "hypo", batch_size=16, on_policy_prompts=8),
        "online DPO": arm("online", "online_dpo", labels="hard"),
        "soft": arm("online", "online_dpo", labels="soft", generation="once"),
        "RLOO": arm("online", "policy_gradient", num_microbatches=2),
        "GRPO": arm(
            "online",
            "policy_gradient",
            algorithm="grpo",
            kl_in="loss",
            kl_estimator="k3",
        ),
        "REBEL": arm("online", "rebel"),
    },
}
"""All that a study can train; adapters, which PPO has no critic on, aside."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("adapters", [True, False])
def test_every_recipe_comes_to_the_same_in_lanes(where, adapters):
    study = copy.deepcopy(EVERY_RECIPE)
    if not adapters:
        del study["lora"]
        study["arms"]["PPO"] = arm("online", "ppo")
    for name, together in ((f"alone{adapters}", 1), (f"every{adapters}", 2)):
        compare(where, name, study, "workers=2", f"seeds_together={together}")
    alone = results_by_label(where / f"alone{adapters}")
    for label, (_, found) in results_by_label(where / f"every{adapters}").items():
        for number in {"gold", "kl", "length"} & set(found):
            expected = alone[label][1][number]
            assert found[number] == pytest.approx(expected, abs=1e-3), label


@pytest.mark.parametrize(
    ("overrides", "devices", "said"),
    [
        ({"seeds_together": 3}, 1, "seeds_together is 3, but there are 2 seeds"),
        ({"seeds_together": 2}, 2, "seeds_together is 2, but the mesh has 2 devices"),
    ],
)
def test_seeds_that_cannot_be_done_together_are_refused(overrides, devices, said):
    mesh = {"data": devices, "fsdp": 1}
    study = config.validate(
        config.StudyConfig, {**TOY, **overrides, "mesh": mesh}, "toy"
    )
    every = jax.devices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: every()[:devices])
        with pytest.raises(config.ConfigError, match=said):
            progress.workers_of(study)


@pytest.mark.slow
def test_an_edited_arm_redoes_its_own_stages_only(where, unbroken):
    edited = copy.deepcopy(TOY)
    # A dict of its own: "RLOO from DPO" is declared with the same one.
    edited["arms"]["RLOO"]["settings"] = {**RLOO, "kl_coef": 0.1}
    shown = compare(where, "one", edited, "workers=1")
    # Its trial on both tasks of both seeds.
    assert f"{STAGES - 4} of {STAGES} stages were done before" in shown
    # Going back finds the old ones again.
    assert f"{STAGES} of {STAGES}" in compare(where, "one", TOY, "workers=1")


@pytest.mark.slow
def test_two_at_once_are_refused(where, tmp_path):
    with Store(tmp_path / "busy" / "stages").held():
        process = start(tmp_path, "busy", TOY)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 70, out + err
    assert "another process works in" in err


@pytest.mark.slow
def test_ctrl_c_stops_all_of_it_without_a_traceback(where, tmp_path):
    # Where the tests themselves run in a shell's background, Ctrl-C is ignored, and would be by what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start(tmp_path, "stopped", TOY, "workers=2")
    signal.signal(signal.SIGINT, before)
    process.stdout.readline()
    while not (tmp_path / "stopped" / "stages" / "started").exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    children = workers_of(process)
    for each in (process.pid, *children):
        os.kill(each, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command goes on" in err
    assert "Traceback" not in err


# Plans, without computing.


@pytest.fixture
def one_device(monkeypatch):
    make, one = sharding.make_mesh, jax.devices()[:1]
    monkeypatch.setattr(
        sharding, "make_mesh", lambda **axes: make(**{**axes, "devices": one})
    )


def planned(data, code="code"):
    settings = config.StudyConfig.model_validate_json(json.dumps(data))
    planning.check(settings)
    return planning.plan_of(settings, code)


def keys_by_place(plan):
    return {place: stage.key for place, stage in plan.by_place.items()}


def changed_kinds(one_device, **fields):
    """The kinds of stage, and arms, that another value of some fields redoes."""
    before = keys_by_place(planned(TOY))
    after = keys_by_place(planned({**copy.deepcopy(TOY), **fields}))
    return {
        (place[0], place[3])
        for place in {**before, **after}
        if before.get(place) != after.get(place)
    }


def test_a_plan_has_every_stage_once_and_parents_first(one_device):
    plan = planned(TOY)
    assert len(plan.stages) == STAGES == len({stage.key for stage in plan.stages})
    seen = set()
    for stage in plan.stages:
        assert all(parent.key in seen for parent in stage.parents)
        assert stage.cost > 0
        seen.add(stage.key)


ALL_BUT_SFT = {
    ("pairs", ""),
    ("reward", ""),
    ("augmented", ""),
    ("curves", ""),
    *(("trial", name) for name in TOY["arms"]),
}


@pytest.mark.parametrize(
    "fields, kinds",
    [
        ({"workers": 1}, set()),
        ({"run_dir": "elsewhere"}, set()),
        ({"logging": {"every": 3}}, set()),
        ({"timeouts": {"step": 60.0}}, set()),
        ({"contrasts": []}, set()),
        ({"sft": {"steps": 21, "batch_size": 32}}, {("sft", ""), *ALL_BUT_SFT}),
        ({"pairs": {"count": 48, "heldout": 16}}, ALL_BUT_SFT),
        ({"pairs": {"count": 32, "heldout": 16, "tau": 0.3}}, ALL_BUT_SFT),
        ({"reward": {"steps": 7, "batch_size": 16}}, ALL_BUT_SFT - {("pairs", "")}),
        ({"best_of_n": [1, 2, 4]}, {("curves", "")}),
        (
            {"augmentation": {"prompts": 64, "samples_per_prompt": 2}},
            {
                ("augmented", ""),
                ("trial", "DPO, more data"),
                ("trial", "RLOO, more prompts"),
            },
        ),
        (
            {"augmentation": {"prompts": 32, "samples_per_prompt": 4}},
            {("augmented", ""), ("trial", "DPO, more data")},
        ),
    ],
    ids=lambda value: next(iter(value), "none") if isinstance(value, dict) else "",
)
def test_an_edit_redoes_what_depends_on_it(fields, kinds, one_device):
    assert changed_kinds(one_device, **fields) == kinds


def test_an_arm_that_starts_from_another_follows_it(one_device):
    arms = copy.deepcopy(TOY["arms"])
    # A new dictionary: other arms share the old one.
    arms["DPO"]["settings"] = {**arms["DPO"]["settings"], "beta": 2.0}
    arms["DPO"]["sweep"] = [{}, {"optimizer": {"learning_rate": 0.01}}]
    assert changed_kinds(one_device, arms=arms) == {
        ("trial", "DPO"),
        ("trial", "RLOO from DPO"),
    }


def of_kind(kind, *arms):
    return {(kind, arm) for arm in arms or ("",)}


@pytest.mark.parametrize(
    "changed, kinds",
    [
        ("my_task.py", {("sft", ""), *ALL_BUT_SFT}),
        ("my_rewards.py", of_kind("trial", "RLOO")),
        ("my_loss.py", of_kind("trial", "DPO", "RLOO from DPO")),
        ("another.py", set()),
    ],
)
def test_code_that_a_config_names_redoes_what_runs_it(
    changed, kinds, one_device, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    files = {
        "my_task.py": "from gvjax.tasks.tour import Tour as Mine\n",
        "my_rewards.py": "def score(prompt, completion):\n    return 1.0\n",
        "my_loss.py": "from gvjax.losses import dpo_loss as loss\n",
        "another.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        # Where it was before is not where it is now.
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    data = {**copy.deepcopy(TOY), "task": {"name": "my_task:Mine", "options": TOUR}}
    arms = data["arms"]
    arms["RLOO"]["settings"] = {
        **RLOO,
        "rewards": {"verifier": {"path": "my_rewards:score"}},
    }
    arms["DPO"]["settings"] = {**DPO, "loss": "my_loss:loss"}
    # The twin is gvjax's own task; it would run the same arms.
    del data["twins"], data["contrasts"]
    before = keys_by_place(planned(data))
    assert keys_by_place(planned(data)) == before
    (tmp_path / changed).write_text(files[changed] + "# Another.\n")
    after = keys_by_place(planned(data))
    found = {(place[0], place[3]) for place in before if before[place] != after[place]}
    assert found == kinds


def test_other_weights_redo_everything(one_device, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "ground_for", lambda study, made=planning.ground_for: made(study.model_copy(update={"model": TOY["model"]})))  # fmt: skip
    data = {**copy.deepcopy(TOY), "model": {"checkpoint": str(tmp_path)}}
    study = config.StudyConfig.model_validate_json(json.dumps(data))
    (tmp_path / "model.safetensors").write_bytes(b"some")
    before = keys_by_place(planning.plan_of(study, "code"))
    (tmp_path / "model.safetensors").write_bytes(b"others")
    after = keys_by_place(planning.plan_of(study, "code"))
    assert not set(before.values()) & set(after.values())


def test_other_code_redoes_everything(one_device):
    before, after = keys_by_place(planned(TOY)), keys_by_place(planned(TOY, "new"))
    assert not set(before.values()) & set(after.values())


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {
                "twins": [
                    {"task": {"name": "hidden_goals", "options": {"num_nodes": 7}}}
                ]
            },
            "twin hidden_goals does not have the main task's vocabulary",
        ),
        ({"task": {"name": "tuor"}}, "there is no task 'tuor', did you mean 'tour'"),
        (
            {"task": {"name": "tour", "options": {"node": 6}}},
            "no option 'node'",
        ),
        ({"task": {"name": "tour", "options": {"num_nodes": "a"}}}, "task: "),
        ({"model": {**TOY["model"], "num_head": 2}}, "did you mean num_heads"),
        ({"model": {**TOY["model"], "num_heads": 3}}, "embed_dim 16 is not divisible"),
        ({"model": {**TOY["model"], "embed_dim": "16"}}, "model.embed_dim is '16'"),
        ({"model": {**TOY["model"], "vocab_size": 9}}, "model.vocab_size is given"),
        (
            {"model": {**TOY["model"], "learned_positions": 4}},
            "learned_positions is 4, but prompt and completion",
        ),
        ({"mesh": {"data": 1, "fsdp": 3}}, "mesh: .*fsdp=3"),
    ],
    ids=str,
)
def test_what_a_stage_would_fail_on_is_refused_before(fields, message, one_device):
    with pytest.raises(config.ConfigError, match=message):
        planned({**copy.deepcopy(TOY), **fields})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss": "sigmiod"}, "arms.DPO: .*did you mean 'sigmoid'"),
        ({"loss": "no_such_module:loss"}, "cannot import 'no_such_module:loss'"),
        ({"loss_options": {"taau": 1.0}}, "takes no taau"),
        ({"loss_options": {"label_smoothing": 0.7}}, "label_smoothing is 0.7"),
        ({"loss": "gvjax.losses:bradley_terry_loss"}, "arms.DPO: "),
    ],
    ids=str,
)
def test_a_loss_that_does_not_fit_is_refused_before(settings, message, one_device):
    arms = copy.deepcopy(TOY["arms"])
    del arms["DPO"]["sweep"]
    arms["DPO"]["settings"] |= settings
    with pytest.raises(config.ConfigError, match=message):
        planned({**copy.deepcopy(TOY), "arms": arms})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"missing_eos_penalty": 1.0}, "completions of this task have no EOS"),
        (
            {"rewards": {"verifier": {"path": "no_such_module:f"}}},
            "arms.RLOO: .*cannot import the verifier",
        ),
    ],
    ids=str,
)
def test_rewards_are_looked_at_before(settings, message, one_device):
    arms = copy.deepcopy(TOY["arms"])
    arms["RLOO"]["settings"] |= settings
    with pytest.raises(config.ConfigError, match=message):
        planned({**copy.deepcopy(TOY), "arms": arms})


def test_a_penalty_for_a_missing_end_needs_tasks_with_ends(one_device):
    settings = {**RLOO, "missing_eos_penalty": 1.0}
    data = {
        **copy.deepcopy(TOY),
        "task": {"name": "name"},
        "model": {**TOY["model"], "learned_positions": 64},
        "arms": {
            "DPO": {"road": "offline", "settings": DPO},
            "RLOO": {"road": "online", "settings": settings},
        },
        "twins": [],
        "contrasts": [],
    }
    del data["augmentation"]
    with pytest.raises(
        config.ConfigError, match="completions of this task have no EOS"
    ):
        planned(data)
