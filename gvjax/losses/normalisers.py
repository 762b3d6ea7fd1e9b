"""Normalisers: how token losses become one number.

Which divisor is used is where algorithms quietly differ, so it is a named function that returns an undivided `Mean`.
Means add exactly over parts of a batch split by rows, and a completion without tokens weighs nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gvjax import masked
from gvjax.losses.contract import require_positive
from gvjax.masked import Mean

Normaliser = Callable[[jax.Array, jax.Array], Mean]
"""`(losses f32[B, T], mask bool[B, T]) -> Mean`."""


def per_token(losses: jax.Array, mask: jax.Array) -> Mean:
    """Mean over all tokens of the batch: every token counts the same (DAPO, and PPO by habit).

    Args:
      losses: f32[B, T].
      mask: bool[B, T].

    Returns:
      Mean of scalars: the sum of losses, and the number of tokens.
    """
    return masked.weighted_mean(losses, mask)


def per_sequence_mean(losses: jax.Array, mask: jax.Array) -> Mean:
    """Mean over completions of each one's mean over tokens: every completion counts the same (GRPO).

    TRL counts empty completions in the divisor; here they weigh nothing.

    Args:
      losses: f32[B, T].
      mask: bool[B, T].

    Returns:
      Mean of scalars: the sum of the completions' means, and the number of completions that have a token.
    """
    means = masked.mean(losses, mask, axis=1)
    return Mean(jnp.sum(means), _occupied(mask))


def per_sequence_sum(losses: jax.Array, mask: jax.Array) -> Mean:
    """Mean over completions of each one's sum over tokens: the whole completion is one action (REINFORCE, RLOO).

    Args:
      losses: f32[B, T].
      mask: bool[B, T].

    Returns:
      Mean of scalars: the sum of losses, and the number of completions that have a token.
    """
    return Mean(masked.sum(losses, mask), _occupied(mask))


def constant(length: float) -> Normaliser:
    """Makes the normaliser that divides each completion's sum by the same length (Dr. GRPO).

    Unlike `per_sequence_mean` it does not favour long wrong answers; unlike `per_token` a completion's weight does not
    hang on its neighbours' lengths. TRL counts empty completions in the divisor; here they weigh nothing.

    Args:
      length: > 0, tokens; usually the longest completion that may be sampled.

    Returns:
      `(losses f32[B, T], mask bool[B, T]) -> Mean` of the sum of losses and `length` times the number of completions
      that have a token.

    Raises:
      ValueError: length is not > 0.

    References:
      Liu et al., 2025, https://arxiv.org/abs/2503.20783.
    """
    require_positive(length=length)

    def per_constant(losses: jax.Array, mask: jax.Array) -> Mean:
        return Mean(masked.sum(losses, mask), length * _occupied(mask))

    return per_constant


def _occupied(mask: jax.Array) -> jax.Array:
    return jnp.sum(jnp.any(mask, axis=1), dtype=jnp.float32)
