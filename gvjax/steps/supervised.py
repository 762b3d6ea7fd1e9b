"""Supervised fine-tuning: maximum likelihood of the completions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gvjax import masked
from gvjax.losses import token_nll_loss
from gvjax.steps.core import make_train_step
from gvjax.steps.sequences import (
    check_sequences,
    completion_logps,
    predicted_mask,
)
from gvjax.types import LogpsFn, Objective, Params, SequenceBatch, Step

TokenLoss = Callable[[jax.Array, jax.Array], jax.Array]


def supervised_objective(
    logps_fn: LogpsFn, *, loss: TokenLoss = token_nll_loss
) -> Objective:
    """Negative log-likelihood per completion token.

        loss = −Σ_{b,t} m_{b,t} log π(y_{b,t} | y_{b,<t}) / Σ_{b,t} m_{b,t}

    Args:
      logps_fn: the model; for packed batches it must also take `segments=`.
      loss: `(logps f32[B, T], mask) -> f32[B, T]`; `losses.dft_loss` is another.

    Returns:
      `(params, SequenceBatch) -> (Mean over tokens, metrics)`.
    """

    def objective(params: Params, batch: SequenceBatch):
        check_sequences(batch=batch)
        logps = completion_logps(logps_fn, params, batch)
        mask = predicted_mask(batch)
        tokens = jnp.sum(mask, dtype=jnp.float32)
        metrics = {
            "completions/mean_length": masked.Mean(tokens, _completions(batch, mask))
        }
        return masked.weighted_mean(loss(logps, mask), mask), metrics

    return objective


def _completions(batch: SequenceBatch, mask: jax.Array) -> jax.Array:
    """f32[]: completions that have a token; a packed row holds several."""
    if batch.segments is None:
        return jnp.sum(jnp.any(mask, axis=1), dtype=jnp.float32)
    seen = jax.lax.cummax(jnp.where(mask, jnp.asarray(batch.segments), 0), axis=1)
    before = jnp.pad(seen[:, :-1], ((0, 0), (1, 0)))
    return jnp.sum(seen > before, dtype=jnp.float32)


def make_supervised_step(
    logps_fn: LogpsFn,
    tx: optax.GradientTransformation,
    *,
    loss: TokenLoss = token_nll_loss,
    num_microbatches: int = 1,
) -> Step:
    """Builds the step of supervised fine-tuning, `(state, SequenceBatch) -> (state, metrics)`.

    Args:
      logps_fn: the model.
      tx: optax transform.
      loss: see `supervised_objective`.
      num_microbatches: see `make_train_step`.
    """
    objective = supervised_objective(logps_fn, loss=loss)
    return make_train_step(objective, tx, num_microbatches=num_microbatches)
