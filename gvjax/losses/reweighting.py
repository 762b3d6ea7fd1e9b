"""Other ways to come from token log-probabilities to the sums and row weights of a preference loss."""

import jax
import jax.numpy as jnp

from gvjax import masked
from gvjax.losses.contract import bools_like, float_tokens, lengths_like


def length_desensitised_logps(
    logps: jax.Array, mask: jax.Array, shared_lengths: jax.Array, *, alpha: float
) -> jax.Array:
    """Completion log-probability in which tokens beyond the shared length count less (LD-DPO).

        log π̃(y) = Σ_{t <= l} log π(y_t) + α Σ_{t > l} log π(y_t),   l = min(|y_w|, |y_l|)

    Used for policy and reference alike, in place of sums, it turns DPO into LD-DPO.

    Args:
      logps: f32[B, T], nats, per token.
      mask: bool[B, T], True on completion tokens.
      shared_lengths: int32[B], l, the shorter completion's tokens.
      alpha: in [0, 1]; 1 gives the plain sum, 0 cuts both completions to l tokens.

    Returns:
      f32[B], nats.

    Raises:
      ValueError: alpha is outside [0, 1].

    References:
      Liu et al., 2024, https://arxiv.org/abs/2409.06411. TRL's `ld_alpha`.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"alpha is {alpha}, but is the share kept of what exceeds the shared length and must lie in [0, 1]; 1 gives "
            "plain DPO"
        )
    (logps,) = float_tokens(logps=logps)
    (mask,) = bools_like(logps, mask=mask)
    lengths_like(logps[:, 0], shared_lengths=shared_lengths)
    position = jnp.cumsum(mask, axis=1)
    shared = position <= shared_lengths[:, None]
    kept = masked.select(logps, mask)
    return jnp.sum(jnp.where(shared, kept, alpha * kept), axis=1)


def wpo_weights(
    logps: jax.Array, mask: jax.Array, log_collisions: jax.Array | None = None
) -> jax.Array:
    """Weight of a completion in weighted preference optimisation: how likely the policy would write it.

        weight = exp( (1/|y|) Σ_t log π(y_t) − log Σ_v π(v)² )

    A pair's weight is the product of its two completions' weights. The loss is then Σ weight · loss / B: the divisor
    counts rows, not weights.

    Args:
      logps: f32[B, T], nats, per token, under the policy.
      mask: bool[B, T], True on completion tokens.
      log_collisions: f32[B, T], log Σ_v π(v | y_<t)² at each position, which makes a weight 1 on average for what the
        policy samples; None leaves it out (the paper's unaligned weight).

    Returns:
      f32[B], without gradient; 1 for an empty completion.

    References:
      Zhou et al., 2024, https://arxiv.org/abs/2406.11827, Eq. 2. TRL's `use_weighting`.
    """
    (logps,) = float_tokens(logps=logps)
    (mask,) = bools_like(logps, mask=mask)
    if log_collisions is not None:
        logps, collisions = float_tokens(logps=logps, log_collisions=log_collisions)
        logps = masked.select(logps, mask) - masked.select(collisions, mask)
    return jax.lax.stop_gradient(jnp.exp(masked.mean(logps, mask, axis=1)))
