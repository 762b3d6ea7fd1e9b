"""Checkpoints that can be trusted: atomic steps over Orbax, with a digest of every array checked on load.

One step holds the state (arrays, typed PRNG keys included) and a header in JSON: what the run wants to remember (data
position, ledger, resolved config, tokenizer hash), the versions and mesh that wrote it, and each array's shape, dtype
and digest. Array files carry no checksum of their own: without the digests a flipped bit on disk would load in
silence. A digest does not depend on the mesh, so it still holds when the state is restored onto another one.

    with Checkpoints(directory, every_steps=100, keep_latest=3) as checkpoints:
        if checkpoints.latest_step() is not None:
            restored = checkpoints.restore(abstract_state, expect={"config": config})
            ...
        for ...:
            state, metrics = step(state, batch)
            checkpoints.save(int(state.step), state, {"config": config, "position": position})
"""

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import logging
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from gvjax.digests import Json, digests_of, json_hash

logger = logging.getLogger(__name__)

Tree = Any
"""A pytree of arrays or of jax.ShapeDtypeStruct."""


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, missing, or could not be written."""


class DirectoryError(CheckpointError):
    """Checkpoints cannot be kept in a directory, and trying again does not change that."""


class CheckpointMismatch(ValueError):
    """A sound checkpoint does not hold the arrays that were asked for."""


class ConfigMismatch(CheckpointMismatch):
    """A sound checkpoint was made under another config than the one it is to go on with."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What came back.

    Attributes:
      state: a tree like the abstract one, on its shardings.
      meta: the dict given to `save`, as JSON returns it (tuples have become lists).
      step: the step it was saved at.
      versions: of the packages that wrote it.
      mesh: axis sizes of the mesh that wrote it; empty without one.
      processes: how many wrote it.
    """

    state: Tree
    meta: dict[str, Json]
    step: int
    versions: dict[str, str]
    mesh: dict[str, int]
    processes: int


_TURN = threading.Lock()
"""Held by the thread that saves: Orbax numbers the saves of a process, and of two at once one would wait for the other's."""


class Checkpoints:
    """The checkpoints of one run, in one directory; every process calls every method at the same step.

    Args:
      directory: made if absent; `<directory>/<step>` is one checkpoint. What an interrupted save has left is swept.
      every_steps: >= 1; `save` writes at multiples of it.
      keep_latest: >= 1, how many of the newest checkpoints to keep. With 1 there is none to fall back on.
      keep_every: also keep those at multiples of this many steps, for ever; None keeps none.
      on_full_disk: "stop" raises; "continue" logs an error, keeps it in `last_error` and goes on with the last good
        checkpoint. With several processes a full disk always raises: one that went on alone would wait for the others.

    Attributes:
      last_error: the newest save that failed and was passed over; None if all is well.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every_steps: int,
        keep_latest: int = 3,
        keep_every: int | None = None,
        on_full_disk: Literal["stop", "continue"] = "stop",
    ):
        sizes = {"every_steps": every_steps, "keep_latest": keep_latest}
        if keep_every is not None:
            sizes["keep_every"] = keep_every
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if on_full_disk not in ("stop", "continue"):
            raise ValueError(
                f"on_full_disk {on_full_disk!r} must be 'stop' or 'continue'"
            )
        self.directory = epath.Path(directory).resolve()
        self.last_error: CheckpointError | None = None
        self._every_steps = every_steps
        self._keep_latest = keep_latest
        self._keep_every = keep_every
        self._on_full_disk = on_full_disk
        self._pending: int | None = None
        self._gave_up = False
        self._orbax = self._open()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self.close()
            return
        if jax.process_count() > 1:
            # Closing waits for the other processes, which may be gone, and one of which may be waiting for this one.
            # A save cut short is swept at the next start.
            return
        # The error on its way out is the news; a save that fails beside it must not hide it.
        try:
            self.close()
        except CheckpointError as failure:
            logger.error("%s", failure)

    def save(
        self, step: int, state: Tree, meta: Mapping[str, Json], *, force: bool = False
    ) -> bool:
        """Writes a checkpoint, if the step is due; from the main thread in the background.

        There it returns once the arrays have been copied to the host, so the state may be donated at once. A save still under
        way is waited for first; its failure surfaces here, or in `wait` and `close`.

        Args:
          step: optimizer steps made.
          state: pytree of arrays; on several processes, of global arrays.
          meta: JSON dict; everything but arrays that the run needs to go on.
          force: save though `step` is not a multiple of `every_steps`: the last step, or a preemption.

        Returns:
          Whether a save was begun: False if the step is not due or is the newest one there already, or if the disk is
          full and `on_full_disk` is "continue".

        Raises:
          ValueError: a later step is there already.
          CheckpointError: this save or the one before it failed.
        """
        if not force and step % self._every_steps:
            return False
        self.wait()
        latest = self.latest_step()
        if latest is not None and step < latest:
            raise ValueError(
                f"cannot save step {step}: {self.directory} holds the later step {latest}, on which a resumed run would "
                "go on; remove the later steps or start in a new directory"
            )
        if step == latest:
            return False
        leaves = _concrete_leaves(state)
        header = _make_header(leaves, meta)
        with _TURN:
            try:
                self._orbax.save_checkpointables_async(
                    step, {"state": _nested(leaves), "header": header}, force=True
                )
            except Exception as error:
                self._failed(step, error)
                return False
            self._pending = step
            if threading.current_thread() is not threading.main_thread():
                self.wait()
        return True

    def failed(self, step: int, error: Exception) -> None:
        """Says that a step cannot be saved for a reason outside, such as a log that the disk does not take.

        Raises:
          CheckpointError: unless the disk is full and `on_full_disk` is "continue".
        """
        self.wait()
        self._failed(step, error)

    def wait(self) -> None:
        """Until nothing is being written. Raises CheckpointError if the write failed."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        try:
            self._orbax.wait()
        except Exception as error:
            self._failed(step, error)
        else:
            self._gave_up = False

    def close(self) -> None:
        """Waits for the write under way and releases Orbax' threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def steps(self) -> list[int]:
        """The steps with a complete checkpoint, ascending; on every process, as process 0 sees them."""
        return [step for step in _steps(self.directory) if step != self._pending]

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def restore(
        self,
        abstract_state: Tree,
        step: int | None = None,
        *,
        expect: Mapping[str, Json] | None = None,
        allow_changes: Iterable[str] = (),
    ) -> Restored:
        """The state as it was saved, every digest verified, on the shardings of `abstract_state`.

        The newest checkpoint is taken; if it is damaged, that is logged as a warning, the one before it is taken, and
        the damaged one is renamed `<step>.damaged` so that no later start trips over it.

        Args:
          abstract_state: tree of jax.ShapeDtypeStruct with shardings (or of arrays, for their shapes and shardings).
            The mesh and the number of processes may be others than those that saved.
          step: a certain step instead; then damage is an error.
          expect: entries `meta` must hold, compared field by field: the resolved config, the tokenizer's hash.
          allow_changes: fields that may differ, named as the error names them, such as "config.learning_rate".

        Raises:
          CheckpointError: no step, or none that is whole.
          CheckpointMismatch: an array is missing, left over, or of another shape or dtype.
          ConfigMismatch: `expect` differs in fields that `allow_changes` does not name.
        """
        self.wait()
        restored, damaged = _restore(
            self.directory,
            self.steps(),
            abstract_state,
            step=step,
            prefix="",
            expect=expect or {},
            allow_changes=allow_changes,
        )
        if damaged:
            if jax.process_index() == 0:
                for each in damaged:
                    aside = self.directory / f"{each}.damaged"
                    if aside.exists():
                        aside.rmtree()
                    (self.directory / str(each)).rename(aside)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("gvjax.checkpoint.set_aside")
            self._orbax.reload()
        return restored

    def _open(self) -> ocp.training.Checkpointer:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                # Orbax sweeps too, but in the background, where it could be cut short.
                for left in self.directory.glob("*.orbax-checkpoint-tmp*"):
                    # A save that was given up may still be writing there: then the next start sweeps it.
                    with contextlib.suppress(OSError):
                        left.rmtree()
                _check_renames(self.directory)
            if os.path.exists(self.directory) and not os.access(
                self.directory, os.W_OK
            ):
                raise PermissionError(errno.EACCES, "the directory is not writable")
        except OSError as error:
            raise CheckpointError(
                f"cannot keep checkpoints in {self.directory}: {_one_line(error)}"
            ) from None
        keep = [ocp.training.preservation_policies.LatestN(self._keep_latest)]
        if self._keep_every is not None:
            keep.append(
                ocp.training.preservation_policies.EveryNSteps(self._keep_every)
            )
        policies = ocp.training.save_decision_policies
        return ocp.training.Checkpointer(
            self.directory,
            context=_context(),
            # Both policies are set because Orbax' defaults save at every chance and delete nothing.
            save_decision_policy=policies.FixedIntervalPolicy(self._every_steps),
            preservation_policy=ocp.training.preservation_policies.AnyPreservationPolicy(
                keep
            ),
            cleanup_tmp_directories=True,
        )

    def _failed(self, step: int, error: Exception) -> None:
        """Leaves a sound object behind a failed save, then raises or logs: what `on_full_disk` says, or a time limit."""
        logger.debug("saving step %d failed", step, exc_info=error)
        # Orbax raises the same error once more when it is closed, and keeps counting the step as saved.
        with contextlib.suppress(Exception):
            self._orbax.close()
        full = _is_full_disk(error)
        self._orbax = self._open()
        # Of this process alone: the others may not be here.
        last_good = max(_listed(self.directory), default=None)
        failure = CheckpointError(
            f"the checkpoint of step {step} in {self.directory} was not written"
            f"{' because the disk is full' if full else ''}: {_one_line(error)}; the last good step is "
            f"{last_good}"
        )
        self.last_error = failure
        # Orbax counts its time limits by the wall clock, and gives a save up when that jumps. What that save still writes
        # may then be in the way of the next one.
        before, self._gave_up = self._gave_up, isinstance(error, TimeoutError)
        in_the_way = before and isinstance(error, OSError) and not full
        gave_up = (in_the_way or self._gave_up) and last_good is not None
        passed_over = gave_up or (full and self._on_full_disk == "continue")
        if passed_over and jax.process_count() == 1:
            logger.error("%s; going on without it", failure)
            return
        raise failure from None


def restore_params(
    directory: str | os.PathLike[str],
    abstract_params: Tree,
    step: int | None = None,
    *,
    prefix: str = "params",
    expect: Mapping[str, Json] | None = None,
    allow_changes: Iterable[str] = (),
) -> Restored:
    """Only the parameters of a checkpoint, for the next stage; nothing else is read and nothing is changed.

    Called by every process, like `Checkpoints.restore`, with the same falling back from a damaged step.

    Args:
      directory: of the earlier stage's `Checkpoints`.
      abstract_params: as for `Checkpoints.restore`; a floating dtype other than the saved one is converted to, after
        the digests have been verified.
      step: the newest sound one by default.
      prefix: where in the saved state the parameters are, such as "params/policy".
      expect, allow_changes: as for `Checkpoints.restore`.

    Returns:
      Restored, with the parameters alone as `state`.
    """
    root = epath.Path(directory).resolve()
    restored, _ = _restore(
        root,
        _steps(root),
        abstract_params,
        step=step,
        prefix=prefix + "/",
        expect=expect or {},
        allow_changes=allow_changes,
    )
    return restored


def content_hash(
    directory: str | os.PathLike[str], step: int | None = None
) -> str | None:
    """SHA-256, in hex, of what the arrays of a checkpoint are, wherever it lies; None where there is none.

    Read from the header alone: the arrays are held to it when they are restored.

    Args:
      directory: of a run's `Checkpoints`.
      step: the newest by default.
    """
    root = epath.Path(directory).resolve()
    steps = _steps(root) if step is None else [step]
    if not steps:
        return None
    try:
        return json_hash(_read_header(root / str(steps[-1]))["leaves"])
    except CheckpointError:
        return None


def digests(tree: Tree) -> dict[str, int]:
    """A 32-bit digest of every array, by path: the same on every mesh, another if any one element differs."""
    return digests_of(_concrete_leaves(tree))


def versions() -> dict[str, str]:
    """Of the packages that a checkpoint's bits may depend on."""
    names = ("gvjax", "jax", "jaxlib", "optax", "orbax-checkpoint")
    return {name: importlib.metadata.version(name) for name in names}


def _context() -> ocp.Context:
    registry = ocp.handlers.local_registry(include_global_registry=True)
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="header")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def _steps(directory: epath.Path) -> list[int]:
    """The steps in a directory as process 0 lists them; called by every process.

    A network file system may show a process what was there a while ago, and each would go on from another step.
    """
    listed = _listed(directory)
    if jax.process_count() == 1:
        return listed
    from_first = multihost_utils.broadcast_one_to_all
    count = int(from_first(np.array(len(listed), np.int32)))
    # The others only say how many there are.
    steps = listed if jax.process_index() == 0 else [0] * count
    return np.asarray(from_first(np.array(steps, np.int32))).tolist() if count else []


def _listed(directory: epath.Path) -> list[int]:
    """As this process sees them."""
    if not directory.exists():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal())


def _restore(
    directory: epath.Path,
    steps: list[int],
    abstract: Tree,
    *,
    step: int | None,
    prefix: str,
    expect: Mapping[str, Json],
    allow_changes: Iterable[str],
) -> tuple[Restored, list[int]]:
    """What is restored, and the newer steps that were found damaged."""
    if step is not None and step not in steps:
        raise CheckpointError(
            f"no checkpoint of step {step} in {directory}; there are {steps or 'none'}"
        )
    if not steps:
        raise CheckpointError(f"no checkpoint in {directory}")
    allowed = frozenset(allow_changes)
    damaged: list[int] = []
    for each in [step] if step is not None else reversed(steps):
        try:
            restored = _load(directory / str(each), abstract, prefix, expect, allowed)
        except CheckpointError as error:
            if step is not None:
                raise
            logger.warning(
                "CHECKPOINT DAMAGED: %s; falling back to the step before", error
            )
            damaged.append(each)
            continue
        if damaged:
            logger.warning(
                "restored step %d of %s, because %s could not be",
                each,
                directory,
                damaged,
            )
        return restored, damaged
    raise CheckpointError(
        f"no checkpoint in {directory} could be restored: all of {steps} are damaged"
    )


def _load(
    path: epath.Path,
    abstract: Tree,
    prefix: str,
    expect: Mapping[str, Json],
    allowed: frozenset[str],
) -> Restored:
    header = _read_header(path)
    _check_expected(path, header["meta"], expect, allowed)
    wanted = {prefix + key: leaf for key, leaf in _leaves(abstract).items()}
    saved = {k: v for k, v in header["leaves"].items() if k.startswith(prefix)}
    _check_leaves(path, saved, wanted, convert=bool(prefix))
    targets = {
        key: jax.ShapeDtypeStruct(
            leaf.shape, _dtype(saved[key]["dtype"], leaf), sharding=_sharding(leaf)
        )
        for key, leaf in wanted.items()
    }
    context = _context()
    context.pytree.loading.partial_load = bool(prefix)
    failure = None
    try:
        with context:
            tree = ocp.load_checkpointables(path, {"state": _nested(targets)})["state"]
        arrays = {key: _at(tree, key) for key in targets}
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # Too little memory for the state says nothing about the checkpoint.
    except Exception as error:
        logger.debug("loading %s failed", path, exc_info=error)
        failure = f"its arrays cannot be read: {_one_line(error)}"
    _agree(path, failure)
    found = digests_of(arrays)
    changed = [key for key in found if found[key] != saved[key]["digest"]]
    if changed:
        raise CheckpointError(
            f"{path}: the contents of {_few(changed)} are not what was saved (their digests differ)"
        )
    state = jax.tree.unflatten(
        jax.tree.structure(abstract),
        [
            array if array.dtype == leaf.dtype else array.astype(leaf.dtype)
            for array, leaf in zip(arrays.values(), wanted.values())
        ],
    )
    return Restored(
        state,
        header["meta"],
        int(path.name),
        header["versions"],
        header["mesh"],
        header["processes"],
    )


def _agree(path: epath.Path, failure: str | None) -> None:
    """CheckpointError on every process if there was a failure on any: all fall back together or none does."""
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(failure is not None))
        if failure is None and failed.any():
            failure = f"process {int(np.argmax(failed))} could not read it"
    if failure is not None:
        raise CheckpointError(f"{path}: {failure}")


def _make_header(leaves: Mapping[str, jax.Array], meta: Mapping[str, Json]) -> Json:
    sums = digests_of(leaves)
    meshes = [getattr(leaf.sharding, "mesh", None) for leaf in leaves.values()]
    mesh = next((dict(m.shape) for m in meshes if m is not None), {})
    header = {
        "meta": dict(meta),
        "leaves": {
            key: {
                "shape": list(leaf.shape),
                "dtype": str(leaf.dtype),
                "digest": sums[key],
            }
            for key, leaf in leaves.items()
        },
        "versions": versions(),
        "mesh": mesh,
        "processes": jax.process_count(),
    }
    try:
        header = json.loads(json.dumps(header))
    except TypeError as error:
        raise ValueError(
            f"meta must be JSON, and is not: {error}; arrays belong in the state"
        ) from None
    return {"content": header, "sha256": json_hash(header)}


def _read_header(path: epath.Path) -> Json:
    failure, header = None, None
    try:
        with _context():
            stored = ocp.load_checkpointables(path, {"header": None})["header"]
        header = stored["content"]
        if json_hash(header) != stored["sha256"]:
            failure = "its header is not what was saved (its hash differs)"
    except Exception as error:
        logger.debug("loading the header of %s failed", path, exc_info=error)
        failure = f"its header cannot be read: {_one_line(error)}"
    _agree(path, failure)
    return header


def _check_expected(
    path: epath.Path,
    meta: Mapping[str, Json],
    expect: Mapping[str, Json],
    allowed: frozenset[str],
) -> None:
    now = json.loads(json.dumps(dict(expect)))
    then = {key: meta[key] for key in now if key in meta}
    changes = dict(_diff(then, now))
    refused = {f: change for f, change in changes.items() if f not in allowed}
    if refused:
        shown = "; ".join(f"{f}: {old} -> {new}" for f, (old, new) in refused.items())
        raise ConfigMismatch(
            f"{path} was saved under another config: {shown}. Set the old values, start in a new directory, or allow "
            f"these changes by name: {', '.join(refused)}"
        )
    for field, (old, new) in changes.items():
        logger.warning("going on from %s with %s: %s -> %s", path, field, old, new)


def _diff(old: Json, new: Json, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(field, (old, new)) wherever two JSON dicts differ, fields joined by dots."""
    for key in sorted(old.keys() | new.keys()):
        field = prefix + key
        before, after = old.get(key, ...), new.get(key, ...)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _diff(before, after, field + ".")
        # NaN differs from itself; as text it does not.
        elif before is ... or after is ... or json.dumps(before) != json.dumps(after):
            shown = ["absent" if v is ... else json.dumps(v) for v in (before, after)]
            yield field, tuple(shown)


def _check_leaves(
    path: epath.Path,
    saved: Mapping[str, Json],
    wanted: Mapping[str, Any],
    convert: bool,
) -> None:
    missing = [key for key in wanted if key not in saved]
    if missing:
        raise CheckpointMismatch(
            f"{path} has no {_few(missing)}; it has {_few(list(saved))}"
        )
    extra = [key for key in saved if key not in wanted]
    if extra:
        raise CheckpointMismatch(
            f"{path} has {_few(extra)}, for which there is no place in the state asked for"
        )
    for key, leaf in wanted.items():
        shape, dtype = tuple(saved[key]["shape"]), saved[key]["dtype"]
        floats = convert and dtype.startswith(("float", "bfloat"))
        convertible = floats and jnp.issubdtype(leaf.dtype, jnp.floating)
        if shape != leaf.shape or (dtype != str(leaf.dtype) and not convertible):
            raise CheckpointMismatch(
                f"{path} has {key} as {dtype}{list(shape)}, asked for is {leaf.dtype}{list(leaf.shape)}"
            )


def _leaves(tree: Tree) -> dict[str, Any]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in flat
    }
    if len(leaves) != len(flat):
        raise ValueError(
            "two arrays of the state have the same path; a key must not contain '/'"
        )
    return leaves


def _concrete_leaves(tree: Tree) -> dict[str, jax.Array]:
    leaves = _leaves(tree)
    for key, leaf in leaves.items():
        if not isinstance(leaf, jax.Array):
            leaves[key] = jnp.asarray(leaf)
            if leaves[key].dtype != np.asarray(leaf).dtype:
                raise ValueError(
                    f"{key} is {np.asarray(leaf).dtype}, which jax would narrow to {leaves[key].dtype}; convert it "
                    "yourself, or put it in meta"
                )
    return leaves


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Plain nested dicts: what is stored does not depend on how Orbax sees tuples, empty nodes and dataclasses."""
    root: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = root
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return root


def _at(tree: dict[str, Any], path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree


def _dtype(saved: str, leaf: Any) -> Any:
    return leaf.dtype if saved == str(leaf.dtype) else jnp.dtype(saved)


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    # Left out, Orbax would look for the very devices that saved.
    sharding = getattr(leaf, "sharding", None)
    return sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def say_failures_once() -> None:
    """Keeps Orbax' threads from printing, a traceback each, the error that a save then raises; for a program of its own.

    A full disk would otherwise be said in a thousand lines, some of them after the one that tells what to do.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
    sys.unraisablehook = _say_unless_late


def _say_unless_late(unraisable: Any) -> None:
    """The unraisablehook: what other arrays have to say of a save that has failed finds nobody there."""
    error = unraisable.exc_value
    if isinstance(error, RuntimeError) and "Event loop is closed" in str(error):
        logger.debug("after a failed save: %s", error)
        return
    sys.__unraisablehook__(unraisable)


def _is_full_disk(error: BaseException | None) -> bool:
    signs = ("no space left", "disk quota", "resource_exhausted", "file too large")
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(sign in str(error).lower() for sign in signs):
            return True
        error = error.__cause__ or error.__context__
    return False


def _check_renames(directory: Any) -> None:
    """A checkpoint becomes whole by the renaming of its directory, which not every file system can do.

    Raises:
      DirectoryError: this one cannot.
    """
    tried = directory / "renaming.orbax-checkpoint-tmp"
    renamed = directory / "renamed.orbax-checkpoint-tmp"
    try:
        tried.mkdir(exist_ok=True)
        (tried / "file").write_text("")
    except OSError as error:
        # A full disk speaks for itself when something is saved.
        if _is_full_disk(error):
            return
        raise
    try:
        tried.rename(renamed)
    except OSError as error:
        raise DirectoryError(
            f"cannot keep checkpoints in {directory}: directories cannot be renamed there ({error.strerror}); of a"
            " bucket that is mounted, take one with a hierarchical namespace"
        ) from None
    renamed.rmtree()


def _one_line(error: BaseException) -> str:
    """The innermost cause, without TensorStore's specification of the array, which fills pages."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
