"""Local groups with real processes: tiny standard-library workers that exit, hang and checkpoint as told."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import runner
from launch.plan import Group

ROOT = Path(__file__).parents[2]

# Exits with the code its index finds in the plan for this start; `hang` ignores SIGTERM, `wait` obeys it, `save`
# checkpoints and says 85.
WORKER = """
import json, os, signal, sys, time
index = int(os.environ["GVJAX_PROCESS_ID"])
with open(f"start-{index}", "a") as file:
    file.write(os.environ["GVJAX_COORDINATOR"] + "\\n")
start = len(open(f"start-{index}").readlines()) - 1
plan = json.loads(os.environ["WORK"])
todo = plan[min(start, len(plan) - 1)][index]
print(f"start {start}: {todo}", flush=True)
if todo == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if todo == "save":
    def save(*_):
        time.sleep(0.2)
        open(f"saved-{index}", "w").close()
        sys.exit(85)
    signal.signal(signal.SIGTERM, save)
open(f"ready-{start}-{index}", "w").close()
# Nobody acts before all have started: a slow machine must not change what is tested.
while not all(os.path.exists(f"ready-{start}-{i}") for i in range(len(plan[0]))):
    time.sleep(0.01)
if todo == "signal":
    os.kill(os.getpid(), signal.SIGKILL)
while isinstance(todo, str):
    # In short naps: a signal that comes just before a long one is heard after it.
    time.sleep(0.02)
sys.exit(todo)
"""


def _environments(work, count):
    return tuple(
        {
            "GVJAX_COORDINATOR": "localhost:{port}",
            "GVJAX_NUM_PROCESSES": str(count),
            "GVJAX_PROCESS_ID": str(index),
            "WORK": json.dumps(work),
        }
        for index in range(count)
    )


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Supervise workers that do `work[start][index]`; returns (exit code, starts)."""
    monkeypatch.setattr(runner, "PAUSE", 0.01)

    def run(work, retries=3, grace=10):
        made = Group(
            argv=(sys.executable, "-S", "-c", WORKER),
            environments=_environments(work, len(work[0])),
            secrets=(),
            workdir=str(tmp_path),
            retries=retries,
            grace=grace,
        )
        code = runner.supervise(made, tmp_path)
        return code, len((tmp_path / "start-0").read_text().splitlines())

    return run


@pytest.mark.parametrize(
    ("work", "retries", "code", "starts"),
    [
        ([[0, 0, 0, 0]], 3, 0, 1),
        ([["wait", 64]], 3, 64, 1),
        ([["wait", 2]], 3, 2, 1),
        ([["wait", 70], [0, 0]], 3, 0, 2),
        ([[71, "wait"]], 1, 71, 2),
        ([["wait", "signal"]], 0, 137, 1),
        ([[85, 85], [85, 85], [0, 0]], 0, 0, 3),
        ([[85, "save"], ["wait", 134], [85, 85], [70, "wait"]], 1, 70, 4),
    ],
)
def test_exit_codes_decide(group, work, retries, code, starts):
    assert group(work, retries) == (code, starts)


def test_the_first_to_fail_lets_the_others_checkpoint(group, tmp_path):
    assert group([["save", "save", 64]]) == (64, 1)
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


def test_who_ignores_sigterm_is_killed_after_the_grace(group, capsys):
    began = time.monotonic()
    assert group([["hang", 64]], grace=1) == (64, 1)
    assert 1 <= time.monotonic() - began < 50
    assert "SIGKILL" in capsys.readouterr().err


def test_log_lines_say_whose_they_are(group, tmp_path, capfd):
    group([[0, 0]])
    shown = capfd.readouterr().out
    for line in ("[0] start 0: 0\n", "[1] start 0: 0\n"):
        assert line in shown
        assert line in (tmp_path / "log").read_text()


def test_every_start_shares_one_port_and_takes_a_new_one(group, tmp_path, monkeypatch):
    ports = itertools.count(20000)  # by chance the second could be the first again
    monkeypatch.setattr(runner, "free_port", lambda: next(ports))
    group([[70, 70], [0, 0]])
    first, second = [
        (tmp_path / f"start-{index}").read_text().splitlines() for index in (0, 1)
    ]
    assert first == second
    assert first == ["localhost:20000", "localhost:20001"]


def test_a_port_is_free_and_none_that_connections_are_given(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        draws = iter([taken.getsockname()[1], 20000, 20001, 20002])
        monkeypatch.setattr(runner.CHANCE, "randrange", lambda *_: next(draws))
        assert 20000 <= runner.free_port() <= 20002
    monkeypatch.undo()
    assert all(runner.free_port() < 32768 for _ in range(20))


def is_there(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return state.rsplit(")", 1)[1].split()[0] != "Z"


def test_children_of_a_dead_process_do_not_outlive_it(tmp_path):
    worker = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])\n"
        "open('child', 'w').write(str(child.pid))\n"
    )
    made = Group((sys.executable, "-S", "-c", worker), ({},), (), str(tmp_path), 0, 5)
    assert runner.supervise(made, tmp_path) == 0
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 50  # the kernel takes its time with a killed process
    while is_there(child):
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.02)


def test_program_that_is_not_there(tmp_path):
    made = Group(("no-such-program",), ({},), (), str(tmp_path), 3, 5)
    with pytest.raises(runner.StepFailed, match="no-such-program"):
        runner.supervise(made, tmp_path)


def test_a_second_supervisor_is_refused(tmp_path):
    made = Group((sys.executable, "-S", "-c", "pass"), ({},), (), str(tmp_path), 0, 5)
    with (
        runner._supervisor_lock(tmp_path) as mine,
        pytest.raises(runner.StepFailed, match="runs already"),
    ):
        assert mine
        runner.supervise(made, tmp_path)
    assert runner.supervise(made, tmp_path) == 0  # the lock goes with its holder


# ---- through the command line ----


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Start `python -m launch` as a user does."""
    monkeypatch.setenv("GVJAX_LAUNCH_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def start(*words):
        return subprocess.Popen(
            [sys.executable, "-m", "launch", *words],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def _job(work, *flags):
    count = len(work[0])
    return (
        *("launch", "--backend", "local", "--name", "job", "--run-dir", "run"),
        *("--accelerator", f"cpu-{count}", "--processes", str(count)),
        *("--env", f"WORK={json.dumps(work)}", *flags),
        *("--", sys.executable, "-S", "-c", WORKER),
    )


def _until(path):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.02)


def test_preemption_of_four_processes_and_the_way_back(launch, tmp_path):
    """SIGTERM: all checkpoint, nothing starts again. Launched anew: goes on to the end."""
    running = launch(*_job([["save"] * 4, [0] * 4]))
    for index in range(4):
        _until(tmp_path / f"ready-0-{index}")
    status = launch("status", "job")
    assert "running under process" in status.communicate(timeout=120)[0]
    running.send_signal(signal.SIGTERM)
    shown, _ = running.communicate(timeout=120)
    assert running.returncode == 85, shown
    assert "again" not in shown
    assert all((tmp_path / f"saved-{index}").exists() for index in range(4))
    status = launch("status", "job")
    assert "last exit code: 85" in status.communicate(timeout=120)[0]
    again = launch(*_job([["save"] * 4, [0] * 4]))
    again.communicate(timeout=120)
    assert again.returncode == 0


def test_stop_reaches_the_supervisor_and_names_are_not_shared(launch, tmp_path):
    running = launch(*_job([["save", "save"]]))
    _until(tmp_path / "ready-0-0")
    _until(tmp_path / "ready-0-1")
    second = launch(*_job([["save", "save"]]))
    assert "runs here already" in second.communicate(timeout=120)[0]
    assert second.returncode == 64
    stop = launch("stop", "job")
    assert "SIGTERM sent" in stop.communicate(timeout=120)[0]
    running.communicate(timeout=120)
    assert running.returncode == 85
    assert (tmp_path / "saved-0").exists()


def test_missing_secret_starts_nothing(launch, tmp_path):
    process = launch(*_job([[0]], "--secret", "NOT_SET_ANYWHERE"))
    assert "NOT_SET_ANYWHERE is not set" in process.communicate(timeout=120)[0]
    assert process.returncode == 64
    assert not (tmp_path / "start-0").exists()


def test_virtual_devices_are_shared_out(launch):
    show = "import os; print(os.environ['JAX_PLATFORMS'], os.environ['XLA_FLAGS'])"
    process = launch(
        *("launch", "--backend", "local", "--name", "job", "--run-dir", "run"),
        *("--accelerator", "cpu-8", "--processes", "2"),
        *("--env", "XLA_FLAGS=--xla_a=1", "--", sys.executable, "-S", "-c", show),
    )
    shown, _ = process.communicate(timeout=120)
    expected = "cpu --xla_a=1 --xla_force_host_platform_device_count=4"
    assert f"[0] {expected}" in shown
    assert f"[1] {expected}" in shown


def test_launching_needs_no_jax(tmp_path):
    """The whole command line, with every backend rendered, on the standard library and PyYAML."""
    code = (
        "import sys, launch.__main__\n"
        "from launch import backends\n"
        "bad = {'jax', 'jaxlib', 'numpy', 'gvjax', 'flax'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
