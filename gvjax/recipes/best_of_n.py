"""Selection instead of training: the best of n samples of the starting policy, chosen by the rewards."""

import math

import jax
import numpy as np

from gvjax import config
from gvjax.recipes.evaluation import PolicyEvaluation, gold_of
from gvjax.recipes.inputs import Inputs
from gvjax.recipes.programs import sample_all, score_all
from gvjax.recipes.rewards import make_rewards, reward_rows
from gvjax.recipes.rows import completions_of, role_key
from gvjax.tasks.task import Prompts
from gvjax.types import Rollouts, SequenceBatch


def evaluate(
    settings: config.BestOfNSection,
    inputs: Inputs,
    prompts: Prompts,
    *,
    role: str = "evaluation",
) -> PolicyEvaluation:
    """Samples each prompt n times, keeps the completion with the highest reward, and judges that one.

    The probability of a completion under best-of-n cannot be computed, so each row's `kl` is

        log n − (n − 1)/n + log π(y) − log π_ref(y)

    for the sampling policy π: its mean estimates an upper bound of KL(best-of-n ‖ π_ref), tight unless single
    completions are likely. Where π is the reference, all rows hold the bound itself.

    Args:
      settings: n and the rewards.
      inputs: the policy that samples, the reference and the reward model.
      prompts: any number.
      role: names the random numbers, with the inputs' seed.

    References:
      Beirami et al., 2024, https://arxiv.org/abs/2401.01879, Theorem 3.1 (the bound).
    """
    best = winners(inputs, settings.rewards, prompts, n=settings.n, role=role)
    completions = completions_of(best, inputs.ground.completion_length)
    bound = math.log(settings.n) - (settings.n - 1) / settings.n
    kl = np.full(len(prompts), bound, np.float32)
    if inputs.policy is not inputs.reference:
        sequences = SequenceBatch(best.tokens, best.completion_mask)
        logps = np.where(best.completion_mask, best.logps, 0.0).sum(axis=1)
        kl += logps - score_all(inputs.ground, inputs.reference, sequences)
    return PolicyEvaluation(
        gold=gold_of(inputs.task, prompts, completions), kl=kl, completions=completions
    )


def winners(
    inputs: Inputs,
    sources: config.RewardSources,
    prompts: Prompts,
    *,
    n: int,
    role: str,
) -> Rollouts:
    """The best of n samples of the starting policy for each prompt; the first of equals.

    Args:
      inputs: policy, task and reward model.
      sources: where rewards come from.
      prompts: N rows.
      n: >= 2.
      role: names the random numbers, with the inputs' seed.

    Returns:
      Rollouts of N rows with rewards, host arrays.
    """
    ground = inputs.ground
    rewards_fn = make_rewards(ground, sources, inputs.task, inputs.reward_model)
    key = role_key(inputs.seed, role)
    rollouts = sample_all(ground, inputs.policy, prompts, key, num_samples=n)
    rewards = reward_rows(ground, rewards_fn, rollouts, prompts.repeat(n))
    best = rewards.reshape(-1, n).argmax(axis=1) + n * np.arange(len(prompts))
    chosen = jax.tree.map(lambda leaf: leaf[best], rollouts)
    return Rollouts(
        chosen.tokens, chosen.completion_mask, chosen.logps, rewards=rewards[best]
    )
