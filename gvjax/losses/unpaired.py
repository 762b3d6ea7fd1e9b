"""Losses on single completions marked desirable or not.

Each row is one completion with its log-ratio  ρ = log π(y|x)/π_ref(y|x), from sums over the completion.
"""

import chex
import jax
import jax.numpy as jnp

from gvjax.losses.contract import (
    bools_like,
    float_rows,
    require_non_negative,
    require_positive,
)


def kto_loss(
    logps: jax.Array,
    ref_logps: jax.Array,
    desirable: jax.Array,
    kl: jax.Array,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> jax.Array:
    """Kahneman-Tversky optimisation loss, per completion.

        desirable:   loss = λ_D (1 − σ(β(ρ − z)))
        undesirable: loss = λ_U (1 − σ(β(z − ρ)))

    At the reference policy (z = 0) it is half the weight.

    Args:
      logps: f32[B], nats, summed over the completion, under the policy.
      ref_logps: f32[B], the same under the reference policy.
      desirable: bool[B].
      kl: f32[], the reference point z >= 0 from `kto_kl`; constant for the gradient.
      beta: > 0.
      desirable_weight, undesirable_weight: λ_D, λ_U >= 0; the paper wants λ_D n_D / (λ_U n_U) between 1 and 3/2.

    Returns:
      f32[B], unreduced.

    References:
      Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306. TRL's "kto".
    """
    require_positive(beta=beta)
    log_ratio, desirable, weight = _unpaired(
        logps, ref_logps, desirable, desirable_weight, undesirable_weight
    )
    chex.assert_rank(kl, 0, custom_message="argument kl")
    origin = jax.lax.stop_gradient(jnp.asarray(kl, jnp.float32))
    distance = jnp.where(desirable, log_ratio - origin, origin - log_ratio)
    return weight * jax.nn.sigmoid(-beta * distance)


def kto_kl(kl_logps: jax.Array, ref_kl_logps: jax.Array) -> jax.Array:
    """KTO's reference point: a biased, cheap estimate of how far the policy has moved.

        z = max(0, mean log π(y'|x)/π_ref(y'|x)),   y' the completion of another prompt

    Args:
      kl_logps: f32[B], nats, summed over mismatched completions, under the policy.
      ref_kl_logps: f32[B], the same under the reference policy.

    Returns:
      f32[], without gradient.

    References:
      Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306. TRL clamps each process's mean after gathering; this
      is the mean over the rows given.
    """
    policy, reference = float_rows(kl_logps=kl_logps, ref_kl_logps=ref_kl_logps)
    return jax.lax.stop_gradient(jnp.maximum(jnp.mean(policy - reference), 0.0))


def apo_zero_unpaired_loss(
    logps: jax.Array,
    ref_logps: jax.Array,
    desirable: jax.Array,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> jax.Array:
    """Anchored preference optimisation, zero, on single completions: KTO with z = 0.

        desirable:   loss = λ_D (1 − σ(βρ))
        undesirable: loss = λ_U σ(βρ)

    Args:
      logps: f32[B], nats, summed over the completion, under the policy.
      ref_logps: f32[B], the same under the reference policy.
      desirable: bool[B].
      beta: > 0.
      desirable_weight, undesirable_weight: λ_D, λ_U >= 0.

    Returns:
      f32[B], unreduced.

    References:
      D'Oosterlinck et al., 2024, https://arxiv.org/abs/2408.06266, Eq. 7 by halves. TRL's "apo_zero_unpaired".
    """
    require_positive(beta=beta)
    log_ratio, desirable, weight = _unpaired(
        logps, ref_logps, desirable, desirable_weight, undesirable_weight
    )
    return weight * jax.nn.sigmoid(
        jnp.where(desirable, -beta * log_ratio, beta * log_ratio)
    )


def bco_unpaired_loss(
    logps: jax.Array,
    ref_logps: jax.Array,
    desirable: jax.Array,
    *,
    beta: float = 0.1,
    delta: jax.Array | float = 0.0,
) -> jax.Array:
    """Binary classifier optimisation loss, per completion.

        desirable:   loss = −log σ(βρ − δ)
        undesirable: loss = −log σ(δ − βρ)

    Without the paper's reweighting of undesirable rows for unlike prompts; give those rows their weight in the batch.

    Args:
      logps: f32[B], nats, summed over the completion, under the policy.
      ref_logps: f32[B], the same under the reference policy.
      desirable: bool[B].
      beta: > 0.
      delta: f32[] reward shift δ, the running mean of βρ over both kinds; constant for the gradient.

    Returns:
      f32[B], unreduced.

    References:
      Jung et al., 2024, https://arxiv.org/abs/2404.04656. TRL's BCO trainer (TRL 1.0).
    """
    require_positive(beta=beta)
    log_ratio, desirable, _ = _unpaired(logps, ref_logps, desirable, 1.0, 1.0)
    shifted = beta * log_ratio - jax.lax.stop_gradient(jnp.asarray(delta, jnp.float32))
    return -jax.nn.log_sigmoid(jnp.where(desirable, shifted, -shifted))


def _unpaired(
    logps: jax.Array,
    ref_logps: jax.Array,
    desirable: jax.Array,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    require_non_negative(
        desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
    policy, reference = float_rows(logps=logps, ref_logps=ref_logps)
    (flags,) = bools_like(policy, desirable=desirable)
    weight = jnp.where(flags, desirable_weight, undesirable_weight)
    return policy - reference, flags, weight.astype(jnp.float32)
