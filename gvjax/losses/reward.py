"""Losses for reward models trained on pairs."""

import jax
import jax.numpy as jnp

from gvjax.losses.contract import float_rows, require_smoothing
from gvjax.losses.preference import cross_entropy


def bradley_terry_loss(
    chosen_rewards: jax.Array,
    rejected_rewards: jax.Array,
    *,
    margin: jax.Array | None = None,
    label_smoothing: float = 0.0,
    chosen_probability: jax.Array | None = None,
) -> jax.Array:
    """Bradley-Terry negative log-likelihood, per pair.

        loss = −q log σ(Δ) − (1 − q) log σ(−Δ),   Δ = r_w − r_l − m,   q = p(1 − ε) + (1 − p)ε

    With the defaults (m = 0, p = 1, ε = 0): −log σ(r_w − r_l). Rewards must be `[B]`: with `[B, 1]` a margin `[B]` would
    broadcast to `[B, B]`, so any other rank raises.

    Args:
      chosen_rewards, rejected_rewards: f32[B].
      margin: f32[B] in reward units, how much better `chosen` must be scored; None means 0.
      label_smoothing: ε in [0, 0.5), the probability that a label is flipped.
      chosen_probability: f32[B] in [0, 1], probability p that `chosen` is the better one; None means 1.

    Returns:
      f32[B], unreduced.

    References:
      Bradley & Terry, 1952. Ouyang et al., 2022, https://arxiv.org/abs/2203.02155, Eq. 1. Touvron et al., 2023,
      https://arxiv.org/abs/2307.09288, Eq. 2, for the margin. TRL's reward trainer, which has neither ε nor p.
    """
    require_smoothing(label_smoothing)
    given = {"chosen_rewards": chosen_rewards, "rejected_rewards": rejected_rewards}
    optional = {"margin": margin, "chosen_probability": chosen_probability}
    given |= {name: array for name, array in optional.items() if array is not None}
    rows = dict(zip(given, float_rows(**given)))
    logits = rows["chosen_rewards"] - rows["rejected_rewards"] - rows.get("margin", 0.0)
    probability = rows.get("chosen_probability", 1.0)
    smoothed = probability * (1.0 - label_smoothing) + (1.0 - probability) * (
        label_smoothing
    )
    return cross_entropy(smoothed, logits)


def centering_penalty(
    chosen_rewards: jax.Array, rejected_rewards: jax.Array
) -> jax.Array:
    """Penalty that fixes the level of the rewards, which pairs leave free, per pair.

        penalty = (r_w + r_l)²

    Added with a small weight (0.01 in the paper), it draws the mean reward to 0.

    Args:
      chosen_rewards, rejected_rewards: f32[B].

    Returns:
      f32[B], unreduced.

    References:
      Eisenstein et al., 2023, https://arxiv.org/abs/2312.09244. TRL's `center_rewards_coefficient` weighs its mean.
    """
    chosen, rejected = float_rows(
        chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards
    )
    return jnp.square(chosen + rejected)
