"""`gvjax run` and `compare` as several processes: one process' numbers, and an end for all when one of them ends."""

import json
import pathlib
import re
import signal
import time

import numpy as np
import pytest
from toy_runs import numbers_of

from gvjax.usage import ExitCode

TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
FOUR_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
ROADS = ("sft", "reward", "dpo", "policy_gradient")


def command_of(recipe: str, where: str, *overrides: str, start: str) -> list[str]:
    """One recipe, kept in a directory, on top of the runs in another."""
    earlier = [] if recipe == "sft" else [f"start={start}/sft"]
    if recipe == "policy_gradient":
        earlier.append(f"reward_model={start}/reward")
    command = ["run", f"{recipe}.yaml", f"run_dir={where}/{recipe}"]
    return [*command, *earlier, *overrides]


def chain(recipes, where: str, *overrides: str, start: str | None = None) -> list[str]:
    """Recipes one after the other, in one start of the processes."""
    command: list[str] = []
    for recipe in recipes:
        command += ["+"] if command else []
        command += command_of(recipe, where, *overrides, start=start or where)
    return command


def sft(where: str) -> list[str]:
    return ["run", "sft.yaml", f"run_dir={where}", "mesh.fsdp=2"]


def codes(group, timeout: float = 600) -> list[int]:
    deadline = time.monotonic() + timeout
    return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in group]


def said(group) -> str:
    return "\n".join(f"{n}: {process.said()}" for n, process in enumerate(group))


def losses_of(directory: pathlib.Path) -> list[float]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.fixture(scope="module")
def alone(preloaded):
    """Both roads by one process with one device."""
    process = preloaded.start(*chain(ROADS, "alone"))
    assert process.wait(600) == 0, process.said()
    return preloaded.directory / "alone"


@pytest.fixture(scope="module")
def pair(preloaded):
    """SFT by two processes with two devices each, unbroken."""
    group = preloaded.group(2, *sft("pair/sft"), env=TWO_DEVICES)
    assert codes(group) == [0, 0], said(group)
    return preloaded.directory / "pair"


def assert_same_losses(found: pathlib.Path, expected: pathlib.Path, recipes) -> None:
    for recipe in recipes:
        losses = losses_of(expected / recipe)
        assert len(losses) == 8
        np.testing.assert_allclose(
            losses_of(found / recipe), losses, rtol=1e-6, atol=1e-6, err_msg=recipe
        )


@pytest.mark.exhaustive
def test_both_roads_of_two_processes_have_the_losses_of_one(preloaded, pair, alone):
    # Its first run is there already.
    command = chain(ROADS, "pair", "mesh.fsdp=2")
    group = preloaded.group(2, *command, env=TWO_DEVICES)
    assert codes(group) == [0, 0], said(group)
    assert_same_losses(pair, alone, ROADS)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_both_roads_of_four_processes_have_the_losses_of_one(preloaded, alone):
    # From what one process made. Heads and vocabulary are split between processes, two of which hold the same rows.
    ends = ROADS[2:]
    command = chain(ends, "four", "mesh.fsdp=1", "mesh.tensor=2", start="alone")
    group = preloaded.group(4, *command)
    assert codes(group) == [0] * 4, said(group)
    assert_same_losses(preloaded.directory / "four", alone, ends)


@pytest.mark.slow
def test_one_killed_all_are_gone_at_once_and_a_new_group_ends_in_the_same_bits(
    preloaded, pair
):
    command, act = sft("killed"), [("slow_rounds", 0.5)]
    for victim, after in ((1, 4), (0, 2)):
        group = preloaded.group(2, *command, act=act, env=TWO_DEVICES)
        group[victim].reached(after)
        group[victim].send(signal.SIGKILL)
        ended = codes(group, 10)  # jax alone would take the heartbeat's 30
        assert ended[victim] == -signal.SIGKILL
        assert ended[1 - victim] not in (0, 64, 85), said(group)
    group = preloaded.group(2, *command, env=TWO_DEVICES)
    assert codes(group) == [0, 0], said(group)
    # It went on from a checkpoint, and on the same mesh to the same bits.
    assert pathlib.Path(f"{group[0].place}.beats").stat().st_size < 8
    found = preloaded.directory / "killed" / "metrics.jsonl"
    assert found.read_bytes() == (pair / "sft" / "metrics.jsonl").read_bytes()


def stop_at_one_round(group) -> None:
    """SIGTERM to one of two processes, in the third of eight rounds, ends both after the same one.

    Rounds must be slow: jax looks for the signal once a second or so, and what is left of them is over sooner.
    """
    group[1].reached(3)
    group[1].send(signal.SIGTERM)
    assert codes(group) == [85, 85], said(group)
    beats = [pathlib.Path(f"{each.place}.beats").stat().st_size for each in group]
    assert beats[0] == beats[1] < 8
    assert f"stopped after round {beats[0]} of 8, checkpointed" in group[0].said()


@pytest.mark.slow
def test_sigterm_to_one_stops_all_at_one_step_and_one_process_goes_on(preloaded, pair):
    command = sft("stopped")
    act = [("slow_rounds", 0.5)]
    group = preloaded.group(2, *command, act=act, env=TWO_DEVICES)
    stop_at_one_round(group)
    process = preloaded.start(*command, env=FOUR_DEVICES)
    assert process.wait() == 0, process.said()
    assert "processes was 2 and is 1" in process.said()
    np.testing.assert_allclose(
        losses_of(preloaded.directory / "stopped"),
        losses_of(pair / "sft"),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.slow
def test_a_stuck_loader_ends_all_within_the_configured_time(preloaded, pair):
    command = [*sft("stuck"), "timeouts.step=2"]
    act = [("stuck_data", 4)]
    group = preloaded.group(2, *command, act=act, on=1, env=TWO_DEVICES)
    group[1].reached(2)
    ended, hang = codes(group, 200), ExitCode.HANG
    # One that still waits when process 0 has gone is aborted by jax.
    assert hang in ended and set(ended) <= {hang, -signal.SIGABRT}, said(group)
    # The limit is ten median steps, should this machine be so busy that they take longer than the two seconds.
    told = re.findall(r"no step for (\S+) s \(limit (\S+) s\)", said(group))
    assert told, said(group)
    for idle, limit in told:
        assert float(idle) < float(limit) + max(2, float(limit) / 5), said(group)
    # Whoever noticed first, the one that the others wait for shows where it is.
    if ended[1] == hang:
        assert "in stuck" in group[1].said()


@pytest.mark.exhaustive
def test_a_frozen_process_ends_all_within_the_configured_time(preloaded, pair):
    command = [*sft("frozen"), "timeouts.heartbeat=4"]
    act = [("slow_rounds", 0.2)]
    group = preloaded.group(2, *command, act=act, env=TWO_DEVICES)
    group[1].reached(2)
    group[1].send(signal.SIGSTOP)
    try:
        # Noticed between one and two heartbeats' limits later; by default not before 30 seconds.
        assert group[0].wait(28) not in (0, 64, 85), said(group)
    finally:
        group[1].kill()


@pytest.mark.slow
def test_processes_with_different_configs_or_without_all_peers_do_not_start(preloaded):
    group = preloaded.group(
        2,
        ["run", "sft.yaml", "run_dir=differ", "seed=1"],
        ["run", "sft.yaml", "run_dir=differ", "seed=2"],
    )
    ended = codes(group)
    assert set(ended) <= {64, 70} and 64 in ended, said(group)
    assert "the config differs between processes: [1] have another" in said(group)
    assert not (preloaded.directory / "differ").exists()

    command = ["run", "sft.yaml", "run_dir=missing", "timeouts.arrival=3"]
    process = preloaded.group(2, *command, started=1)[0]
    assert process.wait() not in (0, 85)
    assert not (preloaded.directory / "missing").exists()


def study_of_two(preloaded, where: str, act=None):
    """`gvjax compare` by two processes with a device each."""
    return preloaded.group(2, "compare", "study.yaml", f"run_dir={where}", act=act)


@pytest.fixture(scope="module")
def study_pair(preloaded):
    """Both roads of a study by two processes, unbroken."""
    group = study_of_two(preloaded, "together")
    assert codes(group) == [0, 0], said(group)
    # One of them is heard.
    assert "5 stages, 2 processes" in group[0].said()
    assert "stages" not in group[1].said()
    return preloaded.directory / "together"


@pytest.mark.exhaustive
def test_a_study_by_two_processes_has_the_numbers_of_one_and_a_rerun_repeats_nothing(
    preloaded, study, study_pair
):
    (found, lines), (expected, _) = numbers_of(study_pair), numbers_of(study)
    assert len(lines) == 4
    # A reward model's constant is anyone's guess: pairs give it a gradient of rounding alone, of which Adam makes steps.
    shifts = np.subtract(proxies_of(found), proxies_of(expected))
    assert len(shifts) and np.ptp(shifts) < 1e-4
    assert_close(found, expected)
    before = (study_pair / "results.json").read_bytes()
    group = study_of_two(preloaded, "together")
    assert codes(group) == [0, 0], said(group)
    assert "5 of 5 stages were done before" in group[0].said()
    assert (study_pair / "results.json").read_bytes() == before


@pytest.mark.exhaustive
def test_a_study_by_two_processes_stopped_and_killed_comes_back_to_the_same_bits(
    preloaded, study_pair
):
    group = study_of_two(preloaded, "apart", act=[("slow_rounds", 0.5)])
    stop_at_one_round(group)
    # The first alone marks stages as done: it dies between two of them.
    group = study_of_two(preloaded, "apart", act=[("kill_after_stage", 3)])
    ended = codes(group)
    assert ended[0] == -signal.SIGKILL and ended[1] not in (0, 64, 85), said(group)
    group = study_of_two(preloaded, "apart")
    assert codes(group) == [0, 0], said(group)
    assert "3 of 5 stages were done before" in group[0].said()
    assert numbers_of(preloaded.directory / "apart") == numbers_of(study_pair)


@pytest.mark.exhaustive
def test_a_gap_by_two_processes_is_that_of_one(preloaded):
    """Every number of every seed, and the advice."""
    process = preloaded.start("gap", "gap.yaml", "run_dir=gap-alone", "workers=1")
    assert process.wait(600) == 0, process.said()
    group = preloaded.group(2, "gap", "gap.yaml", "run_dir=gap-together")
    assert codes(group) == [0, 0], said(group)
    alone, together = (
        numbers_of(preloaded.directory / name, "gap.json")
        for name in ("gap-alone", "gap-together")
    )
    assert together[1].keys() == alone[1].keys()
    assert_close(together[0], alone[0], "gap")


def proxies_of(results) -> list[float]:
    """Mean rewards by the reward model, in the order of arms, seeds and steps."""
    points = [
        point
        for task in results["tasks"]
        for arm in task["arms"]
        for seed in arm["seeds"]
        for point in seed["curve"]
    ]
    return [point["proxy"] for point in points if point.get("proxy") is not None]


def assert_close(found, expected, at: str = "results") -> None:
    """Same names, texts and counts; numbers but for proxies within what another order of sums changes."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), at
        for name, value in expected.items():
            if name != "proxy":
                assert_close(found[name], value, f"{at}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), at
        for place, (ours, theirs) in enumerate(zip(found, expected)):
            assert_close(ours, theirs, f"{at}.{place}")
    elif isinstance(expected, float):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4, err_msg=at)
    else:
        assert found == expected, at
