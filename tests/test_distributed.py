"""Processes that start together or not at all. How they end, and what `gvjax run` makes of it: tests/survival."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from distributed_worker import RULES, init, step

from gvjax import __main__ as entry
from gvjax import distributed, sharding
from gvjax.usage import ExitCode
from launch.runner import free_port

WORKER = pathlib.Path(__file__).with_name("distributed_worker.py")


class Group:
    """Processes of two virtual devices each, that run one act of the worker together."""

    def __init__(self, act: str, directory: pathlib.Path, count: int = 2):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "GVJAX_COORDINATOR": f"localhost:{free_port()}",
            "GVJAX_NUM_PROCESSES": str(count),
        }
        self.directory = directory
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(WORKER), act, str(directory)],
                env={**environment, "GVJAX_PROCESS_ID": str(index)},
                stdout=subprocess.PIPE,
                stderr=(directory / f"{index}.err").open("w"),
                text=True,
            )
            for index in range(count)
        ]

    def wait_for_step(self, number: int) -> None:
        for process in self.processes:
            while (line := process.stdout.readline().strip()) != str(number):
                if not line and process.poll() is not None:
                    pytest.fail(self.errors())

    def codes(self, timeout: float) -> list[int]:
        """Exit codes, of processes that must all be gone within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=max(deadline - time.monotonic(), 0.01))
        codes = [process.poll() for process in self.processes]
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        assert None not in codes, f"{codes} after {timeout} s\n{self.errors()}"
        return codes

    def errors(self) -> str:
        return "\n".join(p.read_text()[-3000:] for p in self.directory.glob("*.err"))

    def results(self) -> list[dict]:
        return [
            json.loads((self.directory / f"{index}.json").read_text())
            for index in range(len(self.processes))
        ]


@pytest.fixture
def start(tmp_path):
    groups = []

    def start(act: str, count: int = 2) -> Group:
        groups.append(Group(act, tmp_path, count))
        return groups[-1]

    yield start
    for group in groups:
        for process in group.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def alone(steps: int) -> list[float]:
    from distributed_worker import batch_at

    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    state = sharding.init_sharded(init, mesh, RULES)
    targets = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted, losses = sharding.jit_step(step, mesh, targets), []
    for number in range(steps):
        state, metrics = jitted(state, sharding.put_batch(mesh, batch_at(number)))
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.slow
def test_each_process_loads_its_own_rows(start):
    group = start("train")
    assert group.codes(300) == [0, 0], group.errors()
    results = group.results()
    for result in results:
        assert result["processes"] == 2
        np.testing.assert_allclose(result["losses"], alone(3), rtol=1e-6)
    assert all(result["losses"] == results[0]["losses"] for result in results)
    assert sorted(row for r in results for row in r["rows"]) == list(range(8))


@pytest.mark.slow
def test_processes_that_share_a_tensor_axis_load_the_same_rows(start):
    group = start("tensor")
    assert group.codes(300) == [0, 0], group.errors()
    first, second = group.results()
    assert first["rows"] == second["rows"] == list(range(8))
    np.testing.assert_allclose(first["losses"], alone(3), rtol=1e-6)


@pytest.mark.slow
def test_an_exception_in_one_ends_all_at_once(start):
    group = start("raise")
    group.wait_for_step(5)
    codes = group.codes(20)  # jax alone would take the heartbeat's 30
    assert codes[1] == ExitCode.CRASH
    assert codes[0] not in (0, 85)
    assert "KeyError: 'a bug in one process'" in group.errors()


def assert_crashed(codes: list[int]) -> None:
    """All with the code, but one whom jax may abort first, because process 0 has gone."""
    crash = ExitCode.CRASH
    assert crash in codes and set(codes) <= {crash, -signal.SIGABRT}


@pytest.mark.slow
def test_processes_with_different_batches_do_not_start(start):
    group = start("differ")
    assert_crashed(group.codes(300))
    assert "first batch differs between processes: [1] have another" in group.errors()


@pytest.mark.slow
def test_a_directory_of_one_process_alone_is_refused(start):
    group = start("apart")
    assert_crashed(group.codes(300))
    assert "is not shared: processes [1] do not see" in group.errors()


@pytest.mark.slow
def test_all_go_on_from_the_step_that_the_first_sees(start):
    group = start("stale")
    assert group.codes(300) == [0, 0], group.errors()
    assert [each["restored"] for each in group.results()] == [[2, 2, 2]] * 2


def test_the_first_source_that_speaks_wins():
    arguments = distributed._Cluster("a:1", 2, 1)
    gvjax = {
        "GVJAX_COORDINATOR": "b:2",
        "GVJAX_NUM_PROCESSES": "4",
        "GVJAX_PROCESS_ID": "3",
    }
    sky = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "0",
    }
    nobody = distributed._Cluster()
    resolve = distributed._resolve
    assert resolve(arguments, {**gvjax, **sky})[0] == arguments
    assert resolve(nobody, {**gvjax, **sky})[0] == distributed._Cluster("b:2", 4, 3)
    assert resolve(nobody, sky)[0] == distributed._Cluster("10.0.0.1:8476", 2, 0)
    assert resolve(nobody, {}) == (nobody, None)


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        ({}, True),
        ({"GVJAX_NUM_PROCESSES": "1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, False),
        (
            {
                "GVJAX_COORDINATOR": "a:1",
                "GVJAX_NUM_PROCESSES": "2",
                "GVJAX_PROCESS_ID": "0",
            },
            False,
        ),
    ],
)
def test_what_several_processes_cannot_do_together_is_refused_before_they_meet(
    environment, alone, monkeypatch, capsys, tmp_path
):
    for name in ("TPU_WORKER_HOSTNAMES", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (distributed.promised() == 1) == alone
    if alone:
        return
    configs = pathlib.Path(__file__).parents[1] / "configs"

    def met(**_):
        raise AssertionError("this process would have waited for the others")

    monkeypatch.setattr(distributed, "initialize", met)
    assert entry.main(["compare", str(configs / "smoke.yaml"), "workers=2"]) == 64
    said = capsys.readouterr().err
    assert f"workers is 2, but {distributed.promised()} processes were started" in said
    people = f"{{kind: human, directory: {tmp_path}}}"
    quickstart = str(configs / "gap" / "quickstart.yaml")
    assert entry.main(["gap", quickstart, f"judge={people}"]) == 64
    assert "judge.kind is human, which one process asks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"GVJAX_NUM_PROCESSES": "2", "GVJAX_PROCESS_ID": "0"},
            "GVJAX_.*leave out coordinator",
        ),
        ({"GVJAX_COORDINATOR": "a:1"}, "leave out num_processes and process_id"),
        ({"GVJAX_NUM_PROCESSES": "two"}, "GVJAX_NUM_PROCESSES='two' must be an int"),
        (
            {
                "GVJAX_COORDINATOR": "a:1",
                "GVJAX_NUM_PROCESSES": "2",
                "GVJAX_PROCESS_ID": "2",
            },
            "process_id 2 of num_processes 2",
        ),
        (
            {
                "GVJAX_COORDINATOR": "a",
                "GVJAX_NUM_PROCESSES": "2",
                "GVJAX_PROCESS_ID": "1",
            },
            "'a'; it must be host:port",
        ),
    ],
)
def test_half_given_clusters_are_refused(environment, message):
    with pytest.raises(ValueError, match=message):
        distributed._resolve(distributed._Cluster(), environment)


@pytest.mark.parametrize(
    "promise",
    [
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"SLURM_STEP_NUM_TASKS": "4"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
        {"JAX_COORDINATOR_ADDRESS": "localhost:1"},
    ],
)
def test_a_promised_group_is_not_silently_left(promise, monkeypatch):
    jax.devices()  # jax is in use: initialize comes too late to join anybody.
    for name, value in promise.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="started as one of several"):
        distributed.initialize()


def test_alone_sigterm_is_a_notice(monkeypatch):
    monkeypatch.setattr(distributed, "_preempted", type(distributed._preempted)())
    before = signal.getsignal(signal.SIGTERM)
    try:
        distributed.initialize()
        distributed.initialize(num_processes=1)
        assert not distributed.preemption_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert distributed.preemption_requested()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(SystemExit) as left:
        distributed.exit_with(ExitCode.PREEMPTED)
    assert left.value.code == 85
    distributed.assert_same_on_all_hosts("config", "value")


def test_batch_digests_see_content_shape_dtype_and_name():
    batch = {"x": np.arange(6, dtype=np.int32), "y": np.ones(2, np.float32)}
    digest = distributed.batch_digest(batch)
    assert digest == distributed.batch_digest({k: v.copy() for k, v in batch.items()})
    for other in (
        {**batch, "x": batch["x"][::-1]},
        {**batch, "x": batch["x"].reshape(2, 3)},
        {**batch, "x": batch["x"].view(np.uint32)},
        {"z": batch["x"], "y": batch["y"]},
    ):
        assert distributed.batch_digest(other) != digest


def test_the_watchdog_limit_follows_the_median_and_leaves_out_pauses(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(distributed.time, "monotonic", lambda: clock[0])
    watchdog = distributed.Watchdog(floor_s=5, factor=10, first_s=100)
    assert watchdog.limit_s == 100
    for number, seconds in enumerate([60, 1, 1, 2]):
        clock[0] += seconds
        watchdog.beat(number)
    assert (
        watchdog.limit_s == 10
    )  # the first interval, with the compilation, is left out
    with watchdog.paused():
        assert watchdog.limit_s == float("inf")
        with watchdog.paused(50):
            assert watchdog.limit_s == 50
        clock[0] += 1000
    clock[0] += 3
    watchdog.beat(5)
    assert watchdog.limit_s == 10
    assert distributed.Watchdog(floor_s=600, first_s=1).limit_s == 600
    with pytest.raises(ValueError, match="factor 0 must be greater than 0"):
        distributed.Watchdog(factor=0)


@pytest.mark.parametrize("first", ["", "initialize()"])
def test_the_watchdog_lets_beats_pauses_and_stops_live_and_ends_silence(first):
    script = f"""
import os, signal, subprocess, sys, time
from gvjax.distributed import Watchdog, initialize
{first}
with Watchdog(floor_s=2, factor=1, first_s=2) as watchdog:
    for number in range(10):
        time.sleep(0.1)
        watchdog.beat(number)
    with watchdog.paused():
        time.sleep(2.5)
    watchdog.beat(10)
    # Stopped as a whole, as by Ctrl-Z, it was not stuck: for longer than twice the limit.
    begun = time.monotonic()
    subprocess.Popen(["sh", "-c", "sleep 5; kill -CONT " + str(os.getpid())])
    os.kill(os.getpid(), signal.SIGTSTP)
    time.sleep(0.4)
    watchdog.beat(11)
    print("alive" if time.monotonic() - begun > 4 else "it was not stopped", flush=True)
    def stuck():
        while True:
            time.sleep(0.01)
    stuck()
"""
    # A group of its own, of which this process is the parent: others cannot be brought back, and do not stop.
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        process_group=0,
    )
    assert run.returncode == ExitCode.HANG, run.stderr
    assert run.stdout == "alive\n"
    assert "since step 11" in run.stderr and "in stuck" in run.stderr


def test_what_lets_no_other_thread_run_ends_too():
    script = """
import re
from gvjax.distributed import Watchdog
with Watchdog(floor_s=0.5, factor=1, first_s=0.5) as watchdog:
    with watchdog.paused():
        re.match(r"(a+)+$", "a" * 26 + "b")
    print("alive", flush=True)
    def stuck():
        re.match(r"(a+)+$", "a" * 60 + "b")
    stuck()
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 1
    assert run.stdout == "alive\n"
    assert "in stuck" in run.stderr


def test_where_nobody_could_bring_it_back_ctrl_z_does_not_stop_it():
    script = """
import os, signal, time
from gvjax.distributed import Watchdog
with Watchdog():
    os.kill(os.getpid(), signal.SIGTSTP)
    time.sleep(0.1)
    print("alive", flush=True)
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
    )
    assert (run.returncode, run.stdout) == (0, "alive\n")


def test_a_closed_watchdog_leaves_no_clock_behind(monkeypatch):
    clock: list[float] = []
    later = distributed.faulthandler
    monkeypatch.setattr(
        later, "dump_traceback_later", lambda seconds, **_: clock.append(seconds)
    )
    monkeypatch.setattr(later, "cancel_dump_traceback_later", clock.clear)
    # Nobody looks between the lines.
    monkeypatch.setattr(distributed.Watchdog, "_watch", lambda self: None)
    with distributed.Watchdog(first_s=1000) as outer:
        with distributed.Watchdog(first_s=700) as inner, inner.paused():
            assert clock == [pytest.approx(2000, abs=100)]
        with outer.paused():
            assert not clock
        with outer.paused(800):
            assert clock == [pytest.approx(1600, abs=100)]
    assert not clock
