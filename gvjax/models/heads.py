"""Heads on the decoder's trunk: a scalar reward per completion, scores per token, values per position.

Parameters are `{"trunk": ..., "head": {"kernel": [D, 1], "bias": [1]}}`; the trunk is the decoder's parameters without
the unembedding, which nothing here reads.

Pooling is a static argument of the function that makes a scorer, not a flag somewhere: a jitted function that read a
flag would go on scoring with the pooling it was traced with.
"""

from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gvjax import masked
from gvjax.models import platforms, transformer
from gvjax.models.config import ModelConfig
from gvjax.models.layers import Kept, at
from gvjax.types import Params, RewardFn, ValuesFn

Pooling = Literal["last", "mean", "sum"]
Over = Literal["completion", "all"]

PARTITION_RULES = (*transformer.PARTITION_RULES, (r"head/(kernel|bias)", P()))


def init(
    key: jax.Array,
    config: ModelConfig,
    trunk: Params | None = None,
    *,
    zero: bool = True,
) -> Params:
    """Parameters of a reward model or critic.

    Args:
      key: consumed.
      config: of the trunk.
      trunk: a policy's parameters to start from, usually the SFT's; they are not copied. None: random ones.
      zero: a head of zeros, so that every reward starts at 0; else normal with standard deviation 1/√(D + 1), as in
        Stiennon et al., 2020, https://arxiv.org/abs/2009.01325.
    """
    trunk_key, head_key = jax.random.split(key)
    if trunk is None:
        trunk = transformer.init(trunk_key, config)
    shape = (config.embed_dim, 1)
    scale = (config.embed_dim + 1) ** -0.5
    kernel = jnp.zeros(shape) if zero else scale * jax.random.normal(head_key, shape)
    return {
        "trunk": {name: part for name, part in trunk.items() if name != "unembed"},
        "head": {"kernel": kernel, "bias": jnp.zeros(1)},
    }


def reward_fn(
    config: ModelConfig,
    *,
    pooling: Pooling = "sum",
    over: Over = "completion",
    shortest_prompt: int = 0,
    mesh: Mesh | None = None,
    platform: str | None = None,
) -> RewardFn:
    """A RewardFn: the head applied to pooled hidden states.

        last:  r = w · h_T + b            T the completion's last token
        mean:  r = mean_t (w · h_t + b)
        sum:   r = Σ_t (w · h_t + b)      t over the completion, or over all real tokens

    `sum` learned rewards that add up over the completion (goals visited, say) in a tenth of the steps and from data on
    which `last` stayed near chance; `last` is what most published reward models use.

    Args:
      config: of the trunk.
      pooling: "last", "mean" or "sum".
      over: what mean and sum run over: the "completion", or "all" real tokens, prompt included.
      shortest_prompt: >= 0, tokens at the start of every row that belong to its prompt; packed rows have none.
      mesh, platform: as for `transformer.hidden`.

    Returns:
      `(params, tokens int32[B, T], completion_mask bool[B, T]) -> f32[B]`. What follows the completion changes
      nothing. An empty completion gets 0, whatever the pooling. Packed rows: with `segments` int32[B, T] and
      `num_segments` S it returns f32[B, S], the rewards of segments 1 to S.
    """
    if pooling not in ("last", "mean", "sum"):
        raise ValueError(f"pooling is {pooling!r}; it must be last, mean or sum")
    if over not in ("completion", "all"):
        raise ValueError(f"over is {over!r}; it must be completion or all")
    if pooling == "last" and over != "completion":
        raise ValueError(
            "pooling 'last' reads one token and has nothing to run over; leave `over` at 'completion'"
        )

    # As for log-probabilities: nobody looks at the head over a prompt.
    trims = platforms.traits(platforms.name_of(mesh, platform)).trims
    skip = shortest_prompt if trims and over == "completion" else 0

    def pooled(scores, mask, real):
        """f32[B]: of scores f32[B, T], for completions at `mask` among the tokens at `real`."""
        last = _last(mask)
        places = jnp.arange(scores.shape[1])[None]
        if pooling == "last":
            value = masked.sum(scores, (places == last[:, None]), axis=1)
        else:
            seen = mask if over == "completion" else real & (places <= last[:, None])
            pool = masked.mean if pooling == "mean" else masked.sum
            value = pool(scores, seen, axis=1)
        return jnp.where(jnp.any(mask, axis=1), value, 0.0)

    def of_last(params, tokens, mask):
        place = jnp.maximum(_last(mask), 0)
        scores = _scores(
            config, params, tokens, mesh, platform, kept=lambda part: at(part, place)
        )
        return jnp.where(jnp.any(mask, axis=1), scores[:, 0], 0.0)

    def rewards(params, tokens, completion_mask, segments=None, num_segments=1):
        chex.assert_equal_shape([tokens, completion_mask])
        if segments is None:
            if trims and pooling == "last":
                return of_last(params, tokens, completion_mask)
            first = min(skip, tokens.shape[1] - 1)
            kept = (lambda part: part[:, first:]) if first else None
            scores = _scores(config, params, tokens, mesh, platform, kept=kept)
            return pooled(scores, completion_mask[:, first:], True)
        scores = _scores(config, params, tokens, mesh, platform, segments)
        chex.assert_equal_shape([tokens, segments])

        def of_segment(number):
            here = segments == number
            return pooled(scores, completion_mask & here, here)

        return jax.vmap(of_segment, out_axes=1)(1 + jnp.arange(num_segments))

    return rewards


def token_rewards_fn(
    config: ModelConfig, *, mesh: Mesh | None = None, platform: str | None = None
) -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    """A score for each completion token, `w · h_t + b`, that has seen the tokens up to and including it.

    Their sum over a row is `reward_fn(pooling="sum")`: a reward model made of per-token terms, as a DPO policy's
    implicit reward is.

    Returns:
      `(params, tokens int32[B, T], completion_mask bool[B, T]) -> f32[B, T]`, 0 outside the completion.
    """

    def token_rewards(params, tokens, completion_mask):
        chex.assert_equal_shape([tokens, completion_mask])
        scores = _scores(config, params, tokens, mesh, platform)
        return masked.select(scores, completion_mask)

    return token_rewards


def values_fn(
    config: ModelConfig, *, mesh: Mesh | None = None, platform: str | None = None
) -> ValuesFn:
    """A critic: `values[b, t] = w · h_{t−1} + b`, the value before token t is chosen; column 0 is 0.

    Returns:
      `(params, tokens int32[B, T]) -> f32[B, T]`.
    """

    def values(params, tokens):
        scores = _scores(config, params, tokens, mesh, platform)
        return jnp.pad(scores[:, :-1], ((0, 0), (1, 0)))

    return values


def _scores(
    config, params, tokens, mesh, platform, segments=None, kept: Kept | None = None
) -> jax.Array:
    """f32[B, T']: the head at every position, or at those that are kept."""
    states = transformer.hidden(
        config,
        params["trunk"],
        tokens,
        segments,
        kept=kept,
        mesh=mesh,
        platform=platform,
    )
    head = params["head"]
    return (states.astype(jnp.float32) @ head["kernel"])[..., 0] + head["bias"]


def _last(mask: jax.Array) -> jax.Array:
    """int32[B]: where the last True of each row stands, −1 where there is none."""
    places = jnp.arange(mask.shape[1])
    return jnp.max(jnp.where(mask, places, -1), axis=1)
