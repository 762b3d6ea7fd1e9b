"""The one executor: writes a plan's files, runs its steps in order, and keeps local processes alive by the exit codes.

Nothing here knows a platform: what to run is in the plan, and what was printed by `--dry-run` is what runs.
"""

import contextlib
import fcntl
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from launch import plan as plan_lib
from launch import spec as spec_lib
from launch.plan import Command, Group, Plan, Saved, Step, Supervisor, Wait

PAUSE = 1.0
"""Seconds before a local group starts again, so that one which dies at once does not fill the log."""

RETRY_AFTER = 15.0
"""Seconds between the tries of a command that has several."""


STOPPED = "stopped"
"""The file that `stop` leaves in the job's directory, so that a watch elsewhere does not bring the job back."""


class StepFailed(Exception):
    """A step did not work out; `code` is the exit code to end with."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def run(plan: Plan, directory: Path, watch: bool = False) -> int:
    """Execute `plan` in `directory`, the job's own.

    Args:
      watch: stay and follow the job through preemptions, where the plan says how.

    Returns:
      the exit code: a local group's or watched job's own; otherwise 0, or that of the command that failed.
    """
    missing = [name for name in plan.secrets if name not in os.environ]
    if missing:
        names = ", ".join(missing)
        _say(f"secret {names} is not set here; `export {missing[0]}=...` first")
        return spec_lib.USER_ERROR
    directory.mkdir(parents=True, exist_ok=True)
    for file in plan.files:
        (directory / file.path).write_text(file.text)
    try:
        code = _steps(plan.steps, directory, plan.secrets)
        if watch and plan.watch is not None:
            code = _follow(plan.watch, directory, plan.secrets)
    except StepFailed as failure:
        _say(str(failure))
        return failure.code
    except KeyboardInterrupt:
        return 130
    return code


def _say(message: str) -> None:
    print(f"launch: {message}", file=sys.stderr, flush=True)


def _steps(steps: tuple[Step, ...], directory: Path, secrets: tuple[str, ...]) -> int:
    code = 0
    for number, step in enumerate(steps, start=1):
        match step:
            case Command():
                _say(f"{number}/{len(steps)} {step.why}")
                _run(step, directory, secrets)
            case Wait():
                _say(f"{number}/{len(steps)} waiting for {step.until}")
                _wait(step, directory)
            case Group():
                code = supervise(step, directory)
            case Supervisor():
                code = _ask_supervisor(step.action, directory)
    return code


def _words(command: Command, directory: Path) -> list[str]:
    words = []
    for word in command.argv:
        if isinstance(word, Saved):
            path = directory / word.path
            if not path.exists():
                raise StepFailed(
                    f"{path} is not there: was this job launched from here?"
                )
            word = path.read_text().strip()
        words.append(word)
    return words


def _start(command: Command, directory: Path, stdout: int | IO | None = None):
    words = _words(command, directory)
    try:
        return subprocess.run(words, cwd=directory, stdout=stdout, text=True)
    except FileNotFoundError:
        raise StepFailed(
            f"{words[0]} is not installed here, or not on PATH", 127
        ) from None


def _run(command: Command, directory: Path, secrets: tuple[str, ...]) -> None:
    shown = plan_lib.redact(plan_lib.shell(command.argv), secrets, os.environ)
    for attempt in range(1, command.tries + 1):
        if command.save is None:
            result = _start(command, directory)
        else:
            result = _start(command, directory, stdout=subprocess.PIPE)
            if result.returncode == 0:
                (directory / command.save).write_text(result.stdout)
        if result.returncode == 0:
            return
        if attempt < command.tries:
            _say(f"that failed; try {attempt + 1} of {command.tries} follows")
            time.sleep(RETRY_AFTER)
    if command.may_fail:
        _say(f"that failed with exit code {result.returncode}, and may")
        return
    raise StepFailed(
        f"exit code {result.returncode} from: {shown}", max(result.returncode, 1)
    )


def _output(command: Command, directory: Path) -> str | None:
    """What `command` printed, stripped; None if it failed."""
    result = _start(command, directory, stdout=subprocess.PIPE)
    return result.stdout.strip() if result.returncode == 0 else None


def _wait(step: Wait, directory: Path) -> None:
    last = None
    while True:
        state = _output(step.command, directory)
        if state != last:
            _say(f"state: {state or 'unknown'}")
            last = state
        if state == step.until:
            return
        if state in step.never:
            raise StepFailed(
                f"{state} instead of {step.until}; `stop` and launch again"
            )
        time.sleep(step.every)


def _follow(watch: plan_lib.Watch, directory: Path, secrets: tuple[str, ...]) -> int:
    unknown = 0
    while True:
        state = _output(watch.state, directory)
        ended = None if state is None else _output(watch.ended, directory)
        if (directory / STOPPED).exists():
            _say("the job was stopped")
            return 0
        unknown = unknown + 1 if state is None else 0
        if unknown > 5:
            raise StepFailed("the machines are not there any more, nor their state")
        if state in watch.lost or ended in watch.lost:
            _say(f"the machines are gone ({state}); asking for new ones")
            _steps(watch.recover, directory, secrets)
        elif ended is not None and ended.isdigit():
            _say(f"the job has ended with exit code {ended}")
            _steps(watch.release, directory, secrets)
            return int(ended)
        time.sleep(watch.every)


# ---- local processes ----


CHANCE = random.SystemRandom()
"""No seed of a program's own makes two of them draw alike."""


def free_port() -> int:
    """One that nobody holds, below those (from 32768 on) that the kernel gives to connections before it is bound."""
    while True:
        port = CHANCE.randrange(20000, 32768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


class _Running:
    """One start of a group: its processes, their log threads, and their exit codes in the order they came."""

    def __init__(self, group: Group, log: IO[str], lock: threading.Lock):
        port = str(free_port())
        self.exits: queue.Queue[tuple[int, int]] = queue.Queue()
        self.processes: list[subprocess.Popen] = []
        self.threads: list[threading.Thread] = []
        for index, extra in enumerate(group.environments):
            environment = dict(os.environ)
            environment |= {k: v.replace("{port}", port) for k, v in extra.items()}
            # A block-buffered log would show nothing until the end; and a session of its own keeps Ctrl-C and the
            # children of a killed process in our hands.
            environment.setdefault("PYTHONUNBUFFERED", "1")
            process = subprocess.Popen(
                group.argv,
                env=environment,
                cwd=group.workdir or None,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self.processes.append(process)
            for work in (self._copy, self._await):
                thread = threading.Thread(
                    target=work, args=(index, process, log, lock), daemon=True
                )
                thread.start()
                self.threads.append(thread)

    def _copy(self, index, process, log, lock):
        for line in process.stdout:
            text = f"[{index}] {line.rstrip()}\n"
            with lock:
                sys.stdout.write(text)
                sys.stdout.flush()
                log.write(text)
                log.flush()

    def _await(self, index, process, log, lock):
        code = process.wait()
        self.exits.put((index, 128 - code if code < 0 else code))

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)

    def kill_leftovers(self) -> None:
        """SIGKILL whatever the processes started and left behind."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for thread in self.threads:
            thread.join(timeout=5)


def supervise(group: Group, directory: Path) -> int:
    """Start the group, and again as its exit codes say, until it is done, hopeless, or told to stop.

    The first non-zero exit code decides for all: it ends the group (SIGTERM, grace, SIGKILL), 85 starts it again
    uncounted, 64 and 2 never, anything else up to `retries` times. SIGTERM or SIGINT to this process is passed on, and
    nothing is started after it.

    Returns:
      0, or the exit code that decided last.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _supervisor_lock(directory) as mine:
        if not mine:
            raise StepFailed(
                f"a job of this name runs already (see {directory}); stop it or take another name",
                spec_lib.USER_ERROR,
            )
        (directory / "exit_code").unlink(missing_ok=True)
        stop = threading.Event()
        with _signals(stop), (directory / "log").open("a") as log:
            code = _keep_alive(group, log, stop)
        (directory / "exit_code").write_text(f"{code}\n")
    return code


def _keep_alive(group: Group, log: IO[str], stop: threading.Event) -> int:
    lock = threading.Lock()
    failures = 0
    while True:
        try:
            running = _Running(group, log, lock)
        except OSError as error:
            raise StepFailed(
                f"cannot start {group.argv[0]!r}: {error.strerror}", spec_lib.USER_ERROR
            ) from None
        code = _until_exit(running, group.grace, stop)
        if stop.is_set() or code in (spec_lib.DONE, *spec_lib.HOPELESS):
            return code
        if code != spec_lib.PREEMPTED:
            failures += 1
            if failures > group.retries:
                _say(f"exit code {code}; no restarts left of {group.retries}")
                return code
        _say(f"exit code {code}; again (failures: {failures} of {group.retries})")
        if stop.wait(PAUSE):
            return code


def _until_exit(running: _Running, grace: float, stop: threading.Event) -> int:
    """Wait for every process; the first that fails, or `stop`, ends the others."""
    left, decided, deadline = len(running.processes), 0, None
    while left:
        try:
            index, code = running.exits.get(timeout=0.1)
        except queue.Empty:
            pass
        else:
            left -= 1
            if code:
                _say(f"process {index} ended with exit code {code}")
                decided = decided or code
        if left and deadline is None and (decided or stop.is_set()):
            running.signal(signal.SIGTERM)
            deadline = time.monotonic() + grace
        if left and deadline is not None and time.monotonic() > deadline:
            _say(f"{left} processes outlived the {grace:g} s of grace: SIGKILL")
            running.signal(signal.SIGKILL)
            deadline = float("inf")
    running.kill_leftovers()
    return decided


@contextlib.contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python takes signals in its main thread alone
        return
    before = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _supervisor_lock(directory: Path) -> Iterator[bool]:
    """Hold the lock that says a supervisor is alive; False if another process holds it.

    A lock, and not the number in the file alone: it vanishes with its process, and a number is given out again.
    """
    with (directory / "supervisor.pid").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield True


def supervisor_pid(directory: Path) -> int | None:
    """The process that supervises the job of `directory`; None when there is none."""
    path = directory / "supervisor.pid"
    if not path.exists():
        return None
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(file.read())
    return None


def _ask_supervisor(action: str, directory: Path) -> int:
    pid = supervisor_pid(directory)
    if pid is None:
        ended = directory / "exit_code"
        code = ended.read_text().strip() if ended.exists() else "unknown"
        print(f"not running; last exit code: {code}")
    elif action == "status":
        print(f"running under process {pid}; log: {directory / 'log'}")
    else:
        os.kill(pid, signal.SIGTERM)
        print(f"SIGTERM sent to process {pid}; it ends when its group has checkpointed")
    return 0


def state_directory(name: str, environ: Mapping[str, str]) -> Path:
    """Where a job's files live on this machine: $GVJAX_LAUNCH_STATE, or the user's state directory."""
    root = environ.get("GVJAX_LAUNCH_STATE")
    if not root:
        state = environ.get("XDG_STATE_HOME") or os.path.join(
            environ.get("HOME", "~"), ".local", "state"
        )
        root = os.path.join(os.path.expanduser(state), "gvjax", "launch")
    return Path(root).absolute() / name
