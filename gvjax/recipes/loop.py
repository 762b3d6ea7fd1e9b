"""The loop all recipes share: resume, advance, log, evaluate, checkpoint."""

import contextlib
import dataclasses
import logging
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from gvjax import config, distributed, sharding
from gvjax.checkpoint import (
    CheckpointError,
    Checkpoints,
    Restored,
    restore_params,
    versions,
)
from gvjax.digests import json_hash
from gvjax.metrics import MetricsLog
from gvjax.types import Metrics, Params, TrainState

logger = logging.getLogger(__name__)

Advance = Callable[[TrainState, int], tuple[TrainState, Metrics]]
"""`(state, round) -> (state, metrics)`: one round of work, pure in (state, round)."""


Select = Literal["best", "last"]
"""Which checkpoint training returns."""


Progress = Callable[[int, int, Mapping[str, float]], None]
"""Somebody who watches: `(done, total, shown)` after every round."""


def nobody(done: int, total: int, shown: Mapping[str, float]) -> None:
    """Watches nothing."""


class Clock:
    """Seconds of the parts of a round.

    Work on a device is waited for only in rounds whose times are written down, so that the others stay asynchronous.
    """

    def __init__(self) -> None:
        self.waits = False
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[list[Any]]:
        """Times a part: put what it computed into the list."""
        begun, made = time.monotonic(), list[Any]()
        yield made
        if self.waits:
            jax.block_until_ready(made)
            spent = self.seconds.get(name, 0.0) + time.monotonic() - begun
            self.seconds[name] = spent

    def shares(self, whole: float) -> dict[str, float]:
        """Share of a round that each part took, and of what is left; then forgets them."""
        parts = {f"share/{name}": s / whole for name, s in self.seconds.items()}
        self.seconds = {}
        return {**parts, "share/train": max(1.0 - sum(parts.values()), 0.0)}


@dataclasses.dataclass(frozen=True)
class Run:
    """Where one training run keeps its things.

    Attributes:
      directory: checkpoints, metrics and results.
      identity: JSON that says what is being computed; a resumed run must match it field by field.
      logging, checkpoints: config sections.
      timeouts: config section: when the run counts as stuck.
      progress: told after every round.
      show: given the current params every `logging.sample_every` rounds, to show somebody what they do; or None.
      force: fields of `identity` in which it may differ from the run that it goes on with.
      clock: times the parts of a round.
    """

    directory: pathlib.Path
    identity: dict[str, Any]
    logging: config.LoggingSection = config.LoggingSection()
    checkpoints: config.CheckpointSection = config.CheckpointSection()
    timeouts: config.TimeoutsSection = config.TimeoutsSection()
    progress: Progress = nobody
    show: Callable[[Params], None] | None = None
    force: tuple[str, ...] = ()
    clock: Clock = dataclasses.field(default_factory=Clock)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training came to.

    Attributes:
      params: of the selected checkpoint.
      round: rounds made when it was taken.
      curve: one dict of numbers per evaluation, with its `round`.
    """

    params: Params
    round: int
    curve: list[dict[str, float]]


class NonFiniteError(RuntimeError):
    """The loss or its gradient was not finite for several rounds in a row."""


class PreemptedError(RuntimeError):
    """The run was told to go (SIGTERM); it is checkpointed, and the same command goes on."""


class _Silent:
    """The metrics log of every process but the first, which writes for all."""

    def write(self, step: int, metrics: Mapping[str, Any], timing: Any = None) -> None:
        """Writes nothing."""

    def flush(self) -> None:
        """Has nothing to write."""

    def position(self) -> int:
        """That of the first process is the one that a checkpoint keeps."""
        return 0

    def rewind(self, position: int) -> None:
        """Has nothing to forget."""


def _open_log(run: Run) -> contextlib.AbstractContextManager[MetricsLog | _Silent]:
    if jax.process_index() != 0:
        return contextlib.nullcontext(_Silent())
    return MetricsLog(
        run.directory,
        tensorboard=run.logging.tensorboard,
        wandb_project=run.logging.wandb_project,
    )


def train(
    run: Run,
    state: TrainState,
    advance: Advance,
    *,
    rounds: int,
    evaluate: Callable[[Params], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    select: Select = "last",
    select_by: str = "gold",
    shown: tuple[str, ...] = ("loss",),
    learning_rate: optax.Schedule | None = None,
    patience: int = 10,
    policy_of: Callable[[Params], Params] = lambda params: params,
    trained_on: Callable[[], Any] | None = None,
) -> Trained:
    """Advances a state for a number of rounds, resuming from the run's newest checkpoint.

    With several processes every one of them calls this with the same arguments; the first alone writes the log.

    Args:
      run: where things are kept.
      state: the state at round 0; donated, so do not use it afterwards.
      advance: one round.
      rounds: how many.
      evaluate: numbers of the current params, taken every `evaluate_every` rounds and at the end.
      evaluate_every: rounds between evaluations; 0: none.
      select: `best` returns the params with the highest `select_by` among the evaluations, `last` the final ones.
      select_by: the name of an evaluated number.
      shown: names of metrics for the progress bar.
      learning_rate: of each update, logged beside the metrics: that of a round's first update, by the optimizer's own
        count, which skipped updates do not move.
      patience: rounds in a row that were skipped, because loss or gradient was not finite, after which the run stops.
      policy_of: picks, from the trained params, those that are evaluated and returned.
      trained_on: the batch of the latest update; it is kept in `nonfinite.npz` beside the run when patience ends.

    Returns:
      Trained.

    Raises:
      NonFiniteError: see `patience`.
      PreemptedError: SIGTERM came; the rounds made so far are in a checkpoint.
    """
    if select == "best" and evaluate is None:
        raise ValueError(
            "select is 'best' but nothing is evaluated; give evaluate, or select 'last'"
        )
    best = jax.tree.map(jnp.copy, state.params) if select == "best" else None
    kept: dict[str, Any] = {"train": state, "best": best}
    notes: dict[str, Any] = {
        "curve": [],
        "best_round": 0,
        "best_score": None,
        "log": 0,
        "skipped": 0,
        "skipped_in_a_row": 0,
    }
    first = 0
    preempted: int | None = None
    with (
        Checkpoints(
            run.directory / "checkpoints",
            every_steps=run.checkpoints.every,
            keep_latest=run.checkpoints.keep,
            on_full_disk=run.checkpoints.on_full_disk,
        ) as checkpoints,
        _open_log(run) as log,
        distributed.Watchdog(
            floor_s=run.timeouts.step, first_s=run.timeouts.first_step
        ) as watchdog,
    ):
        if checkpoints.latest_step() is not None:
            restored = checkpoints.restore(
                jax.tree.map(_abstract, kept),
                expect={"identity": run.identity},
                allow_changes=[f"identity.{field}" for field in run.force],
            )
            kept, first = restored.state, restored.step
            notes.update(restored.meta["notes"])
            logger.info("resuming %s at round %d", run.directory, first)
            _warn_of_other_machine(restored)
        log.rewind(notes["log"])
        state, best = kept["train"], kept["best"]

        waiting: list[tuple[int, Mapping[str, Any], dict[str, float]]] = []
        latest: dict[str, float] = {}

        def written(round_: int) -> bool:
            return (round_ + 1) % run.logging.every == 0 or round_ + 1 == rounds

        def keep_batch(round_: int) -> str:
            """Keeps what a skipped round trained on, and says where."""
            if trained_on is None:
                return ""
            # Skipped rounds leave the parameters as they were, so this one comes out as it did.
            advance(state, round_)
            path = run.directory / "nonfinite.npz"
            leaves = jax.tree_util.tree_leaves_with_path(trained_on())
            batch = {sharding.path_str(at): sharding.fetch(leaf) for at, leaf in leaves}
            if jax.process_index() == 0:
                np.savez(path, allow_pickle=False, **batch)
            return f", and round {round_ + 1} trained on the batch kept in {path}"

        def write_down() -> None:
            """Fetches the metrics of the rounds since the last time: the loop's only wait for the device."""
            for round_, metrics, timing in waiting:
                values = {name: float(np.asarray(metrics[name])) for name in metrics}
                latest.update(values)
                if written(round_):
                    log.write(round_ + 1, values, timing)
                if math.isfinite(values["loss"]) and not values.get("skipped"):
                    notes["skipped_in_a_row"] = 0
                    continue
                notes["skipped"] += 1
                notes["skipped_in_a_row"] += 1
                logger.warning(
                    "round %d: loss %g, gradient norm %g; it is skipped (%d so far)",
                    round_ + 1,
                    values["loss"],
                    values.get("grad_norm", math.nan),
                    notes["skipped"],
                )
                if notes["skipped_in_a_row"] >= patience:
                    raise NonFiniteError(
                        f"loss or gradient was not finite for {patience} rounds up to {round_ + 1}; the last good"
                        f" checkpoint is in {run.directory / 'checkpoints'}{keep_batch(round_)}. Lower the learning"
                        " rate or max_grad_norm, or look at the batch"
                    )
            waiting.clear()
            # What a full disk does not take now is kept, and offered again.
            with contextlib.suppress(OSError):
                log.flush()

        def save(done: int, *, force: bool) -> None:
            write_down()
            meta = {"identity": run.identity, "hash": json_hash(run.identity)}
            with watchdog.paused(run.timeouts.first_step):
                try:
                    notes["log"] = log.position()
                except OSError as error:
                    checkpoints.failed(done, error)
                    return
                checkpoints.save(
                    done,
                    {"train": state, "best": best},
                    {**meta, "notes": notes},
                    force=force,
                )

        for round_ in range(first, rounds):
            run.clock.waits = written(round_)
            rate = {}
            if run.clock.waits:
                # What earlier rounds left to be done is not this one's time.
                jax.block_until_ready(state)
                if learning_rate is not None:
                    rate = {"learning_rate": learning_rate(_scheduled(state))}
            begun = time.monotonic()
            state, metrics = advance(state, round_)
            timing = {}
            if run.clock.waits:
                jax.block_until_ready(metrics)
                seconds = time.monotonic() - begun
                timing = {"step_time": seconds, **run.clock.shares(seconds)}
            waiting.append((round_, {**metrics, **rate}, timing))
            done = round_ + 1
            watchdog.beat(done)
            evaluate_now = evaluate is not None and (
                done == rounds or (evaluate_every and done % evaluate_every == 0)
            )
            if evaluate_now or done == rounds or len(waiting) >= run.logging.every:
                write_down()
            if evaluate is not None and evaluate_now:
                policy = policy_of(state.params)
                with watchdog.paused():
                    found = evaluate(policy)
                numbers = {name: float(value) for name, value in found.items()}
                notes["curve"].append({"round": done, **numbers})
                log.write(
                    done, {f"eval_{name}": value for name, value in numbers.items()}
                )
                latest.update(numbers)
                better = (
                    notes["best_score"] is None
                    or numbers[select_by] > notes["best_score"]
                )
                if select == "best" and better:
                    best = jax.tree.map(jnp.copy, state.params)
                    notes["best_round"], notes["best_score"] = done, numbers[select_by]
            every = run.logging.sample_every
            if run.show is not None and every and done % every == 0:
                with watchdog.paused():
                    run.show(policy_of(state.params))
            run.progress(
                done, rounds, {name: latest[name] for name in shown if name in latest}
            )
            if done == rounds:
                try:
                    log.flush()
                except OSError as error:
                    # A result without its metrics would stand for ever; the same command makes them again.
                    raise CheckpointError(
                        f"the last metrics could not be written: {error}"
                    ) from None
                break
            stop = distributed.preemption_requested()
            if stop or done % run.checkpoints.every == 0:
                save(done, force=stop)
            if stop:
                preempted = done
                break
    # Raised only now: closing has waited for the checkpoint to be complete.
    if preempted is not None:
        raise PreemptedError(
            f"stopped after round {preempted} of {rounds}, checkpointed in {run.directory / 'checkpoints'}; the same"
            " command goes on"
        )
    if select == "best":
        return Trained(policy_of(best), notes["best_round"], notes["curve"])
    return Trained(policy_of(state.params), rounds, notes["curve"])


def _scheduled(state: TrainState) -> int:
    """Which update of its schedule the optimizer makes next; it has one, as `make_optimizer`'s does."""

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    nodes = jax.tree.leaves(state.opt_state, is_leaf=is_schedule)
    return next(int(np.asarray(node.count)) for node in nodes if is_schedule(node))


def save_params(directory: pathlib.Path, params: Params) -> None:
    """Keeps final parameters beside a run."""
    with Checkpoints(directory / "params", every_steps=1, keep_latest=1) as kept:
        kept.save(1, {"params": params}, {}, force=True)


def load_params(directory: pathlib.Path, shapes: Params) -> Params:
    """Parameters that `save_params` kept, verified."""
    return restore_params(directory / "params", shapes).state


def _warn_of_other_machine(restored: Restored) -> None:
    """What may differ from the unbroken run in its last bits, and why."""
    mesh = next(
        (
            dict(leaf.sharding.mesh.shape)
            for leaf in jax.tree.leaves(restored.state)
            if isinstance(leaf.sharding, NamedSharding)
        ),
        {},
    )
    now = {"mesh": mesh, "processes": jax.process_count(), **versions()}
    then = {
        "mesh": restored.mesh,
        "processes": restored.processes,
        **restored.versions,
    }
    changed = [
        f"{name} was {then.get(name)} and is {value}"
        for name, value in now.items()
        if then.get(name) != value
    ]
    if changed:
        logger.warning(
            "the checkpoint was made elsewhere, so numbers may differ from an unbroken run's by rounding: %s",
            "; ".join(changed),
        )


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
