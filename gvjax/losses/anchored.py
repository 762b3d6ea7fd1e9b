"""Losses on pairs that also say where each completion should stand against the reference policy.

A loss on the gap alone is content when both log-probabilities fall together. These look at the two log-ratios

    w = log π(y_w|x)/π_ref(y_w|x),   l = log π(y_l|x)/π_ref(y_l|x)

one by one. Log-probabilities are sums over the completion.
"""

import jax
import jax.numpy as jnp

from gvjax.losses.contract import float_rows, require_positive
from gvjax.losses.preference import log_ratios


def nca_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float = 0.01,
) -> jax.Array:
    """Noise contrastive alignment loss for two completions, per pair.

        loss = −log σ(βw) − ½ log σ(−βw) − ½ log σ(−βl)

    At the reference policy it is 2 ln 2.

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      ref_chosen_logps, ref_rejected_logps: f32[B], the same under the reference policy.
      beta: > 0. TRL's default is 0.1.

    Returns:
      f32[B], unreduced.

    References:
      Chen et al., 2024, https://arxiv.org/abs/2402.05369. TRL's "nca_pair".
    """
    require_positive(beta=beta)
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    return (
        -jax.nn.log_sigmoid(beta * chosen)
        - 0.5 * jax.nn.log_sigmoid(-beta * chosen)
        - 0.5 * jax.nn.log_sigmoid(-beta * rejected)
    )


def bco_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float = 0.1,
    delta: jax.Array | float = 0.0,
) -> jax.Array:
    """Binary classifier optimisation loss, per pair.

        loss = −log σ(βw − δ) − log σ(−(βl − δ))

    The paper's δ is the running mean of the implicit rewards of both kinds, ½(E[βw] + E[βl]). It is an argument here and
    not hidden state: keep it outside and pass it in. TRL's DPO trainer has δ = 0, its BCO trainer the running mean.

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      ref_chosen_logps, ref_rejected_logps: f32[B], the same under the reference policy.
      beta: > 0.
      delta: f32[] reward shift δ, constant for the gradient.

    Returns:
      f32[B], unreduced.

    References:
      Jung et al., 2024, https://arxiv.org/abs/2404.04656. TRL's "bco_pair".
    """
    require_positive(beta=beta)
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    shift = jax.lax.stop_gradient(jnp.asarray(delta, jnp.float32))
    return -jax.nn.log_sigmoid(beta * chosen - shift) - jax.nn.log_sigmoid(
        shift - beta * rejected
    )


def sppo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    chosen_probability: jax.Array,
    *,
    beta: float = 1e-3,
) -> jax.Array:
    """Self-play preference optimisation loss with a judge's win probability p, per pair.

        loss = (w − (p − ½)/β)² + (l + (p − ½)/β)²

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      ref_chosen_logps, ref_rejected_logps: f32[B], the same under the policy of the previous iteration.
      chosen_probability: f32[B] in [0, 1], probability that `chosen` beats `rejected`. The paper estimates each
        completion's probability against the whole policy; with two completions a pair's own stands for both.
      beta: > 0; 1/β is the paper's η, 1000 there.

    Returns:
      f32[B], unreduced.

    References:
      Wu et al., 2024, https://arxiv.org/abs/2405.00675, Eq. 4.7.
    """
    require_positive(beta=beta)
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    probability, _ = float_rows(
        chosen_probability=chosen_probability, chosen_logps=chosen_logps
    )
    target = (probability - 0.5) / beta
    return jnp.square(chosen - target) + jnp.square(rejected + target)


def sppo_hard_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float = 1e-3,
) -> jax.Array:
    """Self-play preference optimisation loss with p = 1, per pair.

        loss = (w − 1/(2β))² + (l + 1/(2β))²

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      ref_chosen_logps, ref_rejected_logps: f32[B], the same under the policy of the previous iteration.
      beta: > 0; 1/β is the paper's η, 1000 there. TRL's default is 0.1.

    Returns:
      f32[B], unreduced.

    References:
      Wu et al., 2024, https://arxiv.org/abs/2405.00675, Eq. 4.7 with hard probabilities. TRL's "sppo_hard".
    """
    chosen = jnp.asarray(chosen_logps)
    return sppo_loss(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        jnp.ones(chosen.shape, jnp.float32),
        beta=beta,
    )


def apo_zero_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float = 0.1,
) -> jax.Array:
    """Anchored preference optimisation, zero: chosen up, rejected down.

        loss = 1 − σ(βw) + σ(βl)

    For data whose chosen completions are better than what the policy writes. At the reference policy it is 1.

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      ref_chosen_logps, ref_rejected_logps: f32[B], the same under the reference policy.
      beta: > 0.

    Returns:
      f32[B], unreduced.

    References:
      D'Oosterlinck et al., 2024, https://arxiv.org/abs/2408.06266, Eq. 7, plus the constant 1. TRL's "apo_zero".
    """
    require_positive(beta=beta)
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: float = 0.1,
) -> jax.Array:
    """Anchored preference optimisation, down: both down, rejected further.

        loss = σ(βw) + 1 − σ(β(w − l))

    For data whose chosen completions are worse than what the policy writes. At the reference policy it is 1.

    Args:
      chosen_logps, rejected_logps: f32[B], nats, summed over the completion, under the policy.
      ref_chosen_logps, ref_rejected_logps: f32[B], the same under the reference policy.
      beta: > 0.

    Returns:
      f32[B], unreduced.

    References:
      D'Oosterlinck et al., 2024, https://arxiv.org/abs/2408.06266, Eq. 8, plus the constant 1. TRL's "apo_down".
    """
    require_positive(beta=beta)
    chosen, rejected = log_ratios(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))
