"""Learning from pairs with the policy itself: DPO and its relatives, offline or on freshly labelled samples."""

import functools
import inspect
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import optax

from gvjax.losses import VOCABULARY, arguments, couples_rows, dpo_loss
from gvjax.losses.contract import require_positive, try_out
from gvjax.steps.core import make_train_step
from gvjax.steps.sequences import (
    check_floats,
    check_kind,
    flat,
    paired_lengths,
    paired_logps,
    row_mean,
    row_weights,
)
from gvjax.types import LogpsFn, Objective, Params, PreferenceBatch, Step

PreferenceLoss = Callable[..., jax.Array]


def make_dpo_step(
    logps_fn: LogpsFn,
    tx: optax.GradientTransformation,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    num_microbatches: int = 1,
) -> Step:
    """Builds the DPO step, `(state, PreferenceBatch) -> (state, metrics)`; see `losses.preference.dpo_loss`.

    Args:
      logps_fn: the model.
      tx: optax transform.
      beta: > 0, how closely the policy is held to the reference.
      label_smoothing: in [0, 0.5), share of labels taken to be flipped (conservative DPO).
      num_microbatches: see `make_train_step`.
    """
    loss = functools.partial(dpo_loss, label_smoothing=label_smoothing)
    return make_preference_step(
        logps_fn, tx, loss=loss, beta=beta, num_microbatches=num_microbatches
    )


def make_preference_step(
    logps_fn: LogpsFn,
    tx: optax.GradientTransformation,
    *,
    loss: PreferenceLoss = dpo_loss,
    beta: float | None = None,
    num_microbatches: int = 1,
) -> Step:
    """Builds the step of any preference loss, `(state, PreferenceBatch) -> (state, metrics)`.

    Offline DPO when the pairs are data; online DPO when they are samples labelled by a reward model, hard (best
    against worst) or soft (`chosen_probability` with `soft_dpo_loss`).

    Args:
      logps_fn: the model.
      tx: optax transform.
      loss: takes the arrays it names (see `losses.arguments`) and returns f32[B].
      beta: > 0, bound to the loss if it has a `beta`, and the scale of the implicit rewards in the metrics; None
        takes the loss's own, that of the first part which has one, or 1 for a loss without one.
      num_microbatches: see `make_train_step`.

    Raises:
      ValueError: as `preference_objective`, or more than one micro-batch for a loss that couples rows.
    """
    if num_microbatches > 1 and couples_rows(loss):
        raise ValueError(
            f"num_microbatches is {num_microbatches}, but {_name(loss)} compares rows with each other and would mean"
            " something else on each part of a batch; use num_microbatches=1"
        )
    objective = preference_objective(logps_fn, loss=loss, beta=beta)
    return make_train_step(objective, tx, num_microbatches=num_microbatches)


def preference_objective(
    logps_fn: LogpsFn, *, loss: PreferenceLoss = dpo_loss, beta: float | None = None
) -> Objective:
    """The mean of a preference loss over pairs, with TRL's metrics.

    Rows in which either completion is empty have weight 0. To losses that couple rows (AOT) all rows belong: an empty
    completion then stands there with the log-ratio 0.

    Packed pairs are pairs like others; how rows are packed changes no number.

    Args:
      logps_fn: the model.
      loss, beta: see `make_preference_step`.

    Returns:
      `(params, PreferenceBatch) -> (Mean over pairs, metrics)`.

    Raises:
      ValueError: if beta or another hyper-parameter of the loss is impossible, the loss asks for an array that no batch
        has, or (when traced) that this one lacks, or the batch weighs rows that the loss couples.
    """
    loss, beta = with_beta(loss, beta)
    needed = arguments(loss, (*VOCABULARY, "chosen_from_reference"))
    try_out(loss, needed)
    coupled = couples_rows(loss)

    def objective(params: Params, batch: PreferenceBatch):
        check_kind(PreferenceBatch, batch=batch)
        if coupled and batch.weight is not None:
            raise ValueError(
                f"the batch has row weights, but {_name(loss)} compares rows with each other and cannot weigh one; leave"
                " `weight` out (and the incomplete last batch of an epoch)"
            )
        chosen, rejected = paired_logps(logps_fn, params, batch)
        chosen_lengths, rejected_lengths = paired_lengths(batch)
        weight = row_weights(
            flat(batch.weight), (chosen_lengths > 0) & (rejected_lengths > 0) | coupled
        )
        kept = weight > 0
        optional = {
            "ref_chosen_logps": flat(batch.ref_chosen_logps),
            "ref_rejected_logps": flat(batch.ref_rejected_logps),
            "chosen_probability": _or_ones(flat(batch.chosen_probability), chosen),
            "margin": flat(batch.margin),
        }
        check_floats(chosen, **optional)
        # Before the loss and not after it: the gradient of what a row of weight 0 holds may be NaN, and stops here.
        chosen, rejected = jnp.where(kept, chosen, 0.0), jnp.where(kept, rejected, 0.0)
        available = {
            "chosen_logps": chosen,
            "rejected_logps": rejected,
            "chosen_lengths": chosen_lengths,
            "rejected_lengths": rejected_lengths,
            "chosen_from_reference": flat(batch.chosen_from_reference),
            **optional,
        }
        missing = [name for name in needed if available[name] is None]
        if missing:
            raise ValueError(
                f"the loss {_name(loss)} asks for {', '.join(missing)}, which the batch lacks;"
                " `with_ref_logps` fills in the reference's, the data must bring the others"
            )
        values = loss(**{name: available[name] for name in needed})
        check_rowwise(values, chosen, loss)
        mean = functools.partial(row_mean, weight=weight)
        ref_chosen = _or_zeros(optional["ref_chosen_logps"], chosen)
        ref_rejected = _or_zeros(optional["ref_rejected_logps"], rejected)
        chosen_rewards = beta * (chosen - ref_chosen)
        rejected_rewards = beta * (rejected - ref_rejected)
        metrics = {
            "rewards/chosen": mean(chosen_rewards),
            "rewards/rejected": mean(rejected_rewards),
            "rewards/margins": mean(chosen_rewards - rejected_rewards),
            "rewards/accuracies": mean((chosen_rewards > rejected_rewards) * 1.0),
            "logps/chosen": mean(chosen),
            "logps/rejected": mean(rejected),
        }
        return mean(values), metrics

    return objective


def with_beta(loss: PreferenceLoss, beta: float | None) -> tuple[PreferenceLoss, float]:
    """The loss with beta bound, if it has one, and the beta of the implicit rewards."""
    if beta is not None:
        require_positive(beta=beta)
    if beta is not None:
        takes_one = "beta" in inspect.signature(loss).parameters
        return functools.partial(loss, beta=beta) if takes_one else loss, beta
    return loss, next(_own_betas(loss), 1.0)


def _own_betas(loss: PreferenceLoss) -> Iterator[float]:
    """Yields the betas that a loss, or each loss that it is made of, has by default or was bound to."""
    parameter = inspect.signature(loss).parameters.get("beta")
    if parameter is not None:
        if parameter.default is parameter.empty:
            raise ValueError(
                f"{_name(loss)} has no default for beta; pass for example beta=0.1"
            )
        yield parameter.default
        return
    while isinstance(loss, functools.partial):
        loss = loss.func
    for part in getattr(loss, "parts", ()):
        yield from _own_betas(part)


def check_rowwise(values: jax.Array, rows: jax.Array, loss: PreferenceLoss) -> None:
    """Raises ValueError unless a loss returned one number a row."""
    if jnp.shape(values) != rows.shape:
        raise ValueError(
            f"the loss {_name(loss)} returned shape {jnp.shape(values)} for {rows.shape[0]} rows; return one loss a row"
            " and leave the mean to the step"
        )


def _or_zeros(values: jax.Array | None, like: jax.Array) -> jax.Array:
    return jnp.zeros_like(like) if values is None else values


def _or_ones(values: jax.Array | None, like: jax.Array) -> jax.Array:
    return jnp.ones_like(like) if values is None else values


def _name(loss: PreferenceLoss) -> str:
    while isinstance(loss, functools.partial):
        loss = loss.func
    return getattr(loss, "__name__", repr(loss))
