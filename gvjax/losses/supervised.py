"""Token losses for training on demonstrations."""

import jax
import jax.numpy as jnp

from gvjax import masked
from gvjax.losses.contract import bools_like, float_tokens


def token_nll_loss(logps: jax.Array, mask: jax.Array) -> jax.Array:
    """Negative log-likelihood, per token.

        loss = −log π(y_t)

    Args:
      logps: f32[B, T], nats.
      mask: bool[B, T], True on the tokens to learn.

    Returns:
      f32[B, T], unreduced, 0 where the mask is False.
    """
    (logps,) = float_tokens(logps=logps)
    (mask,) = bools_like(logps, mask=mask)
    return -masked.select(logps, mask)


def dft_loss(logps: jax.Array, mask: jax.Array) -> jax.Array:
    """Dynamic fine-tuning loss, per token: likelihood weighted by the token's own probability.

        loss = −sg(π(y_t)) log π(y_t)

    Args:
      logps: f32[B, T], nats.
      mask: bool[B, T], True on the tokens to learn.

    Returns:
      f32[B, T], unreduced, 0 where the mask is False.

    References:
      Wu et al., 2025, https://arxiv.org/abs/2508.05629. TRL's SFT trainer with "dft".
    """
    losses = token_nll_loss(logps, mask)
    return jax.lax.stop_gradient(jnp.exp(-losses)) * losses
