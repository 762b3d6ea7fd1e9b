"""The online road by regression: REBEL fits log-ratios to differences of rewards, two samples a prompt, no critic.

Each round solves, by a few updates, the regression whose exact solution is one step of mirror descent from the policy
that sampled; the KL to the starting policy enters through the rewards.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gvjax import config, lanes, losses, masked, steps
from gvjax.recipes import checks, loop
from gvjax.recipes.ground import Ground, cached, make_optimizer
from gvjax.recipes.inputs import Inputs
from gvjax.recipes.online_dpo import neighbours, rollout_pairs
from gvjax.recipes.policy_gradient import rollout_metrics
from gvjax.recipes.programs import scorer
from gvjax.recipes.rounds import Sampler, Sampling
from gvjax.types import PreferenceBatch, Rollouts, SequenceBatch


def train(
    settings: config.RebelSection,
    inputs: Inputs,
    run: loop.Run,
    *,
    select: loop.Select = "last",
) -> loop.Trained:
    """Trains a policy by regressing reward differences on its own samples.

    Args:
      settings: the step size, the KL and how much is sampled.
      inputs: prompts, starting policy (the reference of the KL) and reward model.
      run: where it is kept.
      select: see `loop.train`.
    """
    ground = inputs.ground
    compiled, schedule, prepare = program(ground, settings)
    state = compiled.start(inputs.trained)
    plan = Sampling("rebel", settings.prompts_per_step, 2)
    sample = Sampler(inputs, settings.rewards, plan, run.clock)

    def advance(state, round_):
        rollouts, rewards = sample(inputs.policy_of(state.params), round_)
        sequences = SequenceBatch(rollouts.tokens, rollouts.completion_mask)
        ref_logps = scorer(ground)(inputs.policy, sequences)
        batch, numbers = prepare(rollouts, ref_logps)
        for epoch in range(settings.epochs):
            state, metrics = compiled.step(state, batch, inputs.base)
            if round_ == epoch == 0:
                checks.check_first_loss(
                    float(metrics["loss"]),
                    float(jnp.mean(jnp.square(batch.margin))),
                    "REBEL",
                    # The sampler's and the scorer's small differences enter divided by η.
                    tolerance=checks.TOLERANCE[ground.model.dtype]
                    * (1 + 1 / settings.eta),
                )
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


def regression_pairs(
    rollouts: Rollouts, ref_logps: jax.Array, kl_coef: float
) -> PreferenceBatch:
    """The two samples of each prompt, and by how much one is better once the KL is paid.

    Args:
      rollouts: 2N rows with rewards, a prompt's two together; their log-probabilities become the batch's reference.
      ref_logps: f32[2N, T], of the policy that KL is measured to.
      kl_coef: >= 0.

    Returns:
      PreferenceBatch of N rows; chosen is the better one, so that `margin` >= 0.
    """
    mask = rollouts.completion_mask
    rewards = steps.penalised_rewards(
        rollouts.scored(), rollouts.logps, ref_logps, mask, kl_coef=kl_coef
    )
    logps = masked.sum(rollouts.logps, mask, axis=1)
    chosen, rejected = neighbours(rewards)
    batch = rollout_pairs(
        dataclasses.replace(rollouts, rewards=rewards), chosen, rejected
    )
    return dataclasses.replace(
        batch, ref_chosen_logps=logps[chosen], ref_rejected_logps=logps[rejected]
    )


@cached
def program(ground: Ground, settings: config.RebelSection):
    """The compiled step, its learning rate, and what makes its batch of rollouts."""
    updates = settings.steps * settings.epochs
    tx, schedule = make_optimizer(settings.optimizer, updates)
    make_step = functools.partial(
        steps.make_preference_step,
        tx=tx,
        loss=functools.partial(losses.rebel_loss, eta=settings.eta),
        # 1/η is the scale at which log-ratios are fitted to rewards; the metrics show them so.
        beta=1 / settings.eta,
        num_microbatches=settings.num_microbatches,
    )

    @lanes.jit
    def prepare(
        rollouts: Rollouts, ref_logps: jax.Array
    ) -> tuple[PreferenceBatch, dict[str, jax.Array]]:
        batch = regression_pairs(rollouts, ref_logps, settings.kl_coef)
        numbers = {
            **rollout_metrics(rollouts, ref_logps, group_size=2, eos_id=ground.eos_id),
            "objective/scores": jnp.mean(rollouts.scored()),
            "objective/scores_margin": jnp.mean(jnp.asarray(batch.margin)),
        }
        return batch, numbers

    return ground.compiler(make_step, tx), schedule, prepare
