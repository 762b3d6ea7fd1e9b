"""Train steps: pure functions `(state, batch) -> (state, metrics)`, made of your model and an optax transform."""

from gvjax.steps.core import init_train_state, make_train_step
from gvjax.steps.policy_gradient import (
    make_policy_gradient_step,
    penalised_rewards,
    policy_batch,
    policy_gradient_objective,
)
from gvjax.steps.ppo import make_ppo_step, ppo_objective, token_rewards
from gvjax.steps.preference import (
    make_dpo_step,
    make_preference_step,
    preference_objective,
)
from gvjax.steps.reward import make_reward_step, paired_rewards, reward_objective
from gvjax.steps.sequences import (
    completion_logps,
    interleave,
    paired_logps,
    summed_logps,
    with_ref_logps,
)
from gvjax.steps.supervised import make_supervised_step, supervised_objective
from gvjax.steps.unpaired import (
    make_unpaired_step,
    reference_point,
    unpaired_objective,
)

__all__ = [
    "completion_logps",
    "init_train_state",
    "interleave",
    "make_dpo_step",
    "make_policy_gradient_step",
    "make_ppo_step",
    "make_preference_step",
    "make_reward_step",
    "make_supervised_step",
    "make_train_step",
    "make_unpaired_step",
    "paired_logps",
    "paired_rewards",
    "penalised_rewards",
    "policy_batch",
    "policy_gradient_objective",
    "ppo_objective",
    "preference_objective",
    "reference_point",
    "reward_objective",
    "summed_logps",
    "supervised_objective",
    "token_rewards",
    "unpaired_objective",
    "with_ref_logps",
]
