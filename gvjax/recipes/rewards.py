"""Where the online road's rewards come from: a reward model, a Python verifier, or their weighted sum."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable

import jax
import numpy as np

from gvjax import config, sharding
from gvjax.judges.verifier import Verifier
from gvjax.models.heads import Pooling
from gvjax.recipes.ground import Ground
from gvjax.recipes.programs import in_parts, reward_scorer
from gvjax.recipes.rows import completions_of
from gvjax.tasks.task import Prompts, Task
from gvjax.types import Params, Rollouts

RewardsFn = Callable[[Rollouts, Prompts], jax.Array | np.ndarray]
"""`(rollouts of B rows, their prompts, a row each) -> f32[B]`."""


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A trained reward model.

    Attributes:
      params: trunk and head.
      pooling: as it was trained.
    """

    params: Params
    pooling: Pooling


@dataclasses.dataclass(frozen=True)
class Source:
    """One of the things that reward.

    Attributes:
      rewards: its part of the sum, weight included.
      error_share: share of the latest batch on which it went wrong; None where it cannot.
    """

    rewards: RewardsFn
    error_share: Callable[[], float] | None = None


def make_sources(
    ground: Ground,
    sources: config.RewardSources,
    task: Task,
    reward_model: RewardModel | None,
) -> dict[str, Source]:
    """The configured sources by name: `reward_model`, and `gold` or the verifier's function.

    Args:
      ground: the network.
      sources: which, with what weights.
      task: gives the `gold` verifier, and decodes tokens for others.
      reward_model: needed where its weight is not 0.

    Raises:
      ValueError: the reward model is needed and not given.
    """
    if sources.reward_model and reward_model is None:
        raise ValueError(
            f"rewards.reward_model has weight {sources.reward_model} but no reward model was given; train one with"
            " recipe reward and name its run directory, or set the weight to 0"
        )
    made: dict[str, Source] = {}
    if sources.reward_model and reward_model is not None:
        model, score = reward_model, reward_scorer(ground, reward_model.pooling)

        def learned(rollouts: Rollouts, prompts: Prompts) -> jax.Array:
            rewards = score(model.params, rollouts.tokens, rollouts.completion_mask)
            return sources.reward_model * rewards

        made["reward_model"] = Source(learned)
    if sources.verifier is not None:
        section = sources.verifier
        error_share: Callable[[], float] | None = None
        verify: Callable = task.reward
        if section.path != "gold":
            verifier = _make_verifier(section)
            verify = _on_texts(verifier, task)
            error_share = functools.partial(getattr, verifier, "error_share")

        def verified(rollouts: Rollouts, prompts: Prompts) -> np.ndarray:
            completions = completions_of(rollouts, ground.completion_length)
            return section.weight * np.asarray(verify(prompts, completions), np.float32)

        name = section.path.rpartition(":")[2]
        made[name] = Source(verified, error_share)
    return made


def make_rewards(
    ground: Ground,
    sources: config.RewardSources,
    task: Task,
    reward_model: RewardModel | None,
) -> RewardsFn:
    """The sum of the configured sources; see `make_sources`."""
    made = make_sources(ground, sources, task, reward_model)

    def rewards(rollouts: Rollouts, prompts: Prompts) -> jax.Array | np.ndarray:
        return summed(source.rewards(rollouts, prompts) for source in made.values())

    return rewards


def summed(parts: Iterable[jax.Array | np.ndarray]) -> jax.Array | np.ndarray:
    """f32[B]: the parts, added in their order."""
    return functools.reduce(operator.add, parts)


def reward_rows(
    ground: Ground,
    rewards: RewardsFn,
    rollouts: Rollouts,
    prompts: Prompts,
) -> np.ndarray:
    """f32[B]: rewards of any number of rollouts, in parts of one shape.

    Args:
      ground: the mesh.
      rewards: see `make_rewards`.
      rollouts: B rows of host arrays.
      prompts: a row each.
    """
    made = []
    for rows in in_parts(ground, len(prompts), ground.rows_per_call):
        some = ground.put(jax.tree.map(lambda leaf, rows=rows: leaf[rows], rollouts))
        found = sharding.fetch(rewards(some, prompts.take(rows)))
        made.append(found.astype(np.float32))
    return np.concatenate(made)[: len(prompts)]


def _make_verifier(section: config.VerifierSection) -> Verifier:
    return Verifier(
        section.path,
        time_limit=section.time_limit,
        error_reward=section.error_reward,
        max_error_share=section.max_error_share,
    )


def _on_texts(verifier: Verifier, task: Task) -> Callable:
    def decoded(prompts, completions) -> np.ndarray:
        return verifier(
            [task.decode(row[:n]) for row, n in zip(prompts.tokens, prompts.lengths)],
            [
                task.decode(row[:n])
                for row, n in zip(completions.tokens, completions.lengths)
            ],
        )

    return decoded
