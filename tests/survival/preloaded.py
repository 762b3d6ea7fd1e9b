"""`gvjax` in processes that start in a blink: one Python that has imported everything forks for each of them.

Run as a program this is that Python: a line of JSON on stdin starts a process, a line on stdout says how one ended.
jax has been imported there but not used, so each process chooses its own devices and joins its own group. Programs are
compiled once and found again in a cache on disk.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from typing import Any

HERE = pathlib.Path(__file__)


class Preloaded:
    """Starts `gvjax` commands, in one directory."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "COLUMNS": "200",
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self._server = subprocess.Popen(
            [sys.executable, str(HERE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=directory,
        )
        self._codes: dict[int, int] = {}
        self._unread = b""
        self._started = 0

    def start(
        self,
        *argv: str,
        act: Any = None,
        env: dict[str, str] | None = None,
        cwd: pathlib.Path | str = ".",
    ) -> "Process":
        """A process that runs `gvjax argv`, with faults of `ACTS` built in."""
        self._started += 1
        name = f"process-{self._started}"
        order = {
            "argv": argv,
            "act": act,
            "env": env or {},
            "name": name,
            "cwd": str(cwd),
        }
        self._server.stdin.write(json.dumps(order).encode() + b"\n")
        self._server.stdin.flush()
        while "pid" not in (news := self._hear()):
            pass
        # Numbers come round again: how an earlier one of this number ended is not how this one does.
        self._codes.pop(news["pid"], None)
        return Process(self, news["pid"], self.directory / name)

    def group(
        self,
        count: int,
        *argv: str | list[str],
        act: Any = None,
        on: int | None = None,
        env: dict[str, str] | None = None,
        started: int | None = None,
    ) -> list["Process"]:
        """Processes that run one command together.

        Args:
          count: how many each is told that there are.
          argv: the command; or a list for each process, which has its own.
          act: a fault, built into all, or into number `on` alone.
          env: more environment.
          started: how many of them start; all by default.
        """
        # As a program, this file does not find what lies beside the package.
        from launch.runner import free_port

        group = {
            "GVJAX_COORDINATOR": f"localhost:{free_port()}",
            "GVJAX_NUM_PROCESSES": str(count),
            **(env or {}),
        }
        own = isinstance(argv[0], list)
        return [
            self.start(
                *(argv[index] if own else argv),
                act=act if on in (None, index) else None,
                env={**group, "GVJAX_PROCESS_ID": str(index)},
            )
            for index in range(count if started is None else started)
        ]

    def code_of(self, pid: int, timeout: float) -> int | None:
        deadline = time.monotonic() + timeout
        while pid not in self._codes:
            if self._hear(max(deadline - time.monotonic(), 0)) is None:
                return None
        return self._codes[pid]

    def _hear(self, timeout: float | None = None) -> dict[str, int] | None:
        """The next news; None if there are none in time. Two may come at once, and are then read one by one."""
        out = self._server.stdout.fileno()
        while b"\n" not in self._unread:
            # Read without Python's buffer, into which select cannot look.
            if not select.select([out], [], [], timeout)[0]:
                return None
            part = os.read(out, 65536)
            assert part, "the preloaded process is gone"
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        news = json.loads(line)
        if "code" in news:
            self._codes[news["ended"]] = news["code"]
        return news

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=120)
        self._server.stdout.close()


class Process:
    """One of them. Codes are as subprocess has them: -9 is SIGKILL."""

    def __init__(self, preloaded: Preloaded, pid: int, place: pathlib.Path):
        self.pid = pid
        self._preloaded = preloaded
        self.place = place

    def wait(self, timeout: float = 300) -> int:
        code = self._preloaded.code_of(self.pid, timeout)
        if code is None:
            self.kill()
            raise AssertionError(f"still there after {timeout} s:\n{self.said()}")
        return code

    def said(self) -> str:
        """What it has printed: nothing before it has begun."""
        out = self.place.with_suffix(".out")
        return out.read_text() if out.exists() else ""

    def reached(self, step: int, timeout: float = 300) -> None:
        """Waits until it has made so many rounds of its run."""
        deadline = time.monotonic() + timeout
        beats = self.place.with_suffix(".beats")
        while not beats.exists() or os.path.getsize(beats) < step:
            gone = self._preloaded.code_of(self.pid, 0.01)
            assert gone is None, f"ended with {gone}:\n{self.said()}"
            assert time.monotonic() < deadline, self.said()

    def said_within(self, text: str, timeout: float = 300) -> None:
        """Waits until it has printed a text."""
        deadline = time.monotonic() + timeout
        while text not in self.said():
            gone = self._preloaded.code_of(self.pid, 0.01)
            assert gone is None, f"ended with {gone}:\n{self.said()}"
            assert time.monotonic() < deadline, self.said()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._preloaded.code_of(self.pid, 10)


# In the processes.


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(seconds: float) -> None:
    timer = threading.Timer(seconds, die)
    timer.daemon = True
    timer.start()


def at_call(owner: Any, name: str, number: int, do, *, after: bool = False) -> None:
    """Has `do()` called before, or after, the call of that number of a function."""
    plain, calls = getattr(owner, name), []

    def counted(*arguments, **options):
        calls.append(None)
        if len(calls) == number and not after:
            do()
        result = plain(*arguments, **options)
        if len(calls) == number and after:
            do()
        return result

    setattr(owner, name, counted)


def kill_at_round(number: int) -> None:
    from gvjax import distributed

    at_call(distributed.Watchdog, "beat", number, die)


def kill_in_rollout(number: int) -> None:
    """Sampled, and not yet scored or learned from."""
    from gvjax.recipes import best_of_n, hypo, rounds

    for module, name in ((rounds, "draw"), (hypo, "draw"), (best_of_n, "sample_all")):
        at_call(module, name, number, die, after=True)


def kill_in_save(number: int, seconds: float) -> None:
    """So long after a save began, which goes on in the background."""
    from gvjax.checkpoint import Checkpoints

    at_call(Checkpoints, "save", number, lambda: die_in(seconds))


def kill_at_time(seconds: float) -> None:
    """So long after the first round."""
    from gvjax import distributed

    at_call(distributed.Watchdog, "beat", 1, lambda: die_in(seconds))


def kill_at_end(before: str) -> None:
    """With the training done: before its parameters, or before its result, are kept."""
    from gvjax.recipes import loop, single

    owner, name = {"params": (loop, "save_params"), "result": (single, "_finish")}[
        before
    ]
    at_call(owner, name, 1, die)


def kill_after_stage(number: int) -> None:
    from gvjax.gap import stages

    at_call(stages.Store, "finish", number, die, after=True)


def stuck_data(number: int) -> None:
    """A loader that does not come back."""
    from gvjax.tasks.tour import Tour

    def stuck() -> None:
        time.sleep(1000)

    at_call(Tour, "demonstrations", number, stuck)


def slow_rounds(seconds: float) -> None:
    from gvjax import distributed

    plain = distributed.Watchdog.beat

    def beat(self, step):
        plain(self, step)
        time.sleep(seconds)

    distributed.Watchdog.beat = beat


def without_privileges(_: None) -> None:
    """Without the capabilities of root, for whom no permission is missing; still the owner of its files."""
    version_3, this_process = 0x20080522, 0
    header = (ctypes.c_uint32 * 2)(version_3, this_process)
    none = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def jumping_clock(_: None) -> None:
    """The wall clock jumps ahead by a year, and back by two."""
    from gvjax import distributed

    plain, ahead = time.time, [0.0]
    time.time = lambda: plain() + ahead[0]
    at_call(distributed.Watchdog, "beat", 5, lambda: ahead.append(ahead.pop() + 3e7))
    at_call(distributed.Watchdog, "beat", 7, lambda: ahead.append(ahead.pop() - 6e7))


def full_disk(first: int, last: int) -> None:
    """From one round to another nothing more fits on the disk that the process stands on."""
    from gvjax import distributed

    def fill() -> None:
        with (
            open("ballast", "wb", buffering=0) as ballast,
            contextlib.suppress(OSError),
        ):
            while True:
                ballast.write(b"." * 4096)

    at_call(distributed.Watchdog, "beat", first, fill)
    at_call(distributed.Watchdog, "beat", last, lambda: os.remove("ballast"))


def own_code(_: None) -> None:
    """Modules in the working directory can be imported."""
    sys.path.insert(0, os.getcwd())


ACTS = {
    act.__name__: act
    for act in (
        kill_at_round,
        kill_in_rollout,
        kill_in_save,
        kill_at_time,
        kill_at_end,
        kill_after_stage,
        stuck_data,
        slow_rounds,
        without_privileges,
        jumping_clock,
        full_disk,
        own_code,
    )
}


def become(order: dict[str, Any]) -> int:
    """What a forked process does; returns its exit code."""
    place = pathlib.Path(order["name"]).absolute()
    out = os.open(place.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    from gvjax import __main__, distributed

    beats = place.with_suffix(".beats").open("wb", buffering=0)
    plain = distributed.Watchdog.beat

    def beat(self, step):
        plain(self, step)
        beats.write(b".")

    distributed.Watchdog.beat = beat
    for name, argument in order["act"] or ():
        if isinstance(argument, list):
            ACTS[name](*argument)
        else:
            ACTS[name](argument)
    argv = order["argv"]
    while "+" in argv:
        # Several commands, one after the other, as long as all goes well.
        at = argv.index("+")
        if code := __main__.main(argv[:at]):
            return code
        argv = argv[at + 1 :]
    return __main__.main(argv)


def serve() -> None:
    for name in ("gvjax.commands", "tensorboardX.event_file_writer"):
        importlib.import_module(name)
    # Their lives are short: collecting garbage would be a quarter of the time that they trace programs.
    gc.collect()
    gc.freeze()
    gc.disable()
    children: set[int] = set()
    orders = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.005 if children else None)
        if ready:
            # Read without Python's buffer, into which select cannot look.
            part = os.read(0, 65536)
            if not part:
                break
            orders += part
        while b"\n" in orders:
            line, _, orders = orders.partition(b"\n")
            order = json.loads(line)
            pid = os.fork()
            if pid == 0:
                code = 70
                try:
                    code = become(order)
                except SystemExit as leaving:
                    code = leaving.code or 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    if code in (0, 85):
                        # As at the end of any program: jax waits here for the other processes.
                        atexit._run_exitfuncs()
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            children.add(pid)
            print(json.dumps({"pid": pid}), flush=True)
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                children.discard(pid)
                code = os.waitstatus_to_exitcode(status)
                print(json.dumps({"ended": pid, "code": code}), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
