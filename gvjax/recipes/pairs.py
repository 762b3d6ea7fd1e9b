"""The preference data that both roads share: a dataset's own pairs, or samples of the starting policy, labelled once."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Self

import jax
import numpy as np

from gvjax import sharding
from gvjax.recipes.dataset import Dataset
from gvjax.recipes.evaluation import gold_of
from gvjax.recipes.ground import Ground
from gvjax.recipes.programs import sample_all, score_all
from gvjax.recipes.reference import score_once
from gvjax.recipes.rows import (
    completions_of,
    host_sequences,
    role_key,
    role_rng,
    sequences,
)
from gvjax.tasks.task import Completions, Prompts, Task, preference_labels
from gvjax.types import Params, PreferenceBatch, SequenceBatch


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Labelled pairs as host arrays, a row each.

    Attributes:
      prompts: Prompts.
      chosen, rejected: Completions, as labelled.
      chosen_gold, rejected_gold: f32[N], gold rewards: for measurement, never for training; NaN where there are none.
      ref_chosen_logps, ref_rejected_logps: f32[N], nats, summed, under the starting policy.
    """

    prompts: Prompts
    chosen: Completions
    rejected: Completions
    chosen_gold: np.ndarray
    rejected_gold: np.ndarray
    ref_chosen_logps: np.ndarray
    ref_rejected_logps: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows) -> Self:
        """The pairs that an index array or slice picks."""
        return type(self)(
            **{
                field.name: _take(getattr(self, field.name), rows)
                for field in dataclasses.fields(self)
            }
        )

    def swapped(self, rows: np.ndarray) -> Self:
        """The pairs with the labels of some turned round.

        Args:
          rows: bool[N], where chosen and rejected change places.
        """

        def pick(one, other):
            if isinstance(one, np.ndarray):
                return np.where(rows, other, one)
            tokens = np.where(rows[:, None], other.tokens, one.tokens)
            return type(one)(tokens, np.where(rows, other.lengths, one.lengths))

        turned = {
            f"{prefix}{name}{suffix}": pick(
                getattr(self, f"{prefix}{name}{suffix}"),
                getattr(self, f"{prefix}{other}{suffix}"),
            )
            for prefix, suffix in (("", ""), ("", "_gold"), ("ref_", "_logps"))
            for name, other in (("chosen", "rejected"), ("rejected", "chosen"))
        }
        return dataclasses.replace(self, **turned)

    def batches(self, pad_id: int) -> Callable[[np.ndarray], PreferenceBatch]:
        """From row numbers to a batch of host arrays, reference log-probabilities included; sequences are laid out once."""
        chosen, rejected = self.sequences(pad_id)
        logps: Any = (self.ref_chosen_logps, self.ref_rejected_logps)
        whole = PreferenceBatch(chosen, rejected, *logps)
        return lambda rows: jax.tree.map(lambda leaf: leaf[rows], whole)

    def sequences(self, pad_id: int) -> tuple[SequenceBatch, SequenceBatch]:
        """(chosen, rejected) sequences of all pairs."""
        return (
            sequences(self.prompts, self.chosen, pad_id),
            sequences(self.prompts, self.rejected, pad_id),
        )

    def save(self, path: pathlib.Path) -> None:
        """Writes all arrays to one .npz file, in one piece; of several processes the first writes."""
        if jax.process_index() != 0:
            return
        arrays = {
            f"{name}.{part}": getattr(getattr(self, name), part)
            for name in ("prompts", "chosen", "rejected")
            for part in ("tokens", "lengths")
        }
        for name in _NUMBERS:
            arrays[name] = getattr(self, name)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        partial.replace(path)

    @classmethod
    def load(cls, path: pathlib.Path) -> Self:
        """Reads what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:

            def rows(kind, name):
                return kind(arrays[f"{name}.tokens"], arrays[f"{name}.lengths"])

            return cls(
                prompts=rows(Prompts, "prompts"),
                chosen=rows(Completions, "chosen"),
                rejected=rows(Completions, "rejected"),
                **{name: arrays[name] for name in _NUMBERS},
            )


_NUMBERS = ("chosen_gold", "rejected_gold", "ref_chosen_logps", "ref_rejected_logps")


def labelled_pairs(
    ground: Ground,
    task: Task,
    policy: Params,
    prompts: Prompts,
    *,
    seed: int,
    role: str,
    tau: float,
    temperature: float = 1.0,
) -> Pairs:
    """The pairs about some prompts: those that a dataset holds, else samples of the policy, see `sampled_pairs`."""
    if not (isinstance(task, Dataset) and task.has_pairs):
        return sampled_pairs(
            ground,
            task,
            policy,
            prompts,
            seed=seed,
            role=role,
            tau=tau,
            temperature=temperature,
        )
    chosen, rejected = task.pairs(prompts)
    golds = [_gold(task, prompts, each) for each in (chosen, rejected)]
    # Plain prompts: which rows they were is of no use to whoever learns from the pairs.
    plain = Prompts(prompts.tokens, prompts.lengths)
    logps = [
        score_once(
            ground,
            policy,
            sequences(plain, each, ground.pad_id),
            directory=task.reference_logps,
            tokenizer=task.fingerprint,
        )
        for each in (chosen, rejected)
    ]
    return Pairs(plain, chosen, rejected, *golds, *logps)


def _gold(task: Task, prompts: Prompts, completions: Completions) -> np.ndarray:
    """f32[N]: gold rewards, or NaN."""
    gold = gold_of(task, prompts, completions)
    return np.full(len(prompts), np.nan, np.float32) if gold is None else gold


def sampled_pairs(
    ground: Ground,
    task: Task,
    policy: Params,
    prompts: Prompts,
    *,
    seed: int,
    role: str,
    tau: float,
    temperature: float = 1.0,
) -> Pairs:
    """Two samples of the policy for each prompt, labelled once from the gold rewards with the labeller's noise.

    Args:
      ground, policy: what samples; its log-probabilities become the reference's.
      task: gives the gold reward.
      prompts: a pair each.
      seed, role: of sampling and labelling.
      tau: noise of the labeller, in reward units.
      temperature: > 0, of sampling; the reference's log-probabilities are its own, at temperature 1.
    """
    rollouts = sample_all(
        ground,
        policy,
        prompts,
        role_key(seed, f"{role}/sample"),
        num_samples=2,
        temperature=temperature,
    )
    completions = completions_of(rollouts, ground.completion_length)
    gold = task.reward(prompts.repeat(2), completions).reshape(-1, 2)
    first_wins = preference_labels(
        role_rng(seed, f"{role}/label"), gold[:, 0], gold[:, 1], tau
    )
    logps = np.where(rollouts.completion_mask, rollouts.logps, 0.0).sum(axis=1)
    first = np.arange(0, 2 * len(prompts), 2)
    chosen, rejected = first + ~first_wins, first + first_wins
    return _pairs(prompts, completions, gold.reshape(-1), logps, chosen, rejected)


def ranked_pairs(
    ground: Ground,
    task: Task,
    policy: Params,
    prompts: Prompts,
    rewards,
    *,
    samples_per_prompt: int,
    seed: int,
    role: str,
) -> Pairs:
    """The best and the worst of several samples of the policy for each prompt, by given rewards.

    Args:
      rewards: `(Rollouts, Prompts) -> f32[N · samples_per_prompt]`.
      samples_per_prompt: >= 2.
      Others as for `sampled_pairs`.
    """
    count = samples_per_prompt
    rollouts = sample_all(
        ground, policy, prompts, role_key(seed, role), num_samples=count
    )
    completions = completions_of(rollouts, ground.completion_length)
    values = sharding.fetch(rewards(rollouts, prompts.repeat(count)))
    values = values.reshape(-1, count)
    first = np.arange(0, count * len(prompts), count)
    chosen, rejected = first + values.argmax(axis=1), first + values.argmin(axis=1)
    gold = _gold(task, prompts.repeat(count), completions)
    logps = np.where(rollouts.completion_mask, rollouts.logps, 0.0).sum(axis=1)
    return _pairs(prompts, completions, gold, logps, chosen, rejected)


def joined(first: Pairs, second: Pairs) -> Pairs:
    """The rows of both."""

    def join(one, other):
        if isinstance(one, np.ndarray):
            return np.concatenate([one, other])
        return one.followed_by(other)

    return Pairs(
        **{
            field.name: join(getattr(first, field.name), getattr(second, field.name))
            for field in dataclasses.fields(Pairs)
        }
    )


def implicit_margins(ground: Ground, params: Params, pairs: Pairs) -> np.ndarray:
    """f64[N]: log-ratio of chosen less that of rejected, the policy's implicit reward margin at β = 1, nats."""
    chosen, rejected = pairs.sequences(ground.pad_id)
    both = host_sequences(
        np.concatenate([chosen.tokens, rejected.tokens]),
        np.concatenate([chosen.completion_mask, rejected.completion_mask]),
    )
    logps = score_all(ground, params, both).reshape(2, -1).astype(np.float64)
    return (logps[0] - pairs.ref_chosen_logps) - (logps[1] - pairs.ref_rejected_logps)


def _take(value, rows):
    return value[rows] if isinstance(value, np.ndarray) else value.take(rows)


def _pairs(prompts, completions, gold, logps, chosen, rejected) -> Pairs:
    return Pairs(
        prompts=prompts,
        chosen=completions.take(chosen),
        rejected=completions.take(rejected),
        chosen_gold=gold[chosen],
        rejected_gold=gold[rejected],
        ref_chosen_logps=logps[chosen],
        ref_rejected_logps=logps[rejected],
    )
