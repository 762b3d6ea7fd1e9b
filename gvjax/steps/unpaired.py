"""Learning from single completions marked good or bad: KTO and its relatives."""

import functools

import jax
import jax.numpy as jnp
import optax

from gvjax.losses import UNPAIRED_VOCABULARY, Loss, arguments, kto_kl, kto_loss
from gvjax.losses.contract import bools_like, try_out
from gvjax.masked import Mean
from gvjax.steps.core import make_train_step, split
from gvjax.steps.preference import check_rowwise, with_beta
from gvjax.steps.sequences import (
    check_floats,
    check_kind,
    lengths,
    row_mean,
    row_weights,
    summed_logps,
)
from gvjax.types import (
    LogpsFn,
    Metrics,
    Objective,
    Params,
    Step,
    TrainState,
    UnpairedBatch,
)


def reference_point(
    logps_fn: LogpsFn,
    params: Params,
    batch: UnpairedBatch,
    *,
    num_microbatches: int = 1,
) -> jax.Array:
    """KTO's z (see `losses.kto_kl`) over the rows of a batch that weigh something.

    Args:
      logps_fn: the model.
      params: of the policy.
      batch: with `kl_sequences` and `ref_kl_logps`.
      num_microbatches: slices the batch is walked through in; the result does not depend on it.

    Returns:
      f32[], nats, without gradient.

    Raises:
      ValueError: the batch has no `kl_sequences` or no `ref_kl_logps`.
    """
    if batch.kl_sequences is None or batch.ref_kl_logps is None:
        raise ValueError(
            "the loss asks for kl, which is estimated from `kl_sequences` and `ref_kl_logps`; the data must bring other"
            " rows' completions, and `with_ref_logps` fills in the reference's log-probabilities"
        )
    filled = (lengths(batch.kl_sequences) > 0) & (lengths(batch.sequences) > 0)
    kept = row_weights(batch.weight, filled) > 0
    params = jax.lax.stop_gradient(params)
    # Dealt out in turn by `split`: row b of the batch is row b // n of slice b % n.
    slices = jax.lax.map(
        lambda part: summed_logps(logps_fn, params, part),
        split(batch.kl_sequences, num_microbatches),
    )
    logps = slices.swapaxes(0, 1).reshape(-1)
    check_floats(logps, ref_kl_logps=batch.ref_kl_logps)
    estimate = kto_kl(
        jnp.where(kept, logps, 0.0), jnp.where(kept, batch.ref_kl_logps, 0.0)
    )
    # `kto_kl` divides by all rows; those left out above count for nothing.
    return estimate * kept.size / jnp.maximum(jnp.sum(kept), 1)


def unpaired_objective(
    logps_fn: LogpsFn, *, loss: Loss = kto_loss, beta: float | None = None
) -> Objective:
    """The mean of a loss on single completions, with TRL's metrics.

    Rows whose completion is empty have weight 0. A `kl` that the loss asks for is estimated from the rows given.

    Args:
      logps_fn: the model.
      loss, beta: see `make_unpaired_step`.

    Returns:
      `(params, UnpairedBatch) -> (Mean over rows, metrics)`.

    Raises:
      ValueError: if beta or another hyper-parameter of the loss is impossible, or the loss asks for an array that no batch has, or (when traced) that this
        one lacks.
    """
    rows = _rows_objective(logps_fn, loss, beta)
    needs_kl = "kl" in arguments(loss, UNPAIRED_VOCABULARY)

    def objective(params: Params, batch: UnpairedBatch):
        check_kind(UnpairedBatch, batch=batch)
        kl = reference_point(logps_fn, params, batch) if needs_kl else jnp.zeros(())
        return rows(params, (batch, _repeated(kl, batch)))

    return objective


def make_unpaired_step(
    logps_fn: LogpsFn,
    tx: optax.GradientTransformation,
    *,
    loss: Loss = kto_loss,
    beta: float | None = None,
    num_microbatches: int = 1,
) -> Step:
    """Builds the step of any loss on single completions, `(state, UnpairedBatch) -> (state, metrics)`.

    KTO's reference point is estimated over the whole batch before the first micro-batch, so that the update does not
    depend on how the batch is cut.

    Args:
      logps_fn: the model.
      tx: optax transform.
      loss: takes the arrays it names from `losses.UNPAIRED_VOCABULARY` and returns f32[B]: `losses.kto_loss`,
        `losses.bco_unpaired_loss`, `losses.apo_zero_unpaired_loss` or your own.
      beta: > 0, bound to the loss if it has a `beta`, and the scale of the implicit rewards in the metrics; None
        takes the loss's own, or 1 for a loss without one.
      num_microbatches: see `make_train_step`.

    Returns:
      The step. Its metrics are those of the preference step, each over the rows of its kind (`chosen`: desirable), and
      `kl` where the loss asks for one. `rewards/margins` is the difference of the two means; a kind that a batch has no
      row of counts as 0.
    """
    needs_kl = "kl" in arguments(with_beta(loss, beta)[0], UNPAIRED_VOCABULARY)
    update = make_train_step(
        _rows_objective(logps_fn, loss, beta), tx, num_microbatches=num_microbatches
    )

    def step(state: TrainState, batch: UnpairedBatch) -> tuple[TrainState, Metrics]:
        check_kind(UnpairedBatch, batch=batch)
        kl = jnp.zeros(())
        if needs_kl:
            kl = reference_point(
                logps_fn, state.params, batch, num_microbatches=num_microbatches
            )
        state, metrics = update(state, (batch, _repeated(kl, batch)))
        metrics["rewards/margins"] = (
            metrics["rewards/chosen"] - metrics["rewards/rejected"]
        )
        return state, metrics

    return step


def _repeated(kl: jax.Array, batch: UnpairedBatch) -> jax.Array:
    """f32[B]: the one number on every row, so that it is cut into micro-batches with them."""
    return jnp.broadcast_to(kl, batch.sequences.tokens.shape[:1])


def _rows_objective(logps_fn: LogpsFn, loss: Loss, beta: float | None) -> Objective:
    """`(params, (UnpairedBatch, kl f32[B] of one number)) -> (Mean over rows, metrics)`."""
    loss, beta = with_beta(loss, beta)
    needed = arguments(loss, UNPAIRED_VOCABULARY)
    try_out(loss, needed)

    def objective(params: Params, batch_and_kl: tuple[UnpairedBatch, jax.Array]):
        batch, kl = batch_and_kl
        logps = summed_logps(logps_fn, params, batch.sequences)
        (desirable,) = bools_like(logps, desirable=batch.desirable)
        weight = row_weights(batch.weight, lengths(batch.sequences) > 0)
        kept = weight > 0
        logps = jnp.where(kept, logps, 0.0)
        ref_logps = jnp.zeros_like(logps)
        if batch.ref_logps is not None:
            check_floats(logps, ref_logps=batch.ref_logps)
            ref_logps = jnp.where(kept, batch.ref_logps, 0.0)
        elif "ref_logps" in needed:
            raise ValueError(
                "the loss asks for ref_logps, which the batch lacks; `with_ref_logps` fills them in"
            )
        available = {
            "logps": logps,
            "ref_logps": ref_logps,
            "desirable": desirable,
            "kl": kl[0],
        }
        values = loss(**{name: available[name] for name in needed})
        check_rowwise(values, logps, loss)
        mean = functools.partial(row_mean, weight=weight)
        chosen = functools.partial(row_mean, weight=jnp.where(desirable, weight, 0.0))
        rejected = functools.partial(row_mean, weight=jnp.where(desirable, 0.0, weight))
        rewards = beta * (logps - ref_logps)
        metrics: dict[str, Mean] = {
            "rewards/chosen": chosen(rewards),
            "rewards/rejected": rejected(rewards),
            "logps/chosen": chosen(logps),
            "logps/rejected": rejected(logps),
        }
        if "kl" in needed:
            metrics["kl"] = mean(kl)
        return mean(values), metrics

    return objective
