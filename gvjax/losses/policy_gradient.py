"""Policy-gradient losses, per token.

Every loss is `(logps, old_logps, advantages, mask, *, ...) -> f32[B, T]`, exactly 0 and without gradient where the mask
is False, whatever stands there. What is called RLOO, GRPO, Dr. GRPO or DAPO is a choice of three things: advantages
(`gvjax.advantages`), a loss, and a normaliser (`gvjax.losses.normalisers`); `TRL_POLICY_LOSSES` lists the last two by
name.

Loss values are not objectives: only the gradient means something. A clipped loss is −advantage where the policy has not
moved, so with advantages of mean 0 it starts at 0.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from gvjax import masked
from gvjax.losses.contract import (
    bools_like,
    float_tokens,
    require_non_negative,
    require_positive,
)
from gvjax.losses.normalisers import (
    Normaliser,
    constant,
    per_sequence_mean,
    per_sequence_sum,
    per_token,
)
from gvjax.masked import Mean

PolicyLoss = Callable[..., jax.Array]

# A log-ratio beyond this is held, with gradient 0: e^40 = 2e17 is far outside any trust region, and e^89 overflows.
MAX_LOG_RATIO = 40.0


def reinforce_loss(
    logps: jax.Array, old_logps: jax.Array, advantages: jax.Array, mask: jax.Array
) -> jax.Array:
    """REINFORCE loss, per token.

        loss = −A log π(y_t)

    Right when the policy that is trained is the one that sampled. With leave-one-out advantages and `per_sequence_sum`
    this is RLOO.

    Args:
      logps: f32[B, T], nats, under the policy.
      old_logps: f32[B, T], nats, under the policy that sampled; checked but not used.
      advantages: f32[B, T], constant for the gradient.
      mask: bool[B, T], True on completion tokens.

    Returns:
      f32[B, T], unreduced.

    References:
      Williams, 1992. Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740, for RLOO.
    """
    logps, _, advantages, mask = _tokens(logps, old_logps, advantages, mask)
    return masked.select(-advantages * logps, mask)


def clipped_policy_loss(
    logps: jax.Array,
    old_logps: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    max_ratio: float | None = None,
) -> jax.Array:
    """PPO's clipped loss, per token; GRPO's and, with `epsilon_high`, DAPO's.

        loss = −min( ρ A, clip(ρ, 1 − ε, 1 + ε_high) A ),   ρ = π(y_t)/π_old(y_t)

    Args:
      logps: f32[B, T], nats, under the policy.
      old_logps: f32[B, T], nats, under the policy that sampled.
      advantages: f32[B, T], constant for the gradient.
      mask: bool[B, T], True on completion tokens.
      epsilon: ε >= 0.
      epsilon_high: ε_high >= 0; None means ε. DAPO uses 0.28 with ε = 0.2.
      max_ratio: > 1 + ε_high; ρ in the first term is held below it, which bounds the loss when A < 0 too
        (two-sided clipping; TRL calls it delta). None means unbounded.

    Returns:
      f32[B, T], unreduced.

    References:
      Schulman et al., 2017, https://arxiv.org/abs/1707.06347, Eq. 7. Shao et al., 2024 (GRPO),
      https://arxiv.org/abs/2402.03300. Yu et al., 2025 (DAPO), https://arxiv.org/abs/2503.14476. Prime Intellect,
      2025, https://arxiv.org/abs/2505.07291, for max_ratio.
    """
    logps, old_logps, advantages, mask = _tokens(logps, old_logps, advantages, mask)
    losses = _clipped(
        _ratio(logps - old_logps), advantages, epsilon, epsilon_high, max_ratio
    )
    return masked.select(losses, mask)


def gspo_loss(
    logps: jax.Array,
    old_logps: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    epsilon: float = 3e-4,
    epsilon_high: float | None = 4e-4,
) -> jax.Array:
    """GSPO's clipped loss with one ratio per completion, repeated on each of its tokens.

        loss = −min( s A, clip(s, 1 − ε, 1 + ε_high) A ),   s = exp( (1/|y|) Σ_t log π(y_t)/π_old(y_t) )

    To be reduced with `per_sequence_mean`, which gives each completion its one loss; with `per_sequence_sum` it is
    LUSPO, each completion weighted by its length. Advantages should be constant over a completion.

    Args:
      logps: f32[B, T], nats, under the policy.
      old_logps: f32[B, T], nats, under the policy that sampled.
      advantages: f32[B, T], constant for the gradient.
      mask: bool[B, T], True on completion tokens.
      epsilon: ε >= 0; small, because s averages over the completion. TRL's default is 0.2.
      epsilon_high: ε_high >= 0; None means ε.

    Returns:
      f32[B, T], unreduced.

    References:
      Zheng et al., 2025, https://arxiv.org/abs/2507.18071, Eq. 5 to 7; ε from its experiments. LUSPO: 2026,
      https://arxiv.org/abs/2602.05261. TRL's `importance_sampling_level="sequence"`.
    """
    logps, old_logps, advantages, mask = _tokens(logps, old_logps, advantages, mask)
    log_ratio = masked.mean(logps - old_logps, mask, axis=1)
    ratio = _ratio(log_ratio)[:, None]
    return masked.select(_clipped(ratio, advantages, epsilon, epsilon_high, None), mask)


def sequence_clipped_loss(
    logps: jax.Array,
    old_logps: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> jax.Array:
    """PPO's clipped loss with the whole completion as one action, repeated on each of its tokens.

        loss = −min( ρ A, clip(ρ, 1 − ε, 1 + ε_high) A ),   ρ = π(y)/π_old(y)

    To be reduced with `per_sequence_mean`. This is how TRL trains RLOO over several epochs; unlike GSPO's, the ratio is
    the unbiased one, and its spread grows with length.

    Args:
      logps: f32[B, T], nats, under the policy.
      old_logps: f32[B, T], nats, under the policy that sampled.
      advantages: f32[B, T], constant for the gradient and over a completion.
      mask: bool[B, T], True on completion tokens.
      epsilon: ε >= 0.
      epsilon_high: ε_high >= 0; None means ε.

    Returns:
      f32[B, T], unreduced.

    References:
      Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740. TRL's RLOO trainer.
    """
    logps, old_logps, advantages, mask = _tokens(logps, old_logps, advantages, mask)
    ratio = _ratio(masked.sum(logps - old_logps, mask, axis=1))[:, None]
    return masked.select(_clipped(ratio, advantages, epsilon, epsilon_high, None), mask)


def cispo_loss(
    logps: jax.Array,
    old_logps: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    epsilon_high: float = 4.0,
    epsilon: float | None = None,
) -> jax.Array:
    """CISPO loss, per token: clip the weight and not the update, so that no token loses its gradient.

        loss = −sg( clip(ρ, 1 − ε, 1 + ε_high) ) A log π(y_t),   ρ = π(y_t)/π_old(y_t)

    Args:
      logps: f32[B, T], nats, under the policy.
      old_logps: f32[B, T], nats, under the policy that sampled.
      advantages: f32[B, T], constant for the gradient.
      mask: bool[B, T], True on completion tokens.
      epsilon_high: ε_high >= 0. TRL's `epsilon_high` is the largest ratio itself, 1 + ε_high here; the default is
        ScaleRL's largest ratio of 5.
      epsilon: ε >= 0; None leaves the ratio unbounded below, as the paper and TRL do.

    Returns:
      f32[B, T], unreduced.

    References:
      MiniMax, 2025, https://arxiv.org/abs/2506.13585, Eq. 4 and 5. Khatri et al., 2025 (ScaleRL),
      https://arxiv.org/abs/2510.13786.
    """
    require_non_negative(epsilon_high=epsilon_high, epsilon=epsilon)
    logps, old_logps, advantages, mask = _tokens(logps, old_logps, advantages, mask)
    low = None if epsilon is None else 1.0 - epsilon
    weight = jnp.clip(_ratio(logps - old_logps), low, 1.0 + epsilon_high)
    return masked.select(-jax.lax.stop_gradient(weight) * advantages * logps, mask)


def sapo_loss(
    logps: jax.Array,
    old_logps: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> jax.Array:
    """SAPO loss, per token: a smooth gate in place of the clip.

        loss = −(4/τ) σ(τ (ρ − 1)) A,   ρ = π(y_t)/π_old(y_t),   τ by the sign of A

    Args:
      logps: f32[B, T], nats, under the policy.
      old_logps: f32[B, T], nats, under the policy that sampled.
      advantages: f32[B, T], constant for the gradient.
      mask: bool[B, T], True on completion tokens.
      temperature_positive, temperature_negative: τ > 0 for A > 0 and for A <= 0; larger closes the gate faster.

    Returns:
      f32[B, T], unreduced.

    References:
      2025, https://arxiv.org/abs/2511.20347. TRL's "sapo".
    """
    require_positive(
        temperature_positive=temperature_positive,
        temperature_negative=temperature_negative,
    )
    logps, old_logps, advantages, mask = _tokens(logps, old_logps, advantages, mask)
    temperature = jnp.where(advantages > 0, temperature_positive, temperature_negative)
    excess = _ratio(logps - old_logps) - 1.0
    gate = jax.nn.sigmoid(temperature * excess) * 4.0 / temperature
    return masked.select(-gate * advantages, mask)


def gmpo_loss(
    logps: jax.Array,
    old_logps: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    epsilon: float = 0.4,
    epsilon_high: float | None = None,
) -> jax.Array:
    """GMPO loss: the geometric mean of a completion's clipped ratios, repeated on each of its tokens.

        loss = −A exp( (1/|y|) Σ_t clip'(log ρ_t) ),   ρ_t = π(y_t)/π_old(y_t)

    where clip' holds log ρ below ε_high if A > 0 and above −ε otherwise. To be reduced with `per_sequence_mean`;
    advantages should be constant over a completion.

    Args:
      logps: f32[B, T], nats, under the policy.
      old_logps: f32[B, T], nats, under the policy that sampled.
      advantages: f32[B, T], constant for the gradient.
      mask: bool[B, T], True on completion tokens.
      epsilon: ε >= 0, in nats of log-ratio.
      epsilon_high: ε_high >= 0, in nats; None means ε.

    Returns:
      f32[B, T], unreduced.

    References:
      Zhao et al., 2025, https://arxiv.org/abs/2507.20673. TRL's GMPO trainer.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    require_non_negative(epsilon=epsilon, epsilon_high=high)
    logps, old_logps, advantages, mask = _tokens(logps, old_logps, advantages, mask)
    log_ratio = logps - old_logps
    clipped = jnp.where(
        advantages > 0, jnp.minimum(log_ratio, high), jnp.maximum(log_ratio, -epsilon)
    )
    ratio = _ratio(masked.mean(clipped, mask, axis=1))[:, None]
    return masked.select(-ratio * advantages, mask)


def vespo_loss(
    logps: jax.Array,
    old_logps: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
) -> jax.Array:
    """VESPO loss, per token: REINFORCE weighted by a gamma-shaped function of the whole completion's ratio.

        loss = −sg(φ(w)) A log π(y_t),   φ(w) = w^k e^{λ(1 − w)},   w = π(y)/π_old(y)

    with (k, λ) by the sign of A. As in TRL, token log-ratios are held in ±20 and log w in [ln 1e-8, 20].

    Args:
      logps: f32[B, T], nats, under the policy.
      old_logps: f32[B, T], nats, under the policy that sampled.
      advantages: f32[B, T], constant for the gradient.
      mask: bool[B, T], True on completion tokens.
      k_positive, lambda_positive: k and λ > 0 for A >= 0.
      k_negative, lambda_negative: k and λ > 0 for A < 0.

    Returns:
      f32[B, T], unreduced.

    References:
      2026, https://arxiv.org/abs/2602.10693. TRL's "vespo".
    """
    require_positive(
        k_positive=k_positive,
        lambda_positive=lambda_positive,
        k_negative=k_negative,
        lambda_negative=lambda_negative,
    )
    logps, old_logps, advantages, mask = _tokens(logps, old_logps, advantages, mask)
    held = jnp.clip(logps - old_logps, -20.0, 20.0)
    log_w = jnp.clip(masked.sum(held, mask, axis=1), jnp.log(1e-8), 20.0)[:, None]
    positive = advantages >= 0
    k = jnp.where(positive, k_positive, k_negative)
    decay = jnp.where(positive, lambda_positive, lambda_negative)
    weight = jnp.exp(k * log_w - decay * jnp.expm1(log_w))
    return masked.select(-jax.lax.stop_gradient(weight) * advantages * logps, mask)


def clipped_value_loss(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    *,
    epsilon: float = 0.2,
) -> jax.Array:
    """PPO's clipped value loss, per token.

        loss = ½ max( (V − R)², (clip(V, V_old − ε, V_old + ε) − R)² )

    Args:
      values: f32[B, T], the critic's values.
      old_values: f32[B, T], its values when the completion was sampled.
      returns: f32[B, T], targets R, constant for the gradient.
      mask: bool[B, T], True on completion tokens.
      epsilon: ε > 0, in reward units.

    Returns:
      f32[B, T], unreduced.

    References:
      Practice since OpenAI's baselines; Huang et al., 2024, https://arxiv.org/abs/2403.17031. TRL's PPO trainer.
    """
    require_positive(epsilon=epsilon)
    values, old_values, returns = float_tokens(
        values=values, old_values=old_values, returns=returns
    )
    (mask,) = bools_like(values, mask=mask)
    values = masked.select(values, mask)
    old_values, returns = (
        jax.lax.stop_gradient(masked.select(array, mask))
        for array in (old_values, returns)
    )
    clipped = jnp.clip(values, old_values - epsilon, old_values + epsilon)
    losses = 0.5 * jnp.maximum(
        jnp.square(values - returns), jnp.square(clipped - returns)
    )
    return masked.select(losses, mask)


def clip_fractions(
    logps: jax.Array,
    old_logps: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> dict[str, Mean]:
    """Shares of tokens whose gradient `clipped_policy_loss` cuts off, under TRL's metric names.

    Args:
      logps, old_logps, advantages, mask, epsilon, epsilon_high: as in `clipped_policy_loss`.

    Returns:
      Means over the tokens the mask keeps: `clip_ratio/low_mean` (ratio below 1 − ε and A < 0), `clip_ratio/high_mean`
      (above 1 + ε_high and A > 0), and their sum `clip_ratio/region_mean`.
    """
    low, high = _bounds(epsilon, epsilon_high)
    logps, old_logps, advantages, mask = _tokens(logps, old_logps, advantages, mask)
    ratio = jax.lax.stop_gradient(_ratio(logps - old_logps))
    below = masked.weighted_mean((ratio < low) & (advantages < 0), mask)
    above = masked.weighted_mean((ratio > high) & (advantages > 0), mask)
    return {
        "clip_ratio/low_mean": below,
        "clip_ratio/high_mean": above,
        "clip_ratio/region_mean": Mean(below.total + above.total, below.weight),
    }


TRL_POLICY_LOSSES: Mapping[str, tuple[PolicyLoss, Normaliser]] = MappingProxyType(
    {
        # GRPOTrainer(loss_type=...), epsilon 0.2; its default completions have at most 512 tokens.
        "grpo": (clipped_policy_loss, per_sequence_mean),
        "bnpo": (clipped_policy_loss, per_token),
        "dr_grpo": (clipped_policy_loss, constant(512)),
        "dapo": (clipped_policy_loss, per_token),
        "cispo": (functools.partial(cispo_loss, epsilon_high=4.0), per_token),
        "sapo": (sapo_loss, per_sequence_mean),
        "luspo": (
            functools.partial(gspo_loss, epsilon=0.2, epsilon_high=None),
            per_sequence_sum,
        ),
        "vespo": (vespo_loss, per_token),
        # GRPOTrainer(importance_sampling_level="sequence").
        "gspo": (
            functools.partial(gspo_loss, epsilon=0.2, epsilon_high=None),
            per_sequence_mean,
        ),
        # RLOOTrainer, GMPOTrainer, PPOTrainer.
        "rloo": (sequence_clipped_loss, per_sequence_mean),
        "gmpo": (gmpo_loss, per_sequence_mean),
        "ppo": (clipped_policy_loss, per_token),
    }
)
"""TRL's names (TRL 1.0 to 1.16) -> (loss, normaliser), with TRL's default hyper-parameters.

"bnpo" and "dapo" differ in TRL only in that "bnpo" averages micro-batches equally; here means add exactly and they are
one. For "cispo" TRL has no safe default; its advice of a largest ratio of 5 is bound.
"""


def _tokens(
    logps: jax.Array, old_logps: jax.Array, advantages: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Checks, casts, and empties what the mask hides *before* any arithmetic; only logps keeps its gradient."""
    logps, old_logps, advantages = float_tokens(
        logps=logps, old_logps=old_logps, advantages=advantages
    )
    (mask,) = bools_like(logps, mask=mask)
    return (
        masked.select(logps, mask),
        jax.lax.stop_gradient(masked.select(old_logps, mask)),
        jax.lax.stop_gradient(masked.select(advantages, mask)),
        mask,
    )


def _ratio(log_ratio: jax.Array) -> jax.Array:
    return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))


def _bounds(epsilon: float, epsilon_high: float | None) -> tuple[float, float]:
    high = epsilon if epsilon_high is None else epsilon_high
    require_non_negative(epsilon=epsilon, epsilon_high=high)
    return 1.0 - epsilon, 1.0 + high


def _clipped(
    ratio: jax.Array,
    advantages: jax.Array,
    epsilon: float,
    epsilon_high: float | None,
    max_ratio: float | None,
) -> jax.Array:
    low, high = _bounds(epsilon, epsilon_high)
    clipped = jnp.clip(ratio, low, high)
    if max_ratio is not None:
        if not max_ratio > high:
            raise ValueError(
                f"max_ratio is {max_ratio}, but must be above 1 + epsilon_high = {high}, or it undoes that clip; 4.0 is "
                "usual"
            )
        ratio = jnp.minimum(ratio, max_ratio)
    return -jnp.minimum(ratio * advantages, clipped * advantages)
