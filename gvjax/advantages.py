"""From rewards to advantages: what a completion, or a token, did better than expected."""

import chex
import jax
import jax.numpy as jnp

from gvjax import masked


def _groups(rewards: jax.Array, group_size: int, smallest: int) -> jax.Array:
    chex.assert_rank(rewards, 1, custom_message="argument rewards")
    chex.assert_type(rewards, float, custom_message="argument rewards")
    if group_size < smallest:
        raise ValueError(
            f"group_size is {group_size}; comparing completions of one prompt needs at least {smallest}"
        )
    if rewards.shape[0] % group_size:
        raise ValueError(
            f"{rewards.shape[0]} rewards are not divisible by group_size {group_size}; sample whole groups, as many of"
            " every prompt"
        )
    return masked.at_least_float32(rewards).reshape(-1, group_size)


def _centred(groups: jax.Array) -> jax.Array:
    """Each row less its mean, and exactly 0 where the row is all equal: the mean of equal floats may round."""
    groups = groups - groups[:, :1]
    return groups - jnp.mean(groups, axis=1, keepdims=True)


def mean_baseline(rewards: jax.Array) -> jax.Array:
    """REINFORCE's advantages: each reward less the mean of the batch.

        A_i = R_i − (1/B) Σ_j R_j

    Args:
      rewards: f32[B].

    Returns:
      f32[B]; it sums to 0.

    References:
      Williams, 1992, with the mean reward as baseline.
    """
    return _centred(_groups(rewards, rewards.size, 1)).reshape(-1)


def leave_one_out(rewards: jax.Array, group_size: int) -> jax.Array:
    """RLOO's advantages: each reward less the mean of the others of its prompt.

        A_i = R_i − (1/(k − 1)) Σ_{j ≠ i} R_j

    Args:
      rewards: f32[B], the `group_size` completions of one prompt in consecutive rows.
      group_size: k >= 2, dividing B.

    Returns:
      f32[B]; every group sums to 0.

    References:
      Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740, Eq. 8.
    """
    groups = _groups(rewards, group_size, 2)
    return (_centred(groups) * (group_size / (group_size - 1))).reshape(-1)


def group_relative(
    rewards: jax.Array, group_size: int, *, scale: bool = True, epsilon: float = 1e-4
) -> jax.Array:
    """GRPO's advantages: rewards centred, and scaled, within the group of one prompt.

        A_i = (R_i − mean(R)) / (std(R) + ε)

    Without `scale` the division is left out, as in Dr. GRPO. The deviation is the sample one (k − 1), as in TRL; the
    paper does not say.

    Args:
      rewards: f32[B], the `group_size` completions of one prompt in consecutive rows.
      group_size: k >= 2, dividing B.
      scale: divide by the group's standard deviation.
      epsilon: > 0, keeps groups of equal rewards from 0/0.

    Returns:
      f32[B]; every group sums to 0.

    References:
      Shao et al., 2024, https://arxiv.org/abs/2402.03300, section 4.1.2; Liu et al., 2025,
      https://arxiv.org/abs/2503.20783 (Dr. GRPO).
    """
    groups = _groups(rewards, group_size, 2)
    centred = _centred(groups)
    if scale:
        centred = centred / (jnp.std(groups, axis=1, keepdims=True, ddof=1) + epsilon)
    return centred.reshape(-1)


def gae(
    rewards: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation over the completion tokens of each row.

        δ_t = r_t + γ V_{t+1} − V_t,   A_t = δ_t + γλ A_{t+1},   V after the last completion token = 0

    Positions outside the mask are passed over: the token after a masked one continues where the last kept one was.

    Args:
      rewards: f32[B, T], reward received for emitting the token at t.
      values: f32[B, T], V before the token at t was chosen.
      mask: bool[B, T], completion tokens.
      gamma: in [0, 1], discount.
      lam: in [0, 1], λ.

    Returns:
      (advantages f32[B, T], returns f32[B, T] = advantages + values), both 0 outside the mask.

    References:
      Schulman et al., 2015, https://arxiv.org/abs/1506.02438, Eq. 16.
    """
    given = {
        "rewards": (rewards, float),
        "values": (values, float),
        "mask": (mask, bool),
    }
    for name, (array, dtype) in given.items():
        chex.assert_rank(array, 2, custom_message=f"argument {name}")
        chex.assert_type(array, dtype, custom_message=f"argument {name}")
        chex.assert_equal_shape([rewards, array], custom_message=f"argument {name}")
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(
                f"{name} is {number}; it must lie in [0, 1], and 1 is common"
            )
    rewards, values = masked.select(rewards, mask), masked.select(values, mask)

    def backwards(carry, column):
        next_value, next_advantage = carry
        reward, value, keep = column
        delta = reward + gamma * next_value - value
        advantage = delta + gamma * lam * next_advantage
        carry = (
            jnp.where(keep, value, next_value),
            jnp.where(keep, advantage, next_advantage),
        )
        return carry, jnp.where(keep, advantage, 0.0)

    zeros = jnp.zeros_like(values[:, 0])
    _, advantages = jax.lax.scan(
        backwards, (zeros, zeros), (rewards.T, values.T, mask.T), reverse=True
    )
    advantages = advantages.T
    return advantages, masked.select(advantages + values, mask)
