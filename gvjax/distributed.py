"""Many processes that start together, notice each other's death, and end with a code a supervisor can act on.

The contract with whatever starts the processes (`launch/`, Slurm, a JobSet, a shell):

    code  meaning                                            supervisor
    0     done                                               nothing
    64    user or configuration error                        never restart
    70    crash                                              restart, counted
    71    hang: no step within the watchdog's limit          restart, counted
    85    checkpointed after a preemption notice (SIGTERM)   restart, not counted

    134, 137 and 143 are a peer's or the host's death, 1 whatever Python and faulthandler say so (restart, counted); 2 is
    a command line that was not understood (never restart). The first non-zero code ends the group: SIGTERM, a grace
    period, SIGKILL. SIGTERM alone does not end a process that has called `initialize`: it is the preemption notice, and
    the loop answers it at the next step.

A run calls `initialize` first of all, `assert_same_on_all_hosts` before its first step, `Watchdog.beat` and
`preemption_requested` at every step, and leaves by `exit_with`.
"""

import atexit
import collections
import contextlib
import dataclasses
import faulthandler
import hashlib
import itertools
import json
import logging
import math
import os
import pathlib
import secrets
import selectors
import signal
import socket
import statistics
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from gvjax.usage import ExitCode

logger = logging.getLogger(__name__)


SKYPILOT_PORT = 8476
"""Where process 0 listens when only the nodes' addresses are known."""

CONNECT_TIMEOUT_S = 10.0
"""How long the processes may take to open their lifelines once all have arrived."""

_GOODBYE, _STUCK = b".", b"!"
"""What a process may say to the others before it ends; without a word it is gone."""

_preempted = threading.Event()
_asked = itertools.count(1)
_lifelines: dict[int, socket.socket] = {}
_left: dict["Watchdog", float] = {}
"""Seconds that each watchdog at work has left, when it last looked, until it is too late for a thread to say so."""


@dataclasses.dataclass(frozen=True)
class _Cluster:
    """Where this process stands; None where unknown."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device_ids: Sequence[int] | None = None,
    heartbeat_timeout_s: int = 30,
    shutdown_timeout_s: int = 60,
    initialization_timeout_s: int = 120,
) -> None:
    """Joins this process to the others; call it before anything else touches jax. Calling it twice is harmless.

    Who takes part is taken from the first that says: the arguments; GVJAX_COORDINATOR, GVJAX_NUM_PROCESSES and
    GVJAX_PROCESS_ID; SkyPilot's SKYPILOT_NODE_IPS, SKYPILOT_NUM_NODES and SKYPILOT_NODE_RANK; what jax detects (Cloud
    TPU, Slurm, MPI). Where nobody promises more than one process, this one runs alone.

    With several processes an uncaught exception ends this one at once with code 70, so that the others do not wait for
    it at a barrier; and every process holds a socket to process 0, whose end ends the others too, with code 70: a
    collective may wait for a dead peer until the heartbeat's timeout and beyond. Alone, SIGTERM is made a preemption notice as well (a second one kills).

    Args:
      coordinator: "host:port" of process 0.
      num_processes: >= 1.
      process_id: in [0, num_processes).
      local_device_ids: the devices of this host that are this process'; all by default.
      heartbeat_timeout_s: after how long a silent process counts as dead, and all the others end.
      shutdown_timeout_s: how long a finished process waits for the others to finish.
      initialization_timeout_s: how long to wait for all to arrive.

    Raises:
      ValueError: the sources contradict themselves or leave something out.
      RuntimeError: several processes were promised and this one would run alone.
    """
    if jax.distributed.is_initialized():
        return
    in_main_thread = threading.current_thread() is threading.main_thread()
    cluster, source = _resolve(
        _Cluster(coordinator, num_processes, process_id), os.environ
    )
    promised = cluster.num_processes or _detected_size(os.environ)
    timeouts: dict[str, Any] = {
        "heartbeat_timeout_seconds": heartbeat_timeout_s,
        "shutdown_timeout_seconds": shutdown_timeout_s,
        "initialization_timeout": initialization_timeout_s,
    }
    if cluster.coordinator is not None and cluster.num_processes != 1:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.num_processes,
            cluster.process_id,
            local_device_ids=local_device_ids,
            # All is known: a half-configured Slurm or MPI around us must not fill in anything.
            cluster_detection_method="deactivate",
            **timeouts,
        )
    elif cluster.num_processes is None:
        source = "jax"
        try:
            jax.distributed.initialize(local_device_ids=local_device_ids, **timeouts)
        except (ValueError, RuntimeError) as error:
            # Nothing was detected, or (in a notebook, in a test) jax is in use already. Alone is right then, unless
            # somebody counts on more of us: N independent runs would all write into one directory.
            in_use = isinstance(error, RuntimeError) and jax.default_backend() == "tpu"
            if promised > 1 or "JAX_COORDINATOR_ADDRESS" in os.environ or in_use:
                raise RuntimeError(
                    f"this process was started as one of several, but cannot join them: {error} Call "
                    "gvjax.distributed.initialize() before any other use of jax, or set GVJAX_COORDINATOR, "
                    "GVJAX_NUM_PROCESSES and GVJAX_PROCESS_ID"
                ) from error
            source = "nobody promises more"
    expected = cluster.num_processes or jax.process_count()
    if jax.process_count() != expected or jax.process_count() == 1 < promised:
        raise RuntimeError(
            f"{promised} processes were promised by {source}, but jax sees {jax.process_count()}"
        )
    if jax.process_count() > 1:
        sys.excepthook = _crash
        _open_lifelines(cluster.coordinator, heartbeat_timeout_s)
    elif not jax.distributed.is_initialized() and in_main_thread:
        signal.signal(signal.SIGTERM, _on_sigterm)
    logger.info(
        "process %d of %d (by %s) on %s, pid %d, coordinator %s, %d of %d %s devices",
        jax.process_index(),
        jax.process_count(),
        source,
        socket.gethostname(),
        os.getpid(),
        cluster.coordinator,
        jax.local_device_count(),
        jax.device_count(),
        jax.default_backend(),
    )


def promised() -> int:
    """How many processes the environment says were started together, before any of them has met another.

    A Cloud TPU VM says so only when it is asked, and counts as 1 here.

    Raises:
      ValueError: it contradicts itself or leaves something out.
    """
    cluster, _ = _resolve(_Cluster(), os.environ)
    return cluster.num_processes or _detected_size(os.environ)


def joined() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized()


def assert_same_on_all_hosts(name: str, value: str) -> None:
    """ValueError unless every process has the same config, first batch, or plan. Call before the first step.

    Nothing else would say so: an array that is replicated over processes may silently hold different data on each.

    Args:
      name: for people, e.g. "first batch".
      value: what must be the same, or a digest of it.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    others = np.flatnonzero((digests != digests[0]).any(axis=1)).tolist()
    if others:
        raise ValueError(
            f"the {name} differs between processes: {others} have another than process 0; start all with the same "
            f"command, files and versions (here, process {jax.process_index()}: {value})"
        )


def assert_shared(directory: pathlib.Path) -> None:
    """ValueError unless every process sees what process 0 writes to a directory. Call before anything is kept there.

    A path on each machine's own disk looks the same everywhere, and is found out when a checkpoint is missing.
    """
    if jax.process_count() == 1:
        return
    mark = directory / "seen-by-all"
    if jax.process_index() == 0:
        # Where it cannot be written to is for others to say.
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            mark.touch()
    multihost_utils.sync_global_devices("gvjax.distributed.assert_shared")
    seen = multihost_utils.process_allgather(np.array(mark.exists()))
    if jax.process_index() == 0:
        mark.unlink(missing_ok=True)
    if seen[0] and not seen.all():
        raise ValueError(
            f"run_dir {directory} is not shared: processes {np.flatnonzero(~seen).tolist()} do not see what process 0 "
            "writes there; choose a directory on a file system that all hosts mount"
        )


def batch_digest(batch: Any) -> str:
    """SHA-256, in hex, of a batch's host arrays with their paths, shapes and dtypes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(batch)[0]:
        array = np.ascontiguousarray(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{name} {array.dtype} {np.shape(leaf)}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def from_first(tree: Any) -> Any:
    """What process 0 gives, on every process, as host arrays; the others give arrays of the same shapes and dtypes."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def wait_for_all(where: str) -> None:
    """Until every process has come to this place, which all call by the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"gvjax: {where}")


def preemption_requested() -> bool:
    """Whether to checkpoint and stop now. Call at every step, and equally often on every process.

    A SIGTERM to any one process makes this True on all of them at one and the same call, the next one or the one after
    it. Alone, it is True from the SIGTERM on.
    """
    if jax.distributed.is_initialized():
        # Counted here: the sync point is a number ahead of all that were told so far, and one process may run several
        # loops, each of which begins at step 1.
        return multihost_utils.reached_preemption_sync_point(next(_asked))
    return _preempted.is_set()


def exit_with(code: int) -> NoReturn:
    """Ends this process with a code of the contract.

    After success and after a preemption the usual way, waiting for the other processes; after an error at once, since
    they may be waiting for this one in a collective.
    """
    _flush()
    if jax.distributed.is_initialized() and code not in (
        ExitCode.DONE,
        ExitCode.PREEMPTED,
    ):
        os._exit(code)
    sys.exit(int(code))


class Watchdog:
    """Ends the process with code 71, and every thread's stack on stderr, when steps stop coming.

    Heartbeats between processes cannot see this: they come from a thread of their own and go on while Python is stuck
    in a data loader. Time in which the whole process was stopped (Ctrl-Z and `fg`, a suspended machine) does not count,
    nor do jumps of the wall clock.

    What is stuck and lets no other thread run (a regular expression that backtracks, a C extension) is ended by
    faulthandler after twice the limit, with the stacks and code 1. Its clock, of which a process has one, runs on while
    the process is stopped by SIGSTOP out of the blue; with SIGTSTP first, as from Ctrl-Z, it does not, where the watchdog
    was entered in the main thread. A Python whose locks wait by the wall clock does without. Use as a context manager around the loop:

        with Watchdog() as watchdog:
            for step in ...:
                ...
                watchdog.beat(step)

    Args:
      floor_s: the limit is never below this many seconds.
      factor: the limit is this many times the median time of the last steps, if that is more.
      first_s: the limit until the second beat: the first step contains the compilation.
    """

    def __init__(
        self, *, floor_s: float = 600.0, factor: float = 10.0, first_s: float = 3600.0
    ):
        for name, value in (
            ("floor_s", floor_s),
            ("factor", factor),
            ("first_s", first_s),
        ):
            if value <= 0:
                raise ValueError(f"{name} {value} must be greater than 0")
        self._floor_s = floor_s
        self._factor = factor
        self._first_s = first_s
        self._durations: collections.deque[float] = collections.deque(maxlen=101)
        self._step: int | None = None
        self._last = time.monotonic()
        self._paused = 0
        self._paused_limit: float | None = None
        self._untimed = True
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        self._last = time.monotonic()
        self._thread = threading.Thread(
            target=self._watch, name="watchdog", daemon=True
        )
        self._thread.start()
        _heed_suspension()
        self._look(self._last)
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        _left.pop(self, None)
        _arm_backstop()

    def beat(self, step: int) -> None:
        """Says that a step has finished."""
        now = time.monotonic()
        # The interval that held the start, or a pause, says nothing about how long a step takes.
        if not self._untimed:
            self._durations.append(now - self._last)
        self._step, self._last, self._untimed = step, now, False

    @contextlib.contextmanager
    def paused(self, limit_s: float | None = None) -> Iterator[None]:
        """While inside, another limit holds, or none: an evaluation, another compilation, a long save."""
        before, self._paused_limit = self._paused_limit, limit_s
        self._last = time.monotonic()
        self._paused += 1
        self._look(self._last)
        try:
            yield
        finally:
            self._untimed, self._last = True, time.monotonic()
            self._paused -= 1
            self._paused_limit = before
            self._look(self._last)

    @property
    def limit_s(self) -> float:
        """Seconds without a beat after which the process ends."""
        if self._paused:
            return math.inf if self._paused_limit is None else self._paused_limit
        if not self._durations:
            return max(self._first_s, self._floor_s)
        # A copy, since the loop's thread may append meanwhile.
        return max(
            self._factor * statistics.median(self._durations.copy()), self._floor_s
        )

    def _look(self, now: float) -> tuple[float, float]:
        """(limit, seconds without a beat), and what holds if no thread should come to look again."""
        limit, idle = self.limit_s, now - self._last
        if self._thread is not None:
            _left[self] = 2 * limit - idle
            _arm_backstop()
        return limit, idle

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._stop.wait(nap := min(1.0, self.limit_s / 10)):
            now = time.monotonic()
            # Slept through: the whole process was stopped (Ctrl-Z, a suspended machine), and nobody was stuck meanwhile.
            if (lost := now - looked - nap) > max(nap, 1.0):
                self._last = min(self._last + lost, now)
            looked = now
            limit, idle = self._look(now)
            if idle <= limit:
                continue
            print(
                f"watchdog: no step for {idle:.1f} s (limit {limit:.1f} s) since step {self._step} on process "
                f"{os.getpid()} of {socket.gethostname()}; the stack of every thread follows, then exit "
                f"{int(ExitCode.HANG)}",
                file=sys.stderr,
                flush=True,
            )
            _leave_stuck()


def _arm_backstop() -> None:
    """Has C code end the process unless this is called again in time, which takes a thread that gets to run."""
    # Threads may each have a watchdog; the process has one such clock.
    left = min(_left.values(), default=math.inf)
    faulthandler.cancel_dump_traceback_later()
    # Built for an older C library, Python waits by the wall clock, which jumps when a machine was suspended.
    monotonic = sysconfig.get_config_var("HAVE_SEM_CLOCKWAIT")
    if monotonic and left < threading.TIMEOUT_MAX:
        # What is late already, its own watchdog ends.
        faulthandler.dump_traceback_later(max(left, 1.0), exit=True, file=2)


def _leave_stuck() -> NoReturn:
    """Tells the others, since it may be one of them that all wait for, and theirs the stack that says for what."""
    _say(_STUCK)
    faulthandler.dump_traceback(file=2, all_threads=True)
    _flush()
    os._exit(ExitCode.HANG)


def _resolve(
    given: _Cluster, environment: Mapping[str, str]
) -> tuple[_Cluster, str | None]:
    """The first source that says anything about the cluster, complete, and its name."""
    ips = environment.get("SKYPILOT_NODE_IPS", "").split()
    for source, cluster in (
        ("arguments", given),
        (
            "GVJAX_* variables",
            _Cluster(
                environment.get("GVJAX_COORDINATOR"),
                _integer(environment, "GVJAX_NUM_PROCESSES"),
                _integer(environment, "GVJAX_PROCESS_ID"),
            ),
        ),
        (
            "SKYPILOT_* variables",
            _Cluster(
                f"{ips[0]}:{SKYPILOT_PORT}" if ips else None,
                _integer(environment, "SKYPILOT_NUM_NODES"),
                _integer(environment, "SKYPILOT_NODE_RANK"),
            ),
        ),
    ):
        fields = dataclasses.asdict(cluster)
        if all(value is None for value in fields.values()):
            continue
        count = cluster.num_processes
        if count == 1 and not cluster.process_id:
            return cluster, source
        missing = [name for name, value in fields.items() if value is None]
        if missing:
            raise ValueError(
                f"{source} leave out {' and '.join(missing)}: coordinator (host:port), num_processes and process_id are "
                "given together"
            )
        if count is None or count < 1 or not 0 <= (cluster.process_id or 0) < count:
            raise ValueError(
                f"{source} say process_id {cluster.process_id} of num_processes {count}; ids run from 0 to "
                "num_processes - 1"
            )
        if ":" not in (cluster.coordinator or ""):
            raise ValueError(
                f"{source} say coordinator {cluster.coordinator!r}; it must be host:port"
            )
        return cluster, source
    return _Cluster(), None


def _detected_size(environment: Mapping[str, str]) -> int:
    """How many processes a launcher that jax knows says it has started; 1 where none says so."""
    sizes = [
        _integer(environment, name) or 1
        for name in (
            "SLURM_STEP_NUM_TASKS",
            "OMPI_COMM_WORLD_SIZE",
            "MEGASCALE_NUM_SLICES",
        )
    ]
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return max(*sizes, len(hosts))


def _integer(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if value is None or value == "":
        return None
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name}={value!r} must be an integer") from None


def _heed_suspension() -> None:
    """Has SIGTSTP, of Ctrl-Z or of a batch system that suspends, stop the backstop's clock with the process."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:
        signal.signal(signal.SIGTSTP, _on_sigtstp)


def _on_sigtstp(number, frame) -> None:
    # The watchdogs set it again when the process goes on.
    faulthandler.cancel_dump_traceback_later()
    # The kernel decides whether to stop: a group that nobody could bring back goes on.
    signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTSTP)
    signal.signal(signal.SIGTSTP, _on_sigtstp)


def _on_sigterm(number, frame) -> None:
    _preempted.set()
    # The next one means it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _open_lifelines(coordinator: str | None, heartbeat_timeout_s: int) -> None:
    """A socket between process 0 and each other one; the kernel closes it however a process dies."""
    me, count = jax.process_index(), jax.process_count()
    listener = None
    note = np.zeros(512, np.uint8)
    if me == 0:
        listener = socket.create_server(("", 0), backlog=count)
        text = json.dumps(
            {
                "host": socket.gethostname(),
                "port": listener.getsockname()[1],
                "token": secrets.token_hex(16),
            }
        ).encode()
        note[: len(text)] = np.frombuffer(text, np.uint8)
    text = np.asarray(multihost_utils.broadcast_one_to_all(note)).tobytes()
    where = json.loads(text.rstrip(b"\0"))
    token = where["token"].encode()
    lines: dict[int, socket.socket] = {}
    failure = "not all have connected"
    try:
        if listener is not None:
            lines = _accept(listener, token, count - 1)
        else:
            host = coordinator.rsplit(":", 1)[0] if coordinator else where["host"]
            address = (host.strip("[]"), where["port"])
            line = socket.create_connection(address, CONNECT_TIMEOUT_S)
            line.sendall(token + me.to_bytes(4, "big"))
            lines = {0: line}
    except OSError as error:
        failure = str(error)
    finally:
        if listener is not None:
            listener.close()
    complete = len(lines) == (count - 1 if me == 0 else 1)
    if not multihost_utils.process_allgather(np.array(complete)).all():
        logger.warning(
            "no lifeline to every process (%s): the death of one may be noticed only after the heartbeat's %d s",
            "" if complete else failure,
            heartbeat_timeout_s,
        )
        for line in lines.values():
            line.close()
        return
    for line in lines.values():
        line.settimeout(None)
    _lifelines.update(lines)
    # Registered after jax' own, so it runs before jax waits at exit for all to finish.
    atexit.register(_say_goodbye)
    threading.Thread(target=_watch_lifelines, name="lifelines", daemon=True).start()


def _accept(
    listener: socket.socket, token: bytes, count: int
) -> dict[int, socket.socket]:
    lines: dict[int, socket.socket] = {}
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while len(lines) < count and (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        line, _ = listener.accept()
        line.settimeout(1.0)
        # Anybody may knock at an open port; only the other processes know the token.
        hello = b""
        with contextlib.suppress(TimeoutError):
            while len(hello) < len(token) + 4 and (part := line.recv(64)):
                hello += part
        if len(hello) == len(token) + 4 and secrets.compare_digest(hello[:-4], token):
            lines[int.from_bytes(hello[-4:], "big")] = line
        else:
            line.close()
    return lines


def _watch_lifelines() -> None:
    selector = selectors.DefaultSelector()
    for process, line in _lifelines.items():
        selector.register(line, selectors.EVENT_READ, process)
    while selector.get_map():
        for key, _ in selector.select():
            try:
                last_word = _lifelines[key.data].recv(1)
            except OSError:
                last_word = b""
            if last_word == _GOODBYE:
                selector.unregister(key.fileobj)
                continue
            if last_word == _STUCK:
                print(
                    f"process {jax.process_index()} leaves, because process {key.data} sees no step; the stack of every "
                    "thread follows",
                    file=sys.stderr,
                    flush=True,
                )
                _leave_stuck()
            print(
                f"process {jax.process_index()} leaves, because process {key.data} is gone",
                file=sys.stderr,
                flush=True,
            )
            _flush()
            os._exit(ExitCode.CRASH)


def _say_goodbye() -> None:
    _say(_GOODBYE)


def _say(word: bytes) -> None:
    for line in _lifelines.values():
        with contextlib.suppress(OSError):
            line.sendall(word)


def _crash(kind, error, trace) -> None:
    """The excepthook: leave before the barrier at exit, where peers stuck in a collective would never arrive."""
    print(f"process {jax.process_index()} of {jax.process_count()}:", file=sys.stderr)
    traceback.print_exception(kind, error, trace)
    _flush()
    os._exit(
        ExitCode.INTERRUPTED if issubclass(kind, KeyboardInterrupt) else ExitCode.CRASH
    )


def _flush() -> None:
    for handler in logging.getLogger().handlers:
        handler.flush()
    for stream in (sys.stdout, sys.stderr):
        # A closed pipe must not keep the process from ending.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
