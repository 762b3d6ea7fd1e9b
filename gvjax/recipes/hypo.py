"""HyPO, between the roads: DPO on the pairs, and the KL to the reference on fresh samples of the policy.

The pairs say nothing about completions they do not contain, where plain DPO may drift; the samples do (Song et al.,
2024, https://arxiv.org/abs/2406.01462). No reward model is used.
"""

import functools

import jax
import jax.numpy as jnp

from gvjax import config, losses, steps
from gvjax.masked import Mean
from gvjax.recipes import checks, dpo, loop
from gvjax.recipes.ground import Ground, cached, make_optimizer
from gvjax.recipes.inputs import Inputs
from gvjax.recipes.programs import scorer
from gvjax.recipes.rounds import Sampling, draw
from gvjax.recipes.rows import rows_at
from gvjax.types import (
    LogpsFn,
    Objective,
    Params,
    PreferenceBatch,
    SequenceBatch,
    Step,
)

HypoBatch = tuple[PreferenceBatch, SequenceBatch, jax.Array]
"""(pairs; samples of the policy; f32[B'], summed log-probabilities of the samples under the reference)."""


def train(
    settings: config.HypoSection,
    inputs: Inputs,
    run: loop.Run,
    *,
    select: loop.Select = "best",
) -> loop.Trained:
    """Trains a policy on preference pairs and on its own, unlabelled samples.

    Args:
      settings: both terms and how they are minimised.
      inputs: the pairs, prompts to sample on, and the starting policy (the reference too).
      run: where it is kept.
      select: see `dpo.train`.
    """
    ground, pairs = inputs.ground, inputs.required_pairs()
    batch_of = pairs.batches(ground.pad_id)
    compiled, schedule = program(ground, settings)
    state = compiled.start(inputs.trained)
    plan = Sampling("hypo", settings.on_policy_prompts, 1)

    def pairs_at(round_: int) -> PreferenceBatch:
        rows = rows_at(
            inputs.seed, "pair order", len(pairs), settings.batch_size, round_
        )
        return batch_of(rows)

    def advance(state, round_):
        rollouts, _ = draw(inputs, plan, inputs.policy_of(state.params), round_)
        samples = SequenceBatch(rollouts.tokens, rollouts.completion_mask)
        ref_logps = jnp.sum(scorer(ground)(inputs.policy, samples), axis=1)
        batch = (ground.put(pairs_at(round_)), samples, ref_logps)
        state, metrics = compiled.step(state, batch, inputs.base)
        if round_ == 0:
            # The policy is the reference: DPO's loss is ln 2 and the KL 0.
            checks.check_first_loss(
                float(metrics["loss"]),
                0.6931472,
                "HyPO",
                tolerance=checks.TOLERANCE[ground.model.dtype],
            )
        return state, metrics

    first = pairs_at(0)
    checks.check_same_everywhere(first)
    checks.check_masks(first.chosen)
    for side in (first.chosen, first.rejected):
        checks.check_endings(ground, side)
    checks.check_reference(ground, inputs.policy, first)
    return loop.train(
        run,
        state,
        advance,
        rounds=settings.steps,
        evaluate=functools.partial(dpo.evaluate, inputs),
        evaluate_every=settings.evaluate_every,
        select=select,
        shown=("loss", "rewards/accuracies", "objective/kl", "gold"),
        learning_rate=schedule,
        trained_on=compiled.trained_on,
        policy_of=inputs.policy_of,
    )


def hypo_objective(logps_fn: LogpsFn, *, beta: float, kl_coef: float) -> Objective:
    """Mean DPO loss over the pairs plus mean on-policy KL loss over the samples.

    With micro-batches each one's mean over its samples is weighed by its pairs, which is the same as long as no pair
    has weight 0.

    Args:
      logps_fn: the model.
      beta: > 0, of DPO.
      kl_coef: > 0, weight of the KL.

    Returns:
      `(params, HypoBatch) -> (Mean over pairs, metrics)`.
    """
    of_pairs = steps.preference_objective(logps_fn, loss=losses.dpo_loss, beta=beta)

    def objective(params: Params, batch: HypoBatch):
        pairs, samples, ref_logps = batch
        preference, metrics = of_pairs(params, pairs)
        logps = steps.summed_logps(logps_fn, params, samples)
        values = losses.hypo_kl_loss(logps, ref_logps, kl_coef=kl_coef)
        loss = Mean(
            preference.total + preference.weight * jnp.mean(values), preference.weight
        )
        count = jnp.asarray(len(values), jnp.float32)
        return loss, {
            **metrics,
            "loss/preference": preference,
            "objective/kl": Mean(jnp.sum(logps - ref_logps), count),
        }

    return objective


@cached
def program(ground: Ground, settings: config.HypoSection):
    """The compiled step and its learning rate."""
    tx, schedule = make_optimizer(settings.optimizer, settings.steps)

    def make_step(logps_fn: LogpsFn) -> Step:
        objective = hypo_objective(
            logps_fn, beta=settings.beta, kl_coef=settings.kl_coef
        )
        count = settings.num_microbatches
        return steps.make_train_step(objective, tx, num_microbatches=count)

    return ground.compiler(make_step, tx), schedule
