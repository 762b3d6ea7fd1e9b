"""Killed anywhere, started again with the same command, every recipe ends in the bits and lines of an unbroken run."""

import pathlib
import random
import signal
import time

import pytest
from toy_runs import RECIPES, ROUNDS, assert_same, numbers_of


def faults(recipe: str, rng: random.Random) -> list:
    """One way to be killed, drawn by chance."""
    online = "batch_size" not in RECIPES[recipe]["settings"] or recipe == "hypo"
    kinds = {
        "kill_at_round": lambda: rng.randint(1, 4),
        "kill_in_save": lambda: [rng.randint(1, 2), rng.uniform(0, 0.03)],
        "kill_at_time": lambda: rng.uniform(0, 0.2),
        "kill_at_end": lambda: rng.choice(["params", "result"]),
    }
    if online:
        kinds["kill_in_rollout"] = lambda: rng.randint(1, 4)
    elif recipe == "rejection":
        # All its samples are drawn at the start.
        kinds["kill_in_rollout"] = lambda: 1
    name = rng.choice(list(kinds))
    return [(name, kinds[name]())]


def kill_and_resume(preloaded, whole, recipe: str, kills: int, seed: int) -> None:
    expected = whole(recipe)
    assert len((expected / "metrics.jsonl").read_text().splitlines()) >= ROUNDS
    rng = random.Random(f"{recipe} {seed}")
    killed = attempt = 0
    while True:
        name = f"{recipe}-{seed}-{attempt}"
        again = ["run", f"{recipe}.yaml", f"run_dir={name}"]
        while killed < kills:
            fault = faults(recipe, rng)
            process = preloaded.start(*again, act=fault)
            code = process.wait()
            assert code in (0, -9), (fault, process.said())
            killed += code == -9
            if code == 0:
                break
        else:
            process = preloaded.start(*again)
            assert process.wait() == 0, process.said()
        assert_same(preloaded.directory / name, expected)
        if killed == kills:
            return
        attempt += 1


@pytest.mark.parametrize(
    "recipe", [pytest.param("sft", marks=pytest.mark.exhaustive), "dpo"]
)
def test_killed_a_few_times_it_ends_in_the_same_bits(preloaded, whole, recipe):
    kill_and_resume(preloaded, whole, recipe, kills=2, seed=1)


def children_of(pid: int) -> list[int]:
    listed = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()]


def is_there(pid: int) -> bool:
    state = pathlib.Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def assert_gone(pids: list[int]) -> None:
    """Soon."""
    deadline = time.monotonic() + 60
    while any(map(is_there, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.exhaustive
@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_study_killed_within_and_between_stages_has_the_same_numbers(
    preloaded, study
):
    def compare(name, workers, act=None):
        command = ("compare", "study.yaml", f"run_dir={name}", f"workers={workers}")
        return preloaded.start(*command, act=act)

    # The leader of two workers, which must not go on without it beside the next leader's.
    process = compare("killed", 2)
    process.said_within("%")
    workers = children_of(process.pid)
    assert len(workers) >= 2, process.said()
    process.kill()
    assert_gone(workers)
    for fault in (
        ("kill_at_round", 3),
        ("kill_after_stage", 2),
        ("kill_in_rollout", 2),
    ):
        process = compare("killed", 1, [fault])
        assert process.wait() == -9, (fault, process.said())
    process = compare("killed", 1)
    assert process.wait() == 0, process.said()
    assert "stages were done before and were kept" in process.said()
    assert numbers_of(preloaded.directory / "killed") == numbers_of(study)


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_study_told_to_go_leaves_with_85_and_comes_back_to_the_same_numbers(
    preloaded, study
):
    def compare(workers):
        act = [("slow_rounds", 0.1)]
        command = ("compare", "study.yaml", "run_dir=told", f"workers={workers}")
        return preloaded.start(*command, act=act)

    # In this process there is a round to stop after; of two workers the leader is told.
    process = compare(1)
    process.reached(3)
    process.send(signal.SIGTERM)
    assert process.wait() == 85, process.said()
    assert "stopped after round" in process.said()
    process = compare(2)
    process.said_within("%")
    workers = children_of(process.pid)
    process.send(signal.SIGTERM)
    assert process.wait() == 85, process.said()
    assert_gone(workers)
    assert compare(1).wait() == 0
    assert numbers_of(preloaded.directory / "told") == numbers_of(study)


KILLS = {recipe: {"sft": 18, "reward": 6}.get(recipe, 4) for recipe in RECIPES}
assert sum(KILLS.values()) >= 50


@pytest.mark.exhaustive
@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_again_and_again_every_recipe_ends_in_the_same_bits(
    preloaded, whole, recipe
):
    kill_and_resume(preloaded, whole, recipe, kills=KILLS[recipe], seed=0)
