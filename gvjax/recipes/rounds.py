"""One round of the online road: take prompts, sample completions, score them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from gvjax import config
from gvjax.recipes import checks
from gvjax.recipes.inputs import Inputs
from gvjax.recipes.loop import Clock
from gvjax.recipes.programs import sampler
from gvjax.recipes.rewards import make_sources, summed
from gvjax.recipes.rows import role_key
from gvjax.sampling import truncated
from gvjax.tasks.task import Prompts
from gvjax.types import Metrics, Params, Rollouts


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What a round samples.

    Attributes:
      role: names its random numbers and prompt order.
      prompts: prompts per round.
      samples: completions per prompt.
      missing_eos_penalty: subtracted from the reward of a completion that was cut off.
    """

    role: str
    prompts: int
    samples: int
    missing_eos_penalty: float = 0.0


class Sampler:
    """Samples and scores rounds, each a pure function of (params, round)."""

    def __init__(
        self,
        inputs: Inputs,
        sources: config.RewardSources,
        plan: Sampling,
        clock: Clock,
    ):
        self._inputs = inputs
        self._clock = clock
        self._plan = plan
        self._sources = make_sources(
            inputs.ground, sources, inputs.task, inputs.reward_model
        )
        first = inputs.prompts_at(plan.role, plan.prompts, 0)
        checks.check_same_everywhere((first.tokens, first.lengths))
        if plan.missing_eos_penalty and inputs.ground.eos_id is None:
            raise ValueError(
                f"missing_eos_penalty is {plan.missing_eos_penalty}, but completions of task {inputs.task.name} have"
                " no EOS; set it to 0"
            )

    def __call__(self, params: Params, round_: int) -> tuple[Rollouts, Metrics]:
        """(the rollouts of a round on the mesh, rewards filled in; TRL's numbers about each source of rewards)."""
        with self._clock.part("generate") as made:
            rollouts, prompts = draw(self._inputs, self._plan, params, round_)
            made.append(rollouts)
        with self._clock.part("score") as made:
            rows = prompts.repeat(self._plan.samples)
            parts = {
                name: source.rewards(rollouts, rows)
                for name, source in self._sources.items()
            }
            rewards = summed(parts.values())
            made.append(rewards)
        numbers: dict[str, Any] = {}
        for name, part in parts.items():
            numbers[f"rewards/{name}/mean"] = part.mean()
            numbers[f"rewards/{name}/std"] = part.std(ddof=int(len(part) > 1))
            if (error_share := self._sources[name].error_share) is not None:
                numbers["verifier/error_share"] = jnp.asarray(error_share())
        if self._plan.missing_eos_penalty:
            eos_id = self._inputs.ground.eos_id
            assert eos_id is not None, (
                "settings that penalise a missing EOS were let in"
            )
            cut = truncated(rollouts, eos_id)
            rewards = rewards - self._plan.missing_eos_penalty * cut
        if isinstance(rewards, np.ndarray):
            rewards = self._inputs.ground.put(rewards.astype(np.float32))
        return dataclasses.replace(rollouts, rewards=rewards), numbers


def draw(
    inputs: Inputs, plan: Sampling, params: Params, round_: int
) -> tuple[Rollouts, Prompts]:
    """(rollouts of a round on the mesh, without rewards; their prompts, once each).

    In round 0 the sampler is checked against the scorer.
    """
    ground = inputs.ground
    prompts = inputs.prompts_at(plan.role, plan.prompts, round_)
    ids = np.arange(len(prompts))
    tokens, lengths, ids = ground.put((prompts.tokens, prompts.lengths, ids))
    key = role_key(inputs.seed, plan.role, round_)
    rollouts = sampler(ground, plan.samples)(params, tokens, lengths, key, ids)
    if round_ == 0:
        checks.check_rollouts(ground, params, rollouts)
    return rollouts, prompts
