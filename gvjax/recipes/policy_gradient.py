"""The online road by policy gradients: REINFORCE, RLOO, GRPO and its kin, against a reward model or a verifier."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gvjax import advantages, config, lanes, logps, losses, masked, steps
from gvjax.recipes import loop
from gvjax.recipes.ground import Ground, cached, make_optimizer
from gvjax.recipes.inputs import Inputs
from gvjax.recipes.programs import scorer
from gvjax.recipes.rounds import Sampler, Sampling
from gvjax.sampling import truncated
from gvjax.types import EosId, PolicyBatch, Rollouts, SequenceBatch

KL_ESTIMATORS = {"k1": logps.kl_k1, "k2": logps.kl_k2, "k3": logps.kl_k3}

EPSILON_HIGH = {"dapo": 0.28, "gspo": 4e-4, "cispo": 4.0}
"""By how much the ratio may exceed 1 in algorithms whose papers fix it; elsewhere the clip is symmetric."""


def train(
    settings: config.PolicyGradientSection,
    inputs: Inputs,
    run: loop.Run,
    *,
    select: loop.Select = "last",
) -> loop.Trained:
    """Trains a policy by policy gradients on its own samples.

    Args:
      settings: the algorithm, the KL and how much is sampled.
      inputs: prompts, starting policy (the reference too) and reward model.
      run: where it is kept.
      select: see `loop.train`.
    """
    ground = inputs.ground
    compiled, schedule, prepare = program(ground, settings)
    state = compiled.start(inputs.trained)
    plan = Sampling(
        settings.algorithm,
        settings.prompts_per_step,
        settings.samples_per_prompt,
        settings.missing_eos_penalty,
    )
    sample = Sampler(inputs, settings.rewards, plan, run.clock)

    def advance(state, round_):
        rollouts, rewards = sample(inputs.policy_of(state.params), round_)
        sequences = SequenceBatch(rollouts.tokens, rollouts.completion_mask)
        ref_logps = scorer(ground, settings.samples_per_prompt)(
            inputs.policy, sequences
        )
        batch, numbers = prepare(rollouts, ref_logps)
        for _ in range(settings.epochs):
            state, metrics = compiled.step(state, batch, inputs.base)
        return state, {**metrics, **numbers, **rewards}

    return loop.train(
        run,
        state,
        advance,
        rounds=settings.steps,
        evaluate=inputs.evaluate,
        evaluate_every=settings.evaluate_every,
        select=select,
        shown=("reward", "objective/kl", "gold", "verifier/error_share"),
        learning_rate=schedule,
        trained_on=compiled.trained_on,
        policy_of=inputs.policy_of,
    )


@functools.partial(jax.jit, static_argnames=("group_size", "eos_id"))
def rollout_metrics(
    rollouts: Rollouts,
    ref_logps: jax.Array | None,
    *,
    group_size: int,
    eos_id: EosId | None,
) -> dict[str, jax.Array]:
    """TRL's numbers about a round: rewards, their spread within groups, lengths, and the sequence KL (k1).

    Args:
      rollouts: with rewards.
      ref_logps: f32[B, T]; None leaves the KL out.
      group_size: completions per prompt.
      eos_id: of the EOS token, or tokens; None, where a task has none, leaves out who ended by it and who was cut off.
    """
    mask = rollouts.completion_mask
    groups = rollouts.scored().reshape(-1, group_size)
    spread = (
        jnp.std(groups, axis=1, ddof=1) if group_size > 1 else jnp.zeros(len(groups))
    )
    # The deviation itself is above 0 where the mean of equal rewards was rounded.
    equal = groups.max(axis=1) == groups.min(axis=1)
    lengths = jnp.sum(mask, axis=1, dtype=jnp.float32)
    numbers = {
        "reward": jnp.mean(rollouts.scored()),
        "reward_std": jnp.mean(jnp.where(equal, 0.0, spread)),
        "frac_reward_zero_std": jnp.mean(equal * 1.0),
        "completions/mean_length": jnp.mean(lengths),
        "completions/min_length": jnp.min(lengths),
        "completions/max_length": jnp.max(lengths),
        "objective/entropy": jnp.mean(masked.sum(-rollouts.logps, mask, axis=1)),
    }
    if ref_logps is not None:
        log_ratios = masked.sum(rollouts.logps - ref_logps, mask, axis=1)
        numbers["objective/kl"] = jnp.mean(log_ratios)
    if eos_id is not None:
        ended = ~truncated(rollouts, eos_id)
        some = jnp.any(ended)
        shortest = jnp.min(jnp.where(ended, lengths, jnp.inf))
        numbers |= {
            "completions/clipped_ratio": 1.0 - jnp.mean(ended * 1.0),
            "completions/mean_terminated_length": masked.mean(lengths, ended),
            "completions/min_terminated_length": jnp.where(some, shortest, 0.0),
            "completions/max_terminated_length": jnp.max(ended * lengths),
            "val/contain_eos_token": jnp.mean(ended * 1.0),
        }
    return numbers


def make_advantages(settings: config.PolicyGradientSection, rewards: jax.Array):
    """f32[B]: what each completion did better than its baseline, by the configured algorithm."""
    group_size = settings.samples_per_prompt
    if settings.algorithm == "reinforce":
        return advantages.mean_baseline(rewards)
    if settings.algorithm == "rloo":
        return advantages.leave_one_out(rewards, group_size)
    scale = settings.algorithm != "dr_grpo"
    return advantages.group_relative(rewards, group_size, scale=scale)


def make_policy_loss(ground: Ground, settings: config.PolicyGradientSection):
    """(loss of a token, normaliser), by the configured algorithm."""
    epsilon_high = settings.epsilon_high or EPSILON_HIGH.get(settings.algorithm)
    clip: dict[str, Any] = {"epsilon": settings.epsilon, "epsilon_high": epsilon_high}
    clipped = functools.partial(losses.clipped_policy_loss, **clip)
    mean_ratio = functools.partial(losses.gspo_loss, **clip)
    whole_ratio = functools.partial(losses.sequence_clipped_loss, **clip)
    cispo = functools.partial(
        losses.cispo_loss, epsilon_high=epsilon_high or EPSILON_HIGH["cispo"]
    )
    # The whole completion is one action: its token losses are summed.
    on_policy = (losses.reinforce_loss, losses.per_sequence_sum)
    # The same gradient while the policy is the one that sampled, as it is in the first epoch only.
    off_policy = (whole_ratio, losses.per_sequence_mean)
    return {
        "reinforce": on_policy,
        "rloo": on_policy if settings.epochs == 1 else off_policy,
        "grpo": (clipped, losses.per_sequence_mean),
        "dr_grpo": (clipped, losses.constant(ground.completion_length)),
        "dapo": (clipped, losses.per_token),
        "gspo": (mean_ratio, losses.per_sequence_mean),
        "cispo": (cispo, losses.per_token),
    }[settings.algorithm]


@cached
def program(ground: Ground, settings: config.PolicyGradientSection):
    """The compiled step, its learning rate, and what makes its batch of rollouts."""
    updates = settings.steps * settings.epochs
    tx, schedule = make_optimizer(settings.optimizer, updates)
    loss, normaliser = make_policy_loss(ground, settings)
    in_loss = settings.kl_in == "loss"
    make_step = functools.partial(
        steps.make_policy_gradient_step,
        tx=tx,
        loss=loss,
        normaliser=normaliser,
        kl_coef=settings.kl_coef if in_loss else 0.0,
        kl_estimator=KL_ESTIMATORS[settings.kl_estimator],
        num_microbatches=settings.num_microbatches,
    )

    @lanes.jit
    def prepare(
        rollouts: Rollouts, ref_logps: jax.Array
    ) -> tuple[PolicyBatch, dict[str, jax.Array]]:
        rewards = rollouts.scored()
        if not in_loss:
            rewards = steps.penalised_rewards(
                rewards,
                rollouts.logps,
                ref_logps,
                rollouts.completion_mask,
                kl_coef=settings.kl_coef,
            )
        batch = steps.policy_batch(
            rollouts, make_advantages(settings, rewards), ref_logps
        )
        return batch, rollout_metrics(
            rollouts,
            ref_logps,
            group_size=settings.samples_per_prompt,
            eos_id=ground.eos_id,
        )

    # Micro-batches are dealt row by row, which takes groups apart.
    group_size = settings.samples_per_prompt if settings.num_microbatches == 1 else 1
    return ground.compiler(make_step, tx, group_size=group_size), schedule, prepare
