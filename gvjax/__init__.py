"""gvjax: one preference dataset down both roads of fine-tuning, and which road pays.

What stands here needs arrays only: types, log-probabilities, losses, advantages, train steps, and `masked`, the sums
and means they are made of. Models, data, sampling, checkpoints and recipes are modules of their own
(`gvjax.models.transformer`, `gvjax.data.batches`, `gvjax.recipes.dpo`, ...), imported by who uses them.
"""

from gvjax import advantages, losses, masked
from gvjax.logps import (
    chunked_token_logps,
    entropy,
    kl_k1,
    kl_k2,
    kl_k3,
    logps_from_logits,
    token_logps,
)
from gvjax.masked import Max, Mean, Min
from gvjax.steps import (
    completion_logps,
    init_train_state,
    make_dpo_step,
    make_policy_gradient_step,
    make_ppo_step,
    make_preference_step,
    make_reward_step,
    make_supervised_step,
    make_train_step,
    make_unpaired_step,
    policy_batch,
    summed_logps,
    with_ref_logps,
)
from gvjax.types import (
    ActorCriticBatch,
    ApplyFn,
    DecodeFn,
    LogpsFn,
    Objective,
    PolicyBatch,
    PreferenceBatch,
    RewardFn,
    Rollouts,
    SequenceBatch,
    SharedPrompts,
    Step,
    TrainState,
    UnpairedBatch,
    ValuesFn,
)

__version__ = "0.1.0"

__all__ = [
    "ActorCriticBatch",
    "ApplyFn",
    "DecodeFn",
    "LogpsFn",
    "Max",
    "Mean",
    "Min",
    "Objective",
    "PolicyBatch",
    "PreferenceBatch",
    "RewardFn",
    "Rollouts",
    "SequenceBatch",
    "SharedPrompts",
    "Step",
    "TrainState",
    "UnpairedBatch",
    "ValuesFn",
    "advantages",
    "chunked_token_logps",
    "completion_logps",
    "entropy",
    "init_train_state",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "logps_from_logits",
    "losses",
    "make_dpo_step",
    "make_policy_gradient_step",
    "make_ppo_step",
    "make_preference_step",
    "make_reward_step",
    "make_supervised_step",
    "make_train_step",
    "make_unpaired_step",
    "masked",
    "policy_batch",
    "summed_logps",
    "token_logps",
    "with_ref_logps",
]
