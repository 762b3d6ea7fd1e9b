"""Stages of a study: each is done once, and kept under the hash of everything it depends on.

Stages are shared out to worker processes that this one starts; or, where several processes were started together, all of
them do each stage together, over the devices of all. Of those the first alone writes, and says what is done: what it sees on
a shared disk, another one may see later. A process does one stage at a time, or those of several seeds in lanes.
"""

import ast
import contextlib
import dataclasses
import datetime
import functools
import gc
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import gvjax
from gvjax import checkpoint, distributed, lanes, runtime
from gvjax.gap.results import write_whole
from gvjax.recipes.loop import PreemptedError

try:
    import fcntl
except ImportError:  # pragma: no cover - not on Windows
    fcntl = None  # type: ignore[assignment]

Report = Callable[[int, int, Mapping[str, float]], None]
"""`(done, total, shown)`: how far a stage is."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One piece of work.

    Attributes:
      kind: which function does it.
      place: (seed, task number, arm, trial) it belongs to.
      label: for people, e.g. "tour seed 3: DPO 1".
      inputs: JSON that determines the result together with the parents and the code.
      parents: stages that must be done first.
      cost: expected floating-point operations, for the progress bar.
      code: fingerprint of the code that does it.
    """

    kind: str
    place: tuple[int, int, str, int]
    label: str
    inputs: dict[str, Any]
    parents: tuple["Stage", ...]
    cost: float
    code: str

    @functools.cached_property
    def key(self) -> str:
        """20 hex digits that change when anything the result depends on does."""
        content = {
            "kind": self.kind,
            "inputs": self.inputs,
            "parents": [parent.key for parent in self.parents],
            "code": self.code,
        }
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


class StageError(RuntimeError):
    """A stage failed; the message names it and holds the traceback."""


class BusyError(RuntimeError):
    """Another process is working in the same directory."""


@dataclasses.dataclass(frozen=True)
class Store:
    """Where stages keep their files: `<root>/<kind>-<key>/`, done once `result.json` stands there."""

    root: pathlib.Path

    def directory(self, stage: Stage) -> pathlib.Path:
        return self.root / f"{stage.kind}-{stage.key}"

    def is_done(self, stage: Stage) -> bool:
        return (self.directory(stage) / "result.json").exists()

    def result(self, stage: Stage) -> dict[str, Any]:
        """What the stage returned."""
        return json.loads((self.directory(stage) / "result.json").read_text())

    def started(self) -> str:
        """When the first work began here, ISO 8601, UTC: noted once, so that gathering again changes nothing.

        Of several processes the first is to ask first.
        """
        path = self.root / "started"
        if not path.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            now = datetime.datetime.now(datetime.UTC)
            path.write_text(now.isoformat(timespec="seconds"))
        return path.read_text()

    def finish(self, stage: Stage, result: Mapping[str, Any]) -> None:
        """Marks a stage as done, in one piece: a crash leaves it undone or done, nothing between."""
        path = self.directory(stage) / "result.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"label": stage.label, **result}))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes out of this directory while inside; of several that work together the first holds it.

        Raises:
          BusyError: one is already there.
        """
        if jax.process_index() != 0:
            yield
            return
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("w") as lock:
            if fcntl is not None:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise BusyError(
                        f"another process works in {self.root}; wait for it, or choose another run_dir"
                    ) from None
            yield


_SHOWING = (
    "advice",
    "bounds",
    "calibration",
    "choices",
    "contrasts",
    "figures",
    "findings",
    "gap_figures",
    "gap_report",
    "likelihoods",
    "numbers",
    "pilot",
    "premises",
    "report",
    "weighing",
)
"""Modules of gvjax.gap that look at results and make none."""


@functools.cache
def code_fingerprint() -> str:
    """A hash of the code that results depend on: comments, docstrings and the showing of results do not count."""
    root = pathlib.Path(gvjax.__file__).parent
    shown = (
        "__main__.py",
        "usage.py",
        *(f"gap/{name}.py" for name in _SHOWING),
    )
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name in shown or name.startswith(("verify/", "tabular/")):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                # A string standing alone is a docstring: it computes nothing.
                node.body = [each for each in body if not _is_text(each)]  # type: ignore[attr-defined]
        digest.update(f"{name}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:16]


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


@functools.cache
def versions() -> dict[str, str]:
    """Of what this process computes with, and the device. They are kept with every result, and not in its key: another version
    of jax rounds otherwise, and `gvjax run` goes on with it too."""
    packages = ("gvjax", "jax", "jaxlib", "flax", "optax", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {
        **found,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


def versions_behind(stages: Iterable[Stage], store: Store) -> dict[str, str]:
    """Of all that computed the results of some stages: several where they were made by one after another."""
    found: dict[str, set[str]] = {}
    for stage in stages:
        for name, version in store.result(stage)["versions"].items():
            found.setdefault(name, set()).add(version)
    return {name: ", ".join(sorted(several)) for name, several in found.items()}


Perform = Callable[[Stage, Store, Report], Mapping[str, Any]]
"""Does a stage and returns its JSON result; must be importable by name."""

Watch = Callable[[Stage, str, float, Mapping[str, float]], None]
"""Told of a stage how far it is: see `run_stages`."""


def run_stages(
    stages: Sequence[Stage],
    store: Store,
    perform: Perform,
    *,
    workers: int,
    watch: Watch,
    together: int = 1,
) -> None:
    """Does what is not done yet, parents first.

    Several processes call it together, with the same stages.

    Args:
      stages: all of them, parents before children.
      store: where results are.
      perform: does one stage; a `functools.partial` of a module's function.
      workers: processes to start, each on a core of its own; 1 works in this process.
      watch: told `(stage, "running" | "done" | "kept", share in [0, 1], shown)`, by one thread at a time.
      together: stages that differ in the seed alone and are done in lanes, each program running once for all; see
        `gvjax.lanes`.

    Raises:
      StageError: a stage failed; those that were done stay done.
      PreemptedError: SIGTERM came; those that were done stay done, and others go on from their latest checkpoint, which
        in this process is made then.
    """
    waiting = []
    for stage, is_done in zip(stages, _done(stages, store)):
        if is_done:
            watch(stage, "kept", 1.0, {})
        else:
            waiting.append(stage)
    if workers > 1 and len(waiting) > 1:
        _share_out(waiting, store, perform, workers, watch, together)
        return
    while waiting:
        group = _group(waiting[0], _ready(waiting, ()), together)
        if distributed.preemption_requested():
            raise PreemptedError(
                f"stopped before {group[0].label}, kept in {store.root}; the same command goes on"
            )
        _do_group(group, store, perform, watch, together)
        waiting = _without(waiting, group)


def _ready(waiting: Sequence[Stage], running: Iterable[Stage]) -> list[Stage]:
    """Those that wait for no other one."""
    pending = {stage.key for stage in (*waiting, *running)}
    return [
        stage
        for stage in waiting
        if not any(parent.key in pending for parent in stage.parents)
    ]


def _without(stages: Iterable[Stage], group: Sequence[Stage]) -> list[Stage]:
    keys = {stage.key for stage in group}
    return [stage for stage in stages if stage.key not in keys]


def _group(first: Stage, ready: Sequence[Stage], together: int) -> list[Stage]:
    """A stage and others that do the same on the same task with another seed, `together` of them at most."""
    like = [
        stage
        for stage in _without(ready, [first])
        if stage.place[1] == first.place[1] and _programs(stage) == _programs(first)
    ]
    return [first, *like][:together]


def _do_group(
    group: Sequence[Stage], store: Store, perform: Perform, watch: Watch, together: int
) -> None:
    """Does stages at once; one that fails leaves the others to end.

    Raises:
      StageError, PreemptedError: of the first that failed or was told to go.
    """
    telling = threading.Lock()

    def tell(stage: Stage, what: str, share: float, shown: Mapping[str, float]):
        with telling:
            watch(stage, what, share, shown)

    def do(stage: Stage) -> None:
        def report(done, total, shown):
            tell(stage, "running", done / max(total, 1), shown)

        try:
            _do(stage, store, perform, report, beside=len(group))
        except (PreemptedError, lanes.AbandonedError):
            raise
        except Exception as error:
            raise StageError(
                f"{stage.label} failed:\n{traceback.format_exc()}"
            ) from error
        tell(stage, "done", 1.0, {})

    if together == 1:
        do(group[0])
    else:
        works = [functools.partial(do, stage) for stage in group]
        lanes.Lanes(together).run(works)


def _done(stages: Sequence[Stage], store: Store) -> list[bool]:
    """Which are done, as the first process sees it."""
    done = np.zeros(len(stages), bool)
    if jax.process_index() == 0:
        done[:] = [store.is_done(stage) for stage in stages]
    return distributed.from_first(done).tolist()


def share_compiled_programs(store: Store) -> None:
    """Lets processes, and later runs of the study, find what one of them has compiled."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        cache = str(store.root / "compiled")
        jax.config.update("jax_compilation_cache_dir", cache)
        _, least = runtime.KEPT_FROM
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float(least))


NOTED_EVERY = 1.0
"""Seconds of work that a killed stage may lose count of."""


def _do(
    stage: Stage, store: Store, perform: Perform, report: Report, *, beside: int
) -> None:
    """Does a stage; its seconds are those of all attempts, as far as one that was killed had noted them.

    Args:
      beside: stages that are done at once; each is put down for its share of the time.
    """
    first = jax.process_index() == 0
    path = store.directory(stage) / "seconds"
    before = float(path.read_text()) if first and path.exists() else 0.0
    begun = noted = time.monotonic()

    def noting(done: int, total: int, shown: Mapping[str, float]) -> None:
        nonlocal noted
        if first and time.monotonic() - noted > NOTED_EVERY:
            noted = time.monotonic()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, f"{before + (noted - begun) / beside:.3f}\n")
        report(done, total, shown)

    result = perform(stage, store, noting)
    if first:
        seconds = before + (time.monotonic() - begun) / beside
        made_by = {"seconds": seconds, "versions": versions()}
        store.finish(stage, {**made_by, **result})
        path.unlink(missing_ok=True)
    # The next stage reads what this one has left.
    distributed.wait_for_all(stage.key)


def _share_out(waiting, store, perform, workers, watch, together) -> None:
    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    desks = {}
    for number in range(min(workers, len(waiting))):
        tasks = context.SimpleQueue()
        core = cores[number % len(cores)] if cores else None
        process = context.Process(
            target=_work,
            args=(number, core, tasks, news, store, perform, together),
            daemon=True,
        )
        with _ctrl_c_kept_back():
            process.start()
        desks[number] = (process, tasks)
    by_key = {stage.key: stage for stage in waiting}
    waiting = _most_to_follow_first(waiting)
    idle, running = list(desks), dict[int, list[Stage]]()
    compiled: set[tuple[str, str, int]] = set()
    looked = time.monotonic()
    try:
        while waiting or running:
            under_way = [stage for group in running.values() for stage in group]
            ready = _ready(waiting, under_way)
            while idle and ready:
                first = _next(ready, under_way, compiled)
                group = _group(first, ready, together)
                number = idle.pop(0)
                ready, waiting = _without(ready, group), _without(waiting, group)
                running[number] = group
                under_way += group
                desks[number][1].put(tuple(group))
            # However much the others have to say: one that died says nothing.
            if time.monotonic() - looked > 1.0:
                looked = time.monotonic()
                _check_alive(running, desks)
            if distributed.preemption_requested():
                raise PreemptedError(
                    f"stopped, kept in {store.root}; the same command goes on"
                )
            try:
                number, key, what, share, shown = news.get(timeout=1.0)
            except queue.Empty:
                continue
            if what == "failed":
                raise StageError(shown)
            if what == "idle":
                idle.append(number)
                del running[number]
                continue
            compiled.add(_programs(by_key[key]))
            watch(by_key[key], what, share, shown)
    finally:
        for process, _ in desks.values():
            process.terminate()
        for process, _ in desks.values():
            process.join()


def _programs(stage: Stage) -> tuple[str, str, int]:
    """Stages with the same value run the same compiled programs: seeds, and a task and its twin, differ in data alone."""
    _, _, arm, trial = stage.place
    return stage.kind, arm, trial


def _most_to_follow_first(stages: Sequence[Stage]) -> list[Stage]:
    """Stages by the cost of the longest chain that begins with each, so that at the end no process waits long for another.

    Args:
      stages: parents before children; equal ones keep their order.
    """
    chains: dict[str, float] = {}
    following: dict[str, float] = {}
    for stage in reversed(stages):
        chains[stage.key] = stage.cost + following.get(stage.key, 0.0)
        for parent in stage.parents:
            longest = max(following.get(parent.key, 0.0), chains[stage.key])
            following[parent.key] = longest
    return sorted(stages, key=lambda stage: -chains[stage.key])


def _next(ready, running, compiled) -> Stage:
    """The first stage that would not compile what another process is compiling just now; else the first."""
    compiling = {_programs(stage) for stage in running} - compiled
    return next(
        (stage for stage in ready if _programs(stage) not in compiling), ready[0]
    )


@contextlib.contextmanager
def _ctrl_c_kept_back() -> Iterator[None]:
    """Ctrl-C waits until the end; a process started inside cannot be interrupted before it says what it does about it."""
    if threading.current_thread() is not threading.main_thread():
        # Ctrl-C is the main thread's affair.
        yield
        return
    came: list[Any] = []
    # Blocked for the new process, which inherits it, and kept for this one: another thread may be the one that gets it.
    answer = signal.signal(signal.SIGINT, lambda *call: came.append(call))
    blocked = None
    if hasattr(signal, "pthread_sigmask"):
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if blocked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGINT, answer)
    if came:
        raise KeyboardInterrupt


def _check_alive(running, desks) -> None:
    for number, group in running.items():
        process, _ = desks[number]
        if not process.is_alive():
            raise StageError(
                f"{group[0].label}: its process died with exit code {process.exitcode} (-9: killed, often for want of"
                " memory); run the same command to go on"
            )


def _leave_with_the_leader() -> None:
    """A leader that was killed cannot end its processes, and the next one would find them at work in its directory."""
    leader = multiprocessing.parent_process()
    if leader is not None:
        leader.join()
        os._exit(70)


def _work(number, core, tasks, news, store, perform, together) -> None:
    # Ctrl-C reaches the whole process group: the leader answers it, and ends the others. It was blocked until here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_the_leader, daemon=True).start()
    if core is not None:
        # Before jax makes its thread pool: one thread on one core wastes nothing on waiting for the others.
        os.sched_setaffinity(0, {core})
    # Where programs are kept is the leader's to say.
    runtime.configure(keep_programs=False, one_arena=False)
    checkpoint.say_failures_once()
    share_compiled_programs(store)
    while True:
        # What is left by now, modules and compiled programs, stays: later collections need not look at it.
        gc.collect()
        gc.freeze()
        group = tasks.get()
        latest = dict.fromkeys((stage.key for stage in group), 0.0)

        def tell(stage, what, share, shown, latest=latest):
            now = time.monotonic()
            if what == "done" or now - latest[stage.key] > 0.2:
                latest[stage.key] = now
                shown = {name: float(value) for name, value in shown.items()}
                news.put((number, stage.key, what, share, shown))

        try:
            _do_group(group, store, perform, tell, together)
        except Exception as error:
            news.put((number, None, "failed", 0.0, str(error)))
            return
        news.put((number, None, "idle", 1.0, {}))
