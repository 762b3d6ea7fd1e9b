"""Losses that regress the policy's implicit reward on rewards."""

import jax
import jax.numpy as jnp

from gvjax.losses.contract import float_rows, require_positive


def rebel_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    margin: jax.Array,
    *,
    eta: float,
) -> jax.Array:
    """REBEL: regress the change in log-ratio on the difference of rewards, per pair.

        loss = ( (1/η) (log π(y)/π_t(y) − log π(y')/π_t(y')) − (r(y) − r(y')) )²

    It does not matter which of the two is better, as long as the margin has its sign.

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completions y and y', under the policy.
      ref_chosen_logps, ref_rejected_logps: f32[B], the same under π_t, *the policy that sampled them*.
      margin: f32[B], r(y) − r(y').
      eta: > 0, step size: larger moves further for the same rewards. 1/η is a KL weight, like β.

    Returns:
      f32[B], unreduced. At π = π_t it is margin².

    References:
      Gao et al., 2024, https://arxiv.org/abs/2404.16767, Algorithm 1. TRL has none.
    """
    require_positive(eta=eta)
    chosen, rejected, ref_chosen, ref_rejected, difference = float_rows(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
        margin=margin,
    )
    gap = (chosen - ref_chosen) - (rejected - ref_rejected)
    return jnp.square(gap / eta - difference)


def a_star_po_loss(
    logps: jax.Array,
    ref_logps: jax.Array,
    rewards: jax.Array,
    optimal_values: jax.Array,
    *,
    beta: float = 1e-3,
) -> jax.Array:
    """A*-PO: regress the implicit reward on the optimal advantage, per completion.

        loss = (β log π(y|x)/π_ref(y|x) − (r(x, y) − V*(x)))²,   V*(x) = β₁ log E_ref exp(r(x, y)/β₁)

    Args:
      logps: f32[B], nats, summed over the completion, under the policy.
      ref_logps: f32[B], the same under the reference policy.
      rewards: f32[B].
      optimal_values: f32[B], V* of each row's prompt, estimated beforehand from the reference policy's samples.
      beta: > 0; the paper's β₂.

    Returns:
      f32[B], unreduced.

    References:
      Brantley et al., 2025, https://arxiv.org/abs/2505.20686. TRL's A*-PO trainer.
    """
    require_positive(beta=beta)
    policy, reference, reward, value = float_rows(
        logps=logps, ref_logps=ref_logps, rewards=rewards, optimal_values=optimal_values
    )
    return jnp.square(beta * (policy - reference) - (reward - value))
