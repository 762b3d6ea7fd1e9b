"""Compiled programs that every recipe uses: sampling and scoring, of a batch or of any number of rows."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gvjax import lanes, sampling, sharding, steps
from gvjax.models import decoding, heads
from gvjax.recipes.ground import Ground, cached
from gvjax.tasks.task import Prompts
from gvjax.types import Params, Rollouts, SequenceBatch


@cached
def sampler(
    ground: Ground, num_samples: int, temperature: float = 1.0
) -> Callable[..., Rollouts]:
    """Compiled sampling of N · num_samples rows.

    Returns:
      `(params, prompts int32[N, P], lengths int32[N], key, prompt_ids int32[N]) -> Rollouts`.
    """
    decode = decoding.decode_fn(ground.model, mesh=ground.mesh)
    init_cache = functools.partial(decoding.init_cache, ground.model, mesh=ground.mesh)
    shards = sharding.batch_shards(ground.mesh)

    @lanes.jit
    def sample(params, prompts, lengths, key, prompt_ids):
        return sampling.generate(
            decode,
            init_cache,
            _decode_params(ground, params),
            prompts,
            lengths,
            key,
            max_new_tokens=ground.completion_length,
            num_samples=num_samples,
            eos_id=ground.eos_id,
            pad_id=ground.pad_id,
            temperature=temperature,
            allow_truncated_support=temperature == 0,
            prompt_ids=prompt_ids,
            compact=shards if ground.compact_sampling else None,
            share_prompts=num_samples > 1,
        )

    return sample


def _decode_params(ground: Ground, policy: Params) -> Params:
    """A policy as decoding reads it, laid out for that."""
    params = ground.with_adapters(policy)
    made = decoding.decode_params(ground.model, params)
    if not ground.gather_for_sampling:
        return made
    placed = jax.tree.map(
        lambda leaf: sharding.without_fsdp(leaf.spec),
        sharding.shardings(ground.mesh, params, ground.rules),
    )
    # Stacked layers have a leading axis, which those that are taken apart have not.
    layer = jax.tree.map(
        lambda spec: P(*spec[1:]), placed["layers"], is_leaf=lambda x: isinstance(x, P)
    )
    specs = {**placed, "layers": (layer,) * ground.model.num_layers}
    return jax.tree.map(
        lambda p, spec: jax.lax.with_sharding_constraint(
            p, NamedSharding(ground.mesh, spec)
        ),
        made,
        specs,
    )


@cached
def scorer(
    ground: Ground, group_size: int = 1
) -> Callable[[Params, SequenceBatch], jax.Array]:
    """Compiled scoring: `(params, SequenceBatch) -> f32[B, T]`, log-probabilities of the completion tokens.

    Args:
      group_size: rows in a row that share a prompt.
    """
    logps_fn = ground.group_logps_fn(group_size)
    return lanes.jit(functools.partial(steps.completion_logps, logps_fn))


@cached
def reward_scorer(
    ground: Ground, pooling: heads.Pooling
) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    """Compiled reward model: `(params, tokens, completion_mask) -> f32[B]`."""
    return lanes.jit(ground.reward_fn(pooling))


def in_parts(ground: Ground, rows: int, most: int) -> list[np.ndarray]:
    """Row numbers in parts of one size, at most about `most`, the last filled up by repeating its final row.

    One shape for every call means one compiled program; the size divides over the mesh.
    """
    shards = sharding.batch_shards(ground.mesh)
    parts = -(-rows // max(most, 1))
    size = -(-rows // (parts * shards)) * shards
    return [
        np.minimum(np.arange(first, first + size), rows - 1)
        for first in range(0, rows, size)
    ]


def sample_all(
    ground: Ground,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    *,
    num_samples: int = 1,
    temperature: float = 1.0,
) -> Rollouts:
    """Samples for any number of prompts, in compiled parts; host arrays.

    Args:
      ground, params: the policy.
      prompts: any number of rows.
      key: consumed; each prompt's draws come from its row number, whatever the parts.
      num_samples: completions per prompt.
      temperature: >= 0; only samples drawn at 1 are the policy's own, for a loss that learns from those.
    """
    sample = sampler(ground, num_samples, temperature)
    made = []
    for rows in in_parts(ground, len(prompts), ground.rows_per_call // num_samples):
        placed = ground.put((prompts.tokens[rows], prompts.lengths[rows], rows))
        rollouts = sample(params, *placed[:2], key, placed[2])
        made.append(sharding.fetch(rollouts))
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *made)
    return jax.tree.map(lambda rows: rows[: len(prompts) * num_samples], joined)


def score_all(ground: Ground, params: Params, batch: SequenceBatch) -> np.ndarray:
    """f32[B]: summed log-probability of each completion, for any number of rows, nats."""
    return _in_parts(
        ground,
        lambda rows: jnp.sum(scorer(ground)(params, rows), axis=1),
        batch,
    )


def reward_all(
    ground: Ground,
    pooling: heads.Pooling,
    params: Params,
    batch: SequenceBatch,
) -> np.ndarray:
    """f32[B]: the reward model's reward of each completion, for any number of rows."""
    score = reward_scorer(ground, pooling)
    return _in_parts(
        ground,
        lambda rows: score(params, rows.tokens, rows.completion_mask),
        batch,
    )


def _in_parts(ground, function, batch: SequenceBatch) -> np.ndarray:
    count = len(batch.tokens)
    made = []
    for rows in in_parts(ground, count, ground.rows_per_call):
        some = SequenceBatch(batch.tokens[rows], batch.completion_mask[rows])
        made.append(sharding.fetch(function(ground.put(some))))
    return np.concatenate(made)[:count]
