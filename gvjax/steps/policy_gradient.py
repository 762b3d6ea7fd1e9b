"""Policy-gradient steps on sampled completions: REINFORCE, RLOO, GRPO, Dr. GRPO, DAPO, GSPO, CISPO.

They differ in how rewards become advantages (`gvjax.advantages`), in the loss of a token and in the normaliser (both in
`gvjax.losses.policy_gradient`): each is an argument here.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType

import chex
import jax
import jax.numpy as jnp
import optax

from gvjax import masked
from gvjax.logps import kl_k3
from gvjax.losses import (
    Normaliser,
    clip_fractions,
    clipped_policy_loss,
    gspo_loss,
    per_token,
    sequence_clipped_loss,
)
from gvjax.losses.contract import require_non_negative, underlying
from gvjax.steps.core import make_train_step
from gvjax.steps.sequences import (
    check_completions,
    check_floats,
    check_kind,
    completion_logps,
    predicted_mask,
)
from gvjax.types import (
    LogpsFn,
    Objective,
    Params,
    PolicyBatch,
    Rollouts,
    SequenceBatch,
    Step,
)

PolicyLoss = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
KlEstimator = Callable[[jax.Array, jax.Array], jax.Array]

_CLIPPED: Mapping[PolicyLoss, Callable[[jax.Array, jax.Array], jax.Array]] = (
    MappingProxyType(
        {
            clipped_policy_loss: masked.select,
            gspo_loss: lambda rho, mask: masked.mean(rho, mask, axis=1)[:, None],
            sequence_clipped_loss: lambda rho, mask: masked.sum(rho, mask, axis=1)[
                :, None
            ],
        }
    )
)
"""Losses that clip a ratio -> the logarithm of that ratio, of the token log-ratios and the mask."""


def policy_batch(
    rollouts: Rollouts, advantages: jax.Array, ref_logps: jax.Array | None = None
) -> PolicyBatch:
    """Rollouts with their advantages; the log-probabilities of the sampler are the old ones.

    Args:
      rollouts: as sampled.
      advantages: f32[B], one a completion and given to all its tokens, or f32[B, T].
      ref_logps: f32[B, T] or None, the reference policy's.

    Raises:
      AssertionError: the advantages are not floats of that shape.
      ValueError: the tokens were drawn from another distribution than the policy's (temperature, top-k, top-p): the
        importance ratios and KL estimates of the losses here would be wrong.
    """
    if rollouts.sampler_logps is not None:
        raise ValueError(
            "these rollouts were sampled at a temperature other than 1 or with top-k or top-p, which the losses here"
            " do not account for; sample them at temperature 1 from the full vocabulary"
        )
    advantages = jnp.asarray(advantages)
    shape = rollouts.tokens.shape
    for name, array in (("advantages", advantages), ("ref_logps", ref_logps)):
        if array is not None:
            message = f"argument {name}"
            short = name == "advantages" and array.ndim == 1
            chex.assert_shape(
                array, shape[:1] if short else shape, custom_message=message
            )
            chex.assert_type(array, float, custom_message=message)
    if advantages.ndim == 1:
        advantages = jnp.broadcast_to(advantages[:, None], rollouts.tokens.shape)
    return PolicyBatch(
        tokens=rollouts.tokens,
        completion_mask=rollouts.completion_mask,
        old_logps=rollouts.logps,
        advantages=masked.select(advantages, rollouts.completion_mask),
        ref_logps=ref_logps,
    )


def penalised_rewards(
    rewards: jax.Array,
    logps: jax.Array,
    ref_logps: jax.Array,
    mask: jax.Array,
    *,
    kl_coef: float,
) -> jax.Array:
    """Rewards less the KL to the reference, one number a completion (RLOO's reward).

        R = r − c · Σ_t [log π(y_t) − log π_ref(y_t)]

    Args:
      rewards: f32[B].
      logps, ref_logps: f32[B, T], nats.
      mask: bool[B, T].
      kl_coef: >= 0, the c above.

    Returns:
      f32[B].

    References:
      Ahmadian et al., 2024, https://arxiv.org/abs/2402.14740, Eq. 2.
    """
    require_non_negative(kl_coef=kl_coef)
    check_completions(rewards, logps, ref_logps, mask)
    return rewards - kl_coef * masked.sum(logps - ref_logps, mask, axis=1)


def policy_gradient_objective(
    logps_fn: LogpsFn,
    *,
    loss: PolicyLoss = clipped_policy_loss,
    normaliser: Normaliser = per_token,
    kl_coef: float = 0.0,
    kl_estimator: KlEstimator = kl_k3,
) -> Objective:
    """A policy-gradient loss over completion tokens, with TRL's metrics.

        loss = normalised Σ_{b,t} m_{b,t} [ℓ(log π, log π_old, A) + c · KL̂(log π, log π_ref)]_{b,t}

    Args:
      logps_fn: the model.
      loss: `(logps, old_logps, advantages, mask) -> f32[B, T]`.
      normaliser: `(losses f32[B, T], mask) -> Mean`.
      kl_coef: >= 0, weight of the KL estimate in the loss; the batch must then carry ref_logps.
      kl_estimator: `(logps, ref_logps) -> f32[B, T]`.

    Returns:
      `(params, PolicyBatch) -> (Mean, metrics)`.

    Raises:
      ValueError: if kl_coef is negative, or positive and the batch has no ref_logps, or a hyper-parameter of the loss is
        impossible.
    """
    if not kl_coef >= 0:
        raise ValueError(
            f"kl_coef is {kl_coef}; it must not be negative, and 0 switches the KL term off"
        )
    token = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    jax.eval_shape(loss, token, token, token, jax.ShapeDtypeStruct((2, 2), jnp.bool_))

    def objective(params: Params, batch: PolicyBatch):
        check_kind(PolicyBatch, batch=batch)
        sequences = SequenceBatch(batch.tokens, batch.completion_mask)
        logps = completion_logps(logps_fn, params, sequences)
        mask = predicted_mask(sequences)
        check_floats(
            logps,
            old_logps=batch.old_logps,
            advantages=batch.advantages,
            ref_logps=batch.ref_logps,
        )
        old_logps = masked.select(batch.old_logps, mask)
        losses = loss(logps, old_logps, batch.advantages, mask)
        policy_loss = normaliser(losses, mask)
        metrics = {
            "policy_loss": policy_loss,
            # A sampled token's surprise is an unbiased estimate of the policy's entropy there.
            "entropy": masked.weighted_mean(-old_logps, mask),
            **ratio_metrics(logps, old_logps, mask),
            **_clip_metrics(loss, logps, old_logps, batch.advantages, mask),
        }
        if batch.ref_logps is not None:
            ref_logps = masked.select(batch.ref_logps, mask)
            kl = kl_estimator(logps, ref_logps)
            metrics["kl"] = masked.weighted_mean(kl, mask)
            if kl_coef:
                losses = losses + kl_coef * masked.select(kl, mask)
        elif kl_coef:
            raise ValueError(
                f"kl_coef is {kl_coef} but the batch has no ref_logps; add them with `with_ref_logps`"
            )
        return normaliser(losses, mask), metrics

    return objective


def _clip_metrics(
    loss: PolicyLoss,
    logps: jax.Array,
    old_logps: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
) -> dict[str, masked.Mean]:
    """Shares of tokens whose gradient the loss clips away; none for a loss that does not clip."""
    log_ratio_of = _CLIPPED.get(next(underlying(loss)))
    if log_ratio_of is None:
        return {}
    bound = {
        name: parameter.default
        for name, parameter in inspect.signature(loss).parameters.items()
        if name in ("epsilon", "epsilon_high")
    }
    log_ratio = jnp.broadcast_to(log_ratio_of(logps - old_logps, mask), mask.shape)
    return clip_fractions(
        log_ratio, jnp.zeros_like(log_ratio), advantages, mask, **bound
    )


def ratio_metrics(
    logps: jax.Array, old_logps: jax.Array, mask: jax.Array
) -> dict[str, masked.Mean | masked.Max | masked.Min]:
    """How far the policy is from the one that sampled: importance ratios and differences of log-probabilities."""
    ratios = jnp.exp(logps - old_logps)
    differences = masked.select(jnp.abs(logps - old_logps), mask)
    prefix = "sampling/importance_sampling_ratio"
    return {
        f"{prefix}/mean": masked.weighted_mean(ratios, mask),
        f"{prefix}/min": masked.Min(jnp.min(jnp.where(mask, ratios, jnp.inf))),
        f"{prefix}/max": masked.Max(jnp.max(jnp.where(mask, ratios, -jnp.inf))),
        "sampling/sampling_logp_difference/mean": masked.weighted_mean(
            differences, mask
        ),
        "sampling/sampling_logp_difference/max": masked.Max(jnp.max(differences)),
    }


def make_policy_gradient_step(
    logps_fn: LogpsFn,
    tx: optax.GradientTransformation,
    *,
    loss: PolicyLoss = clipped_policy_loss,
    normaliser: Normaliser = per_token,
    kl_coef: float = 0.0,
    kl_estimator: KlEstimator = kl_k3,
    num_microbatches: int = 1,
) -> Step:
    """Builds a policy-gradient step, `(state, PolicyBatch) -> (state, metrics)`.

    Args:
      logps_fn: the model.
      tx: optax transform.
      loss, normaliser, kl_coef, kl_estimator: see `policy_gradient_objective`.
      num_microbatches: see `make_train_step`.
    """
    objective = policy_gradient_objective(
        logps_fn,
        loss=loss,
        normaliser=normaliser,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
    )
    return make_train_step(objective, tx, num_microbatches=num_microbatches)
