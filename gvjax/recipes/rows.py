"""Which rows, in which order, with which random numbers; and how what a task says becomes a batch.

Random numbers and order are pure functions of (seed, role, step), so that a resumed run goes on exactly where it was.
"""

import zlib
from typing import Any

import jax
import numpy as np

from gvjax import sharding
from gvjax.recipes.dataset import Dataset
from gvjax.tasks.task import Completions, Prompts, Task
from gvjax.types import Rollouts, SequenceBatch


def role_key(seed: int, role: str, step: int = 0) -> jax.Array:
    """The random key of one role at one step of one seed."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(role.encode()))
    return jax.random.fold_in(key, step)


def role_rng(seed: int, role: str, step: int = 0) -> np.random.Generator:
    """The host's random numbers of one role at one step of one seed."""
    return np.random.default_rng([seed, zlib.crc32(role.encode()), step])


def rows_at(seed: int, role: str, count: int, batch_size: int, step: int) -> np.ndarray:
    """int64[batch_size]: the rows of step `step` when `count` rows are walked through epoch by epoch, reshuffled.

    A function of its arguments alone, so a resumed run goes on exactly where it was.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = places // count
    order = {
        epoch: role_rng(seed, role, int(epoch)).permutation(count)
        for epoch in np.unique(epochs)
    }
    return np.array(
        [order[epoch][place % count] for epoch, place in zip(epochs, places)]
    )


def demonstrations_at(
    task: Task, seed: int, count: int, step: int
) -> tuple[Prompts, Completions]:
    """What SFT imitates at one step: fresh draws of a task that makes them, else the rows epoch by epoch."""
    if isinstance(task, Dataset):
        return task.demonstrations_of(
            rows_at(seed, "demonstrations", len(task.demonstrated), count, step)
        )
    rng = role_rng(seed, "demonstrations", step)
    prompts = task.prompts(rng, count, "train")
    return prompts, task.demonstrations(rng, prompts)


def sequences(prompts: Prompts, completions: Completions, pad_id: int) -> SequenceBatch:
    """Prompts and completions in the one layout: prompt, completion, padding on the right.

    Args:
      prompts, completions: a row each.
      pad_id: what stands behind.

    Returns:
      SequenceBatch of host arrays [B, P + C].
    """
    width = prompts.tokens.shape[1] + completions.tokens.shape[1]
    places = np.arange(width)[None]
    start = prompts.lengths[:, None]
    inside = (places >= start) & (places < start + completions.lengths[:, None])
    wide_prompts = np.pad(
        prompts.tokens, ((0, 0), (0, width - prompts.tokens.shape[1]))
    )
    at = np.clip(places - start, 0, completions.tokens.shape[1] - 1)
    wide_completions = np.take_along_axis(completions.tokens, at, axis=1)
    tokens = np.where(
        places < start, wide_prompts, np.where(inside, wide_completions, pad_id)
    )
    return host_sequences(tokens.astype(np.int32), inside)


def host_sequences(tokens: Any, completion_mask: Any) -> SequenceBatch:
    """A SequenceBatch of host arrays, which `Ground.put` places on the mesh."""
    return SequenceBatch(tokens, completion_mask)


def completions_of(rollouts: Rollouts, width: int) -> Completions:
    """The sampled completions of rollouts, as a task reads them."""
    tokens, mask = sharding.fetch((rollouts.tokens, rollouts.completion_mask))
    start = np.where(mask.any(axis=1), mask.argmax(axis=1), tokens.shape[1])
    at = np.clip(start[:, None] + np.arange(width), 0, tokens.shape[1] - 1)
    return Completions(
        np.take_along_axis(tokens, at, axis=1), mask.sum(axis=1, dtype=np.int32)
    )
