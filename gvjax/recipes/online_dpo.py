"""The online road with the offline loss: DPO on samples of the policy, labelled by the reward model.

Two kinds of label. *Hard*: of the samples of a prompt, the best by reward is chosen and the worst rejected, as in the
paper's experiments; its population loss has no finite optimum, so it works as an early-stopped, high-contrast update.
*Soft*: samples are paired at random and both orders weighed by the reward model's probability; its optimum is exactly
the soft-optimal policy of the reward model.
"""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp

from gvjax import config, lanes, losses, steps
from gvjax.recipes import checks, loop
from gvjax.recipes.ground import Ground, cached, make_optimizer
from gvjax.recipes.inputs import Inputs
from gvjax.recipes.policy_gradient import rollout_metrics
from gvjax.recipes.rounds import Sampler, Sampling
from gvjax.types import EosId, Metrics, PreferenceBatch, Rollouts, SequenceBatch

logger = logging.getLogger(__name__)


def train(
    settings: config.OnlineDpoSection,
    inputs: Inputs,
    run: loop.Run,
    *,
    select: loop.Select = "last",
) -> loop.Trained:
    """Trains a policy on its own, labelled samples.

    Args:
      settings: how samples are drawn, labelled and learned from.
      inputs: prompts, starting policy (the reference too) and reward model.
      run: where it is kept.
      select: see `loop.train`.
    """
    ground = inputs.ground
    compiled, schedule, pair_up, add_ref = program(ground, settings)
    state = compiled.start(inputs.trained)
    plan = Sampling(
        "online dpo", settings.prompts_per_step, settings.samples_per_prompt
    )
    sample = Sampler(inputs, settings.rewards, plan, run.clock)
    continual = settings.generation == "continual"

    def advance(state, round_):
        # Sampling every round from the starting policy is the same as sampling all rounds beforehand.
        rollouts, rewards = sample(
            inputs.policy_of(state.params) if continual else inputs.policy, round_
        )
        batch = add_ref(inputs.policy, pair_up(rollouts))
        for epoch in range(settings.epochs):
            state, metrics = compiled.step(state, batch, inputs.base)
            if epoch == 0:
                # Later epochs' metrics are of a policy that did not sample.
                numbers = round_metrics(
                    rollouts, batch, metrics, settings, ground.eos_id
                )
                if round_ == 0 and settings.labels == "hard":
                    check_first_loss(metrics, batch, ground)
        return state, {**metrics, **numbers, **rewards}

    return loop.train(
        run,
        state,
        advance,
        rounds=settings.steps,
        evaluate=inputs.evaluate,
        evaluate_every=settings.evaluate_every,
        select=select,
        shown=("objective/scores", "objective/kl", "gold", "verifier/error_share"),
        learning_rate=schedule,
        trained_on=compiled.trained_on,
        policy_of=inputs.policy_of,
    )


def check_first_loss(metrics: Metrics, batch: PreferenceBatch, ground: Ground) -> None:
    """Raises SelfCheckError unless the first loss is ln 2; without a pair there is none to check."""
    if not jnp.any(jnp.asarray(batch.weight)):
        logger.warning(
            "in the first round no prompt had two different rewards: nothing was learned, and the loss is not checked"
        )
        return
    checks.check_first_loss(
        float(metrics["loss"]),
        0.6931472,
        "online DPO",
        tolerance=checks.TOLERANCE[ground.model.dtype],
    )


def round_metrics(
    rollouts: Rollouts,
    batch: PreferenceBatch,
    metrics: Metrics,
    settings: config.OnlineDpoSection,
    eos_id: EosId | None,
) -> Metrics:
    """TRL's numbers about a round, those about the KL over the completions of the pairs, which alone are scored.

    They are left out where the starting policy samples all rounds: its samples say how far it is from the policy,
    KL(π_ref ‖ π), and not how far the policy has gone. An evaluation's `kl` does.

    Args:
      rollouts: with rewards.
      batch: the pairs that were learned from.
      metrics: of the round's first step, whose policy is the one that sampled.
      settings: β, the group size and who samples.
      eos_id: of the EOS token, or tokens, or None.
    """
    scores = jnp.mean(rollouts.scored())
    numbers = {
        **rollout_metrics(
            rollouts, None, group_size=settings.samples_per_prompt, eos_id=eos_id
        ),
        "objective/scores": scores,
        "objective/scores_margin": jnp.mean(jnp.asarray(batch.margin)),
    }
    if settings.generation == "once":
        return numbers
    # The implicit rewards are β times the log-ratios.
    penalty = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
    return {
        **numbers,
        "objective/kl": penalty / settings.beta,
        "objective/non_score_reward": -penalty,
        "objective/rlhf_reward": scores - penalty,
    }


def hard_pairs(rollouts: Rollouts, group_size: int) -> PreferenceBatch:
    """The best of each group against its worst.

    Args:
      rollouts: N · group_size rows with rewards, a prompt's together.
      group_size: >= 2.

    Returns:
      PreferenceBatch of N rows; a group of equal rewards has weight 0.
    """
    rewards = rollouts.scored().reshape(-1, group_size)
    first = jnp.arange(rewards.shape[0]) * group_size
    best, worst = first + rewards.argmax(axis=1), first + rewards.argmin(axis=1)
    batch = rollout_pairs(rollouts, best, worst)
    unequal = rewards.max(axis=1) > rewards.min(axis=1)
    return dataclasses.replace(batch, weight=unequal.astype(jnp.float32))


def soft_pairs(rollouts: Rollouts, group_size: int) -> PreferenceBatch:
    """Neighbouring samples of each group, with the probability that the reward model gives to their order.

        P(chosen ≻ rejected) = σ(r(chosen) − r(rejected))

    Args:
      Those of `hard_pairs`; group_size is even.

    Returns:
      PreferenceBatch of N · group_size / 2 rows; chosen is the likelier one.
    """
    chosen, rejected = neighbours(rollouts.scored())
    batch = rollout_pairs(rollouts, chosen, rejected)
    probability = jax.nn.sigmoid(jnp.asarray(batch.margin))
    return dataclasses.replace(batch, chosen_probability=probability)


def neighbours(rewards: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rows of each two neighbours that are the better and the worse by reward; of equals the first is the better.

    The losses on both orders do not see which is called chosen, but the metrics of a pair do.

    Args:
      rewards: f32[2N].

    Returns:
      (int32[N], int32[N]).
    """
    first = jnp.arange(0, len(rewards), 2)
    swapped = (rewards[first + 1] > rewards[first]).astype(first.dtype)
    return first + swapped, first + 1 - swapped


def rollout_pairs(
    rollouts: Rollouts, chosen: jax.Array, rejected: jax.Array
) -> PreferenceBatch:
    """Pairs of the given rows, with the difference of their rewards as margin and no reference yet."""

    def rows(index):
        return SequenceBatch(rollouts.tokens[index], rollouts.completion_mask[index])

    return PreferenceBatch(
        chosen=rows(chosen),
        rejected=rows(rejected),
        margin=rollouts.scored()[chosen] - rollouts.scored()[rejected],
    )


@cached
def program(ground: Ground, settings: config.OnlineDpoSection):
    """The compiled step, its learning rate, what makes pairs of rollouts and what adds the reference to them."""
    updates = settings.steps * settings.epochs
    tx, schedule = make_optimizer(settings.optimizer, updates)
    hard = settings.labels == "hard"
    make_step = functools.partial(
        steps.make_preference_step,
        tx=tx,
        loss=losses.dpo_loss if hard else losses.soft_dpo_loss,
        beta=settings.beta,
        num_microbatches=settings.num_microbatches,
    )
    pair_up = lanes.jit(
        functools.partial(
            hard_pairs if hard else soft_pairs, group_size=settings.samples_per_prompt
        )
    )
    logps_fn = ground.group_logps_fn(2)
    add_ref = lanes.jit(functools.partial(steps.with_ref_logps, logps_fn))
    return ground.compiler(make_step, tx, group_size=2), schedule, pair_up, add_ref
