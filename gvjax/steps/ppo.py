"""Proximal policy optimisation with a learned critic."""

import functools

import jax
import jax.numpy as jnp
import optax

from gvjax import masked
from gvjax.losses import clipped_policy_loss, clipped_value_loss
from gvjax.losses.contract import require_non_negative, require_positive
from gvjax.steps.core import make_train_step
from gvjax.steps.policy_gradient import ratio_metrics
from gvjax.steps.sequences import (
    check_completions,
    check_floats,
    check_kind,
    completion_logps,
    predicted_mask,
)
from gvjax.types import (
    ActorCriticBatch,
    LogpsFn,
    Objective,
    Params,
    SequenceBatch,
    Step,
    ValuesFn,
)


def token_rewards(
    rewards: jax.Array,
    logps: jax.Array,
    ref_logps: jax.Array,
    mask: jax.Array,
    *,
    kl_coef: float,
) -> jax.Array:
    """Rewards of single tokens: the KL penalty everywhere, the completion's reward on its last token.

        r_t = −c [log π(y_t) − log π_ref(y_t)] + 1[t is the last completion token] · r

    Args:
      rewards: f32[B], one a completion.
      logps, ref_logps: f32[B, T], nats, under the sampling policy and the reference.
      mask: bool[B, T], completion tokens.
      kl_coef: >= 0, the c above.

    Returns:
      f32[B, T], 0 outside the mask.

    References:
      Ziegler et al., 2019, https://arxiv.org/abs/1909.08593; Huang et al., 2024, https://arxiv.org/abs/2403.17031.
    """
    require_non_negative(kl_coef=kl_coef)
    check_completions(rewards, logps, ref_logps, mask)
    after = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    last = mask & ~after
    penalties = -kl_coef * masked.select(logps - ref_logps, mask)
    return penalties + jnp.where(last, rewards[:, None], 0.0)


def ppo_objective(
    logps_fn: LogpsFn,
    values_fn: ValuesFn,
    *,
    epsilon: float = 0.2,
    value_epsilon: float = 0.2,
    value_coef: float = 0.1,
) -> Objective:
    """The clipped policy loss plus the clipped value loss, both per completion token, with TRL's metrics.

        loss = mean_t [ℓ_clip(ρ_t, A_t) + c_v · ℓ_value(V_t, R_t)]

    Args:
      logps_fn: the policy, applied to `params["policy"]`.
      values_fn: the critic, applied to `params["value"]`.
      epsilon: > 0, clip of the importance ratio.
      value_epsilon: > 0, clip of the critic's move.
      value_coef: >= 0, the c_v above.

    Returns:
      `(params, ActorCriticBatch) -> (Mean over tokens, metrics)`.

    References:
      Schulman et al., 2017, https://arxiv.org/abs/1707.06347, Eq. 7 and 9.
    """
    require_positive(value_epsilon=value_epsilon)
    require_non_negative(epsilon=epsilon, value_coef=value_coef)
    policy_loss_of = functools.partial(clipped_policy_loss, epsilon=epsilon)
    value_loss_of = functools.partial(clipped_value_loss, epsilon=value_epsilon)

    def objective(params: Params, batch: ActorCriticBatch):
        check_kind(ActorCriticBatch, batch=batch)
        policy = batch.policy
        sequences = SequenceBatch(policy.tokens, policy.completion_mask)
        logps = completion_logps(logps_fn, params["policy"], sequences)
        mask = predicted_mask(sequences)
        values = values_fn(params["value"], jnp.asarray(policy.tokens))
        check_floats(
            logps,
            old_logps=policy.old_logps,
            advantages=policy.advantages,
            old_values=batch.old_values,
            returns=batch.returns,
            **{"values_fn(params, tokens)": values},
        )
        old_logps = masked.select(policy.old_logps, mask)
        policy_losses = policy_loss_of(logps, old_logps, policy.advantages, mask)
        value_losses = value_loss_of(values, batch.old_values, batch.returns, mask)
        ratios = jnp.exp(logps - old_logps)
        outside = (jnp.abs(ratios - 1.0) > epsilon) * 1.0
        value_moved = jnp.abs(values - batch.old_values) > value_epsilon
        metrics = {
            "loss/policy_avg": masked.weighted_mean(policy_losses, mask),
            "loss/value_avg": masked.weighted_mean(value_losses, mask),
            "policy/approxkl_avg": masked.weighted_mean(
                0.5 * jnp.square(logps - old_logps), mask
            ),
            "policy/clipfrac_avg": masked.weighted_mean(outside, mask),
            "policy/entropy_avg": masked.weighted_mean(-old_logps, mask),
            "val/clipfrac_avg": masked.weighted_mean(value_moved * 1.0, mask),
            "val/ratio": masked.weighted_mean(ratios, mask),
            **ratio_metrics(logps, old_logps, mask),
        }
        losses = policy_losses + value_coef * value_losses
        return masked.weighted_mean(losses, mask), metrics

    return objective


def make_ppo_step(
    logps_fn: LogpsFn,
    values_fn: ValuesFn,
    tx: optax.GradientTransformation,
    *,
    epsilon: float = 0.2,
    value_epsilon: float = 0.2,
    value_coef: float = 0.1,
    num_microbatches: int = 1,
) -> Step:
    """Builds the PPO step, `(state, ActorCriticBatch) -> (state, metrics)`, over `{"policy": …, "value": …}` params.

    Args:
      logps_fn, values_fn: the policy and the critic.
      tx: optax transform for both.
      epsilon, value_epsilon, value_coef: see `ppo_objective`.
      num_microbatches: see `make_train_step`.
    """
    objective = ppo_objective(
        logps_fn,
        values_fn,
        epsilon=epsilon,
        value_epsilon=value_epsilon,
        value_coef=value_coef,
    )
    return make_train_step(objective, tx, num_microbatches=num_microbatches)
