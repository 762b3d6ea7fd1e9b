"""Results survive the trip through JSON exactly, and nothing that is not results is accepted."""

import dataclasses
import json
import math

import numpy as np
import pytest

from gvjax.gap import results as gap_results
from gvjax.gap.results import (
    BEST_OFFLINE,
    ArmResult,
    Contrast,
    CurvePoint,
    Ledger,
    SeedResult,
    StudyResults,
    TaskResult,
)


def small_study() -> StudyResults:
    def arm(name, road, *golds):
        seeds = tuple(
            SeedResult(
                seed=5 + i,
                gold=gold,
                kl=0.1 * i,
                length=10.0,
                setting={"learning_rate": 3e-4, "epochs": 2, "nll": None, "soft": True},
                curve=(CurvePoint(100, 0.25, 1.0, 10.0),),
                ledger=Ledger(labels=1000, seconds=1.5),
            )
            for i, gold in enumerate(golds)
        )
        return ArmResult(name, road, seeds)

    arms = (
        arm("SFT", "start", (0.0, 0.5), (0.25, 0.25)),
        arm("DPO", "offline", (1.0, 0.5), (0.25, 0.0)),
        arm("DPO + NLL", "offline", (0.0, 0.5), (0.5, 0.25)),
        arm("RLOO", "online", (1.0, 1.0), (1.0, 0.5)),
    )
    return StudyResults(
        name="small",
        config={"study": {"seeds": [5, 6], "beta": 0.1}},
        config_hash="abc123",
        versions={"gvjax": "0.1.0"},
        started="2026-01-01T00:00:00+00:00",
        tasks=(TaskResult("tour", "main", arms),),
        contrasts=(Contrast("tour", "RLOO", BEST_OFFLINE, margin=0.03),),
    )


def test_json_returns_an_equal_study():
    study = small_study()
    assert StudyResults.from_json(study.to_json()) == study


def test_save_and_load(tmp_path):
    study = small_study()
    study.save(tmp_path / "results.json")
    assert StudyResults.load(tmp_path / "results.json") == study
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_numbers_that_are_not_finite_survive_in_strict_json():
    study = small_study()
    task = study.tasks[0]
    broken = dataclasses.replace(task.arms[3].seeds[0], kl=math.inf, length=math.nan)
    arm = dataclasses.replace(task.arms[3], seeds=(broken, task.arms[3].seeds[1]))
    task = dataclasses.replace(task, arms=(*task.arms[:3], arm))
    text = dataclasses.replace(study, tasks=(task,)).to_json()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(text, parse_constant=refuse)
    read = StudyResults.from_json(text).tasks[0].arm("RLOO").seed(5)
    assert read.kl == math.inf
    assert math.isnan(read.length)


def test_numpy_scalars_are_written_as_numbers():
    study = dataclasses.replace(
        small_study(), config={"beta": np.float32(0.5), "seeds": np.int64(3)}
    )
    assert StudyResults.from_json(study.to_json()).config == {"beta": 0.5, "seeds": 3}


def test_what_json_cannot_say_is_refused():
    study = dataclasses.replace(small_study(), config={"loss": small_study})
    with pytest.raises(ValueError, match="cannot write function"):
        study.to_json()


def change(**changes):
    value = json.loads(small_study().to_json())
    value.update(changes)
    return json.dumps(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no 'version'"),
        (change(version=2), "version 2, this gvjax reads 1"),
        (change(confg={}), "unknown field 'confg' .did you mean 'config'"),
        (change(name=3), r"results.name: expected .*str.*, found 3"),
        (change(tasks={}), "results.tasks"),
        (
            change(tasks=[{"task": "tour", "role": "main"}]),
            r"results.tasks\[0\]: field 'arms'",
        ),
        (
            change(tasks=[{"task": "tour", "role": "minor", "arms": []}]),
            r"results.tasks\[0\].role: expected .*main",
        ),
        (
            change(contrasts=[{"task": "t", "a": "x", "b": "y", "primary": 1}]),
            "primary",
        ),
    ],
)
def test_what_is_not_results_is_refused_by_place(text, message):
    with pytest.raises(ValueError, match=message):
        StudyResults.from_json(text)


def test_ledgers_add_field_by_field():
    total = Ledger(labels=10, flops=1.5) + Ledger(labels=5, seconds=2.0)
    assert total == Ledger(labels=15, flops=1.5, seconds=2.0)


def with_validation_gold(arm: ArmResult, *golds) -> ArmResult:
    seeds = (
        dataclasses.replace(seed, extra={"validation_gold": gold})
        for seed, gold in zip(arm.seeds, golds)
    )
    return dataclasses.replace(arm, seeds=tuple(seeds))


def test_best_offline_is_chosen_anew_for_each_seed_on_validation_gold():
    task = small_study().tasks[0]
    start, dpo, nll, rloo = task.arms
    # On the test prompts it would be the other one in both seeds.
    known = with_validation_gold(dpo, 0.1, 0.9), with_validation_gold(nll, 0.2, 0.8)
    task = dataclasses.replace(task, arms=(start, *known, rloo))
    assert task.offline == known and not gap_results.chosen_on_test(task.offline)
    best = task.arm(BEST_OFFLINE)
    assert best.road == "offline"
    assert [seed.setting["arm"] for seed in best.seeds] == ["DPO + NLL", "DPO"]
    assert [seed.mean_gold for seed in best.seeds] == [0.25, 0.125]
    assert best.description.endswith("seed by seed by gold on validation prompts")


def test_without_validation_gold_best_offline_is_chosen_on_the_test_prompts():
    task = small_study().tasks[0]
    start, dpo, nll, rloo = task.arms
    for arm in (dpo, with_validation_gold(dpo, 0.1, 0.1)):
        task = dataclasses.replace(task, arms=(start, arm, nll, rloo))
        assert gap_results.chosen_on_test(task.offline)
        best = task.arm(BEST_OFFLINE)
        assert [seed.setting["arm"] for seed in best.seeds] == ["DPO", "DPO + NLL"]
        assert [seed.mean_gold for seed in best.seeds] == [0.75, 0.375]
        assert "the test prompts themselves, which flatters it" in best.description
    # Of one arm nothing is chosen.
    assert not gap_results.chosen_on_test([dpo])
    assert gap_results.best_arm([dpo], "one").seeds[0].gold == dpo.seeds[0].gold


def test_unknown_names_get_a_near_miss():
    task = small_study().tasks[0]
    with pytest.raises(ValueError, match="did you mean 'RLOO'"):
        task.arm("RLO")
    with pytest.raises(ValueError, match=r"no seed 9; it has .5, 6."):
        task.arm("RLOO").seed(9)
    with pytest.raises(ValueError, match="0 arms with road 'start'"):
        _ = dataclasses.replace(task, arms=task.arms[1:]).start


def test_version_is_written():
    assert json.loads(small_study().to_json())["version"] == gap_results.VERSION
