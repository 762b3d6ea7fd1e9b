"""The online road by PPO: a policy and a critic, both grown from the starting policy, and advantages of single tokens.

As in the published details of PPO for language models (Huang et al., 2024, https://arxiv.org/abs/2403.17031), except
that the critic starts as the policy's trunk with a head of zeros and not as the reward model, so that it can be used
with any source of rewards, and that each epoch is one update on the whole round.
"""

import functools

import jax
import jax.numpy as jnp

from gvjax import advantages, config, lanes, masked, steps
from gvjax.models import heads
from gvjax.recipes import checks, loop
from gvjax.recipes.ground import Ground, cached, make_optimizer
from gvjax.recipes.inputs import Inputs
from gvjax.recipes.policy_gradient import rollout_metrics
from gvjax.recipes.programs import scorer
from gvjax.recipes.rounds import Sampler, Sampling
from gvjax.recipes.rows import role_key
from gvjax.types import ActorCriticBatch, Params, Rollouts, SequenceBatch


def train(
    settings: config.PpoSection,
    inputs: Inputs,
    run: loop.Run,
    *,
    select: loop.Select = "last",
) -> loop.Trained:
    """Trains a policy, and a critic beside it, on the policy's own samples.

    Args:
      settings: the clips, the advantage estimate, the KL and how much is sampled.
      inputs: prompts, starting policy (the reference too) and reward model.
      run: where it is kept.
      select: see `loop.train`; what is selected and returned is the policy.
    """
    ground = inputs.ground
    compiled, schedule, prepare = program(ground, settings)
    critic = ground.init_reward_model(
        role_key(inputs.seed, "critic"), inputs.policy, zero_head=True
    )
    state = compiled.start({"policy": inputs.trained, "value": critic})
    # The state has its own copy.
    del critic
    plan = Sampling(
        "ppo",
        settings.prompts_per_step,
        settings.samples_per_prompt,
        settings.missing_eos_penalty,
    )
    sample = Sampler(inputs, settings.rewards, plan, run.clock)

    def advance(state, round_):
        rollouts, rewards = sample(inputs.policy_of(state.params["policy"]), round_)
        sequences = SequenceBatch(rollouts.tokens, rollouts.completion_mask)
        ref_logps = scorer(ground)(inputs.policy, sequences)
        batch, numbers = prepare(state.params["value"], rollouts, ref_logps)
        for epoch in range(settings.epochs):
            state, metrics = compiled.step(state, batch, inputs.base)
            if round_ == epoch == 0:
                check_first_update(ground, batch, metrics)
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
        policy_of=lambda params: inputs.policy_of(params["policy"]),
    )


def check_first_update(ground: Ground, batch: ActorCriticBatch, metrics) -> None:
    """Before the first update the critic says 0 everywhere, and all importance ratios are 1."""
    mask = batch.policy.completion_mask
    half_square = 0.5 * masked.mean(jnp.square(batch.returns), mask)
    checks.check_first_loss(
        float(metrics["loss/value_avg"]), float(half_square), "PPO value"
    )
    checks.check_first_loss(
        float(metrics["loss/policy_avg"]),
        float(-masked.mean(batch.policy.advantages, mask)),
        "PPO policy",
        tolerance=checks.TOLERANCE[ground.model.dtype],
    )


@cached
def program(ground: Ground, settings: config.PpoSection):
    """The compiled step, its learning rate, and what makes its batch of rollouts."""
    updates = settings.steps * settings.epochs
    tx, schedule = make_optimizer(settings.optimizer, updates)
    values_fn = heads.values_fn(ground.model, mesh=ground.mesh)
    make_step = functools.partial(
        steps.make_ppo_step,
        values_fn=values_fn,
        tx=tx,
        epsilon=settings.epsilon,
        value_epsilon=settings.value_epsilon,
        value_coef=settings.value_coef,
        num_microbatches=settings.num_microbatches,
    )

    @lanes.jit
    def prepare(
        critic: Params, rollouts: Rollouts, ref_logps: jax.Array
    ) -> tuple[ActorCriticBatch, dict[str, jax.Array]]:
        mask = rollouts.completion_mask
        values = masked.select(values_fn(critic, rollouts.tokens), mask)
        rewards = steps.token_rewards(
            rollouts.scored(),
            rollouts.logps,
            ref_logps,
            mask,
            kl_coef=settings.kl_coef,
        )
        better, returns = advantages.gae(
            rewards, values, mask, gamma=settings.gamma, lam=settings.lam
        )
        if settings.whiten_advantages:
            better = masked.whiten(better, mask)
        policy = steps.policy_batch(rollouts, better, ref_logps)
        penalties = masked.sum(rewards, mask, axis=1) - rollouts.scored()
        scores = jnp.mean(rollouts.scored())
        numbers = {
            **rollout_metrics(
                rollouts,
                ref_logps,
                group_size=settings.samples_per_prompt,
                eos_id=ground.eos_id,
            ),
            "objective/scores": scores,
            "objective/non_score_reward": jnp.mean(penalties),
            "objective/rlhf_reward": scores + jnp.mean(penalties),
        }
        return ActorCriticBatch(policy, values, returns), numbers

    return ground.compiler(make_step, tx), schedule, prepare
