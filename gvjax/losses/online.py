"""Terms that are added to a preference loss when the policy samples while it trains."""

import jax
import jax.numpy as jnp

from gvjax.losses.contract import (
    bools_like,
    float_rows,
    require_non_negative,
    require_positive,
)
from gvjax.losses.preference import dpo_loss


def xpo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    chosen_from_reference: jax.Array,
    *,
    beta: float = 0.1,
    alpha: float = 5e-6,
) -> jax.Array:
    """Exploratory preference optimisation loss, per pair: DPO plus optimism.

        loss = −log σ(β h) + α log π(ỹ)

    where each pair holds one completion of the policy and one, ỹ, of the reference policy. Lowering log π(ỹ) raises
    what the policy has not yet tried.

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      ref_chosen_logps, ref_rejected_logps: f32[B], the same under the reference policy.
      chosen_from_reference: bool[B], True where ỹ is the chosen completion, False where it is the rejected one.
      beta: > 0.
      alpha: α >= 0, weight of the optimism; 0 gives DPO.

    Returns:
      f32[B], unreduced.

    References:
      Xie et al., 2024, https://arxiv.org/abs/2405.21046. TRL's XPO trainer (TRL 1.0).
    """
    require_non_negative(alpha=alpha)
    preference = dpo_loss(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta
    )
    chosen, rejected = float_rows(
        chosen_logps=chosen_logps, rejected_logps=rejected_logps
    )
    (flags,) = bools_like(chosen, chosen_from_reference=chosen_from_reference)
    return preference + alpha * jnp.where(flags, chosen, rejected)


def hypo_kl_loss(
    logps: jax.Array, ref_logps: jax.Array, *, kl_coef: float
) -> jax.Array:
    """HyPO's on-policy KL term, per completion sampled from the policy.

        value    = λ ρ,            ρ = log π(y)/π_ref(y)
        gradient = λ ρ ∇log π(y)

    Its mean over y ~ π has the value and the gradient of λ KL(π ‖ π_ref); the plain gradient of ρ would have mean 0.
    Added, on the policy's own samples, to DPO on the offline pairs. The paper writes the surrogate log π · sg(ρ), which
    has the same gradient.

    Args:
      logps: f32[B], nats, summed over the completion, under the policy, which also sampled it.
      ref_logps: f32[B], the same under the reference policy.
      kl_coef: λ > 0.

    Returns:
      f32[B], unreduced.

    References:
      Song et al., 2024, https://arxiv.org/abs/2406.01462. TRL has none.
    """
    require_positive(kl_coef=kl_coef)
    policy, reference = float_rows(logps=logps, ref_logps=ref_logps)
    log_ratio = jax.lax.stop_gradient(policy - reference)
    score = policy - jax.lax.stop_gradient(policy)
    return kl_coef * log_ratio * (1.0 + score)
