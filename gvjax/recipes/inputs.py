"""What every recipe after SFT is given, the same for all arms of a study."""

import dataclasses

import numpy as np

from gvjax.models import lora
from gvjax.recipes.evaluation import PolicyEvaluation, evaluate_policy
from gvjax.recipes.ground import Ground
from gvjax.recipes.pairs import Pairs
from gvjax.recipes.programs import reward_all
from gvjax.recipes.rewards import RewardModel
from gvjax.recipes.rows import role_key, rows_at, sequences
from gvjax.tasks.task import Prompts, Task
from gvjax.types import Params


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The equal footing.

    Attributes:
      ground: network, mesh and layout.
      task: prompts and gold reward.
      seed: of data order and sampling.
      policy: parameters of the starting policy, which is the reference too.
      reference: parameters of the policy that KL is reported to (the SFT policy).
      prompts: training prompts; the online road samples on the same ones that the pairs are about.
      validation: prompts on which checkpoints and settings are chosen.
      pairs: the preference data; None where the recipe does not read any.
      heldout: labelled pairs that scorers are judged on; None where there are none.
      reward_model: the learned verifier; None where the recipe uses none.
    """

    ground: Ground
    task: Task
    seed: int
    policy: Params
    reference: Params
    prompts: Prompts
    validation: Prompts
    pairs: Pairs | None = None
    heldout: Pairs | None = None
    reward_model: RewardModel | None = None

    @property
    def trained(self) -> Params:
        """What training changes, at its start: the policy, or adapters to it."""
        return self.ground.init_trained(role_key(self.seed, "adapters"), self.policy)

    @property
    def base(self) -> Params | None:
        """The policy under the adapters; None where all of it is trained."""
        return self.policy if self.ground.lora is not None else None

    def policy_of(self, trained: Params) -> Params:
        """The policy that what is trained makes."""
        if self.ground.lora is None:
            return trained
        return lora.adapted(self.policy, trained)

    def evaluate(self, params: Params) -> dict[str, float]:
        """The policy on the validation prompts.

        KL to the reference policy and length; where there is a gold reward that and the winrate in it over the reference
        policy's completions; where there is a reward model, its mean reward as `proxy`.
        """
        judged = self._judged(params)
        numbers = judged.summary()
        if judged.gold is not None:
            wins = np.sign(judged.gold - self._reference_gold)
            numbers["winrate"] = float((wins.mean() + 1) / 2)
        if self.reward_model is not None:
            model = self.reward_model
            rows = sequences(self.validation, judged.completions, self.ground.pad_id)
            rewards = reward_all(self.ground, model.pooling, model.params, rows)
            numbers["proxy"] = float(rewards.mean())
        return numbers

    @property
    def _reference_gold(self) -> np.ndarray:
        """f32[N]: gold rewards of the reference policy's completions, drawn with the same random numbers; kept.

        Not by functools.cached_property: in Python 3.11 all instances share its lock, and lanes would wait in it for each
        other.
        """
        kept = vars(self)
        if "kept_gold" not in kept:
            gold = self._judged(self.reference).gold
            assert gold is not None, "asked for where the task has a gold reward"
            kept["kept_gold"] = gold
        return kept["kept_gold"]

    def _judged(self, params: Params) -> PolicyEvaluation:
        return evaluate_policy(
            self.ground,
            self.task,
            params,
            self.reference,
            self.validation,
            seed=self.seed,
            role="validation",
        )

    def prompts_at(self, role: str, count: int, step: int) -> Prompts:
        """The training prompts of one step."""
        return self.prompts.take(
            rows_at(self.seed, role, len(self.prompts), count, step)
        )

    def required_pairs(self) -> Pairs:
        """The pairs.

        Raises:
          ValueError: there are none.
        """
        if self.pairs is None:
            raise ValueError(
                "this recipe learns from preference pairs and was given none"
            )
        return self.pairs
