"""Causal attention, and the one place where its kernel is chosen.

Everything takes queries `[B, S, H, hd]` and keys and values `[B, S, K, hd]` with H a multiple of K (grouped queries:
head h reads key head h // (H / K)).
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gvjax.models.xla import once

Kernel = Literal["xla", "cudnn", "splash"]

_MASKED = -1e30  # finite, so that a padding row which sees nothing stays finite too


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """What one layer's attention needs to know.

    Attributes:
      scale: what queries are multiplied by, usually 1/√hd.
      window: a token sees itself and the window − 1 tokens before it; None is all of them.
      softcap: scores become softcap · tanh(scores / softcap); None leaves them.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


def choose_kernel(
    config: AttentionConfig,
    *,
    platform: str | None,
    dtype: jnp.dtype,
    head_dim: int,
    packed: bool,
) -> Kernel:
    """The fastest kernel that computes exactly this attention on this platform.

    | platform | kernel | where it applies |
    |---|---|---|
    | gpu | cudnn | bf16 or f16, head_dim <= 128 and a multiple of 8, no soft cap, not packed |
    | tpu | splash | head_dim at most 128, or a multiple of it |
    | any other, and None | xla | always |

    `platform` is the mesh's, never the process' default backend: a program compiled ahead of time for a TPU is traced
    on a CPU.
    """
    if (
        platform == "gpu"
        and dtype in (jnp.bfloat16, jnp.float16)
        and head_dim <= 128
        and head_dim % 8 == 0
        and config.softcap is None
        and not packed
    ):
        return "cudnn"
    if platform == "tpu" and (head_dim < 128 or head_dim % 128 == 0):
        return "splash"
    return "xla"


def causal_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    config: AttentionConfig,
    segments: jax.Array | None = None,
    platform: str | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Attention of whole sequences: position t sees positions <= t of its own segment, within the window.

    Args:
      queries: [B, T, H, hd].
      keys, values: [B, T, K, hd].
      config: AttentionConfig.
      segments: int32[B, T] or None (one segment per row).
      platform: "cpu", "gpu", "tpu" or None (plain XLA); see `choose_kernel`.
      mesh: the mesh that the splash kernel is split over; the others are split by the compiler.

    Returns:
      [B, T, H, hd].
    """
    kernel = choose_kernel(
        config,
        platform=platform,
        dtype=queries.dtype,
        head_dim=queries.shape[-1],
        packed=segments is not None,
    )
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(
            queries,
            keys,
            values,
            scale=config.scale,
            is_causal=True,
            local_window_size=None if config.window is None else (config.window - 1, 0),
            implementation="cudnn",
        )
    if kernel == "splash":
        return _splash(queries, keys, values, config, segments, mesh)
    return _blocked(queries, keys, values, config, segments)


def cached_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    config: AttentionConfig,
    positions: jax.Array,
    slot_positions: jax.Array,
) -> jax.Array:
    """Attention of new tokens over a cache.

    Args:
      queries: [B, S, H, hd].
      keys, values: [B, K, T, hd], head-major so that no step transposes the cache.
      config: AttentionConfig.
      positions: int32[B, S], the position of each new token in its row; −1 is padding.
      slot_positions: int32[B, T], the position of the token in each slot; −1 is an empty slot or padding.

    Returns:
      [B, S, H, hd].
    """
    slots, new = slot_positions[:, None, :], positions[:, :, None]
    mask = (slots >= 0) & (slots <= new)
    if config.window is not None:
        mask &= slots > new - config.window
    heads_out = _attend(
        _grouped(queries, keys.shape[1]), keys, values, mask[:, None, None], config
    )
    return _ungrouped(heads_out)


def selected_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    config: AttentionConfig,
    positions: jax.Array,
) -> jax.Array:
    """`causal_attention` of a few positions of whole sequences.

    Args:
      queries: [B, S, H, hd], of these positions only.
      keys, values: [B, T, K, hd], of all.
      config: AttentionConfig.
      positions: int32[B, S], in [0, T).

    Returns:
      [B, S, H, hd].
    """
    places = jnp.arange(keys.shape[1])[None]
    return cached_attention(
        queries,
        keys.swapaxes(1, 2),
        values.swapaxes(1, 2),
        config=config,
        positions=positions,
        slot_positions=jnp.broadcast_to(places, keys.shape[:2]),
    )


def group_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    config: AttentionConfig,
    prompt_mask: jax.Array,
    group_size: int,
) -> jax.Array:
    """Attention of k completions over the prompt they share and each over itself.

    Args:
      queries: [N, k · S, H, hd], of the completions, one behind the other.
      keys, values: [N, P + k · S, K, hd], the prompt's in front.
      config: AttentionConfig, without a window.
      prompt_mask: bool[N, P], False on padding.
      group_size: k.

    Returns:
      [N, k · S, H, hd].
    """
    number, width = prompt_mask.shape
    kv_heads, head_dim = keys.shape[2:]
    each = queries.shape[1] // group_size
    # [N, K, k, G · S, hd]: the queries that see the same keys stand together.
    own = (number, kv_heads, group_size, -1, head_dim)
    split = _grouped(queries, kv_heads).reshape(
        number, kv_heads, -1, group_size, each, head_dim
    )
    scaled = split.swapaxes(2, 3) * jnp.asarray(config.scale, queries.dtype)
    keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    out = _shared(
        scaled.reshape(own),
        (keys[:, :, :width], values[:, :, :width]),
        (keys[:, :, width:].reshape(own), values[:, :, width:].reshape(own)),
        prompt_mask,
        config,
    )
    out = out.reshape(split.swapaxes(2, 3).shape).swapaxes(2, 3)
    return _ungrouped(out.reshape(number, kv_heads, -1, group_size * each, head_dim))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _shared(queries, prompt, own, prompt_mask, config: AttentionConfig) -> jax.Array:
    """[N, K, k, G · S, hd] scaled queries over the prompt's keys and values [N, K, P, hd] and their own [N, K, k, S, hd].

    The gradient is written out as in `_blocks`, for the same reasons.
    """
    return _shared_forward(queries, prompt, own, prompt_mask, config)[0]


def _shared_forward(queries, prompt, own, prompt_mask, config: AttentionConfig):
    scores, _ = _shared_scores(queries, prompt, own, prompt_mask, config)
    most = jnp.maximum(*(jnp.max(part, axis=-1, keepdims=True) for part in scores))
    weights = [jnp.exp(part - most) for part in scores]
    sums = sum(jnp.sum(part, axis=-1, keepdims=True) for part in weights)
    of_prompt, of_own = (part.astype(queries.dtype) for part in weights)
    out = _product("bkist,bktd->bkisd", of_prompt, prompt[1])
    out += _product("bkist,bkitd->bkisd", of_own, own[1])
    out = (out / sums).astype(queries.dtype)
    kept = None
    if _keeps_weights(queries, prompt[0].shape[2] + own[0].shape[3], config):
        kept = [part / sums for part in weights]
    log_sum = most + jnp.log(sums)
    return out, (queries, prompt, own, prompt_mask, out, log_sum, kept)


def _shared_backward(config: AttentionConfig, kept, g):
    queries, prompt, own, prompt_mask, out, log_sum, weights = kept
    slopes = None
    if weights is None:
        queries = once(g, queries)
        scores, slopes = _shared_scores(queries, prompt, own, prompt_mask, config)
        weights = [jnp.exp(part - log_sum) for part in scores]
    of_prompt, of_own = weights
    dots = jnp.sum(g.astype(jnp.float32) * out, axis=-1, keepdims=True)
    moves = [
        of_prompt * (_product("bkisd,bktd->bkist", g, prompt[1]) - dots),
        of_own * (_product("bkisd,bkitd->bkist", g, own[1]) - dots),
    ]
    if slopes is not None:
        moves = [move * slope for move, slope in zip(moves, slopes)]
    to_prompt, to_own = (move.astype(queries.dtype) for move in moves)
    of_prompt, of_own = (part.astype(g.dtype) for part in (of_prompt, of_own))
    of_queries = _product("bkist,bktd->bkisd", to_prompt, prompt[0])
    of_queries += _product("bkist,bkitd->bkisd", to_own, own[0])
    prompt_found = _gathered(to_prompt, queries), _gathered(of_prompt, g)

    # [N, K, k, ...] -> [N, K · k, 1, ...]: every completion hands to keys of its own.
    def each(part):
        return part.reshape(part.shape[0], -1, 1, *part.shape[3:])

    own_found = (
        _gathered(each(to_own), each(queries)).reshape(own[0].shape),
        _gathered(each(of_own), each(g)).reshape(own[1].shape),
    )
    like = (queries, prompt, own)
    found = (of_queries, prompt_found, own_found)
    return (*jax.tree.map(lambda x, y: x.astype(y.dtype), found, like), None)


_shared.defvjp(_shared_forward, _shared_backward)


def _shared_scores(queries, prompt, own, prompt_mask, config: AttentionConfig):
    """Masked scores f32[N, K, k, G · S, P] and [N, K, k, G · S, S]; how much the soft cap slowed each, or None."""
    each = own[0].shape[3]
    # Query g · S + s is the s-th of its completion.
    causal = np.tile(np.tri(each, dtype=bool), (queries.shape[3] // each, 1))
    scores = [
        _product("bkisd,bktd->bkist", queries, prompt[0]),
        _product("bkisd,bkitd->bkist", queries, own[0]),
    ]
    slopes = None
    if config.softcap is not None:
        bent = [jnp.tanh(part / config.softcap) for part in scores]
        scores = [config.softcap * part for part in bent]
        slopes = [1 - jnp.square(part) for part in bent]
    masks = (prompt_mask[:, None, None, None], causal)
    return [jnp.where(m, part, _MASKED) for m, part in zip(masks, scores)], slopes


def _grouped(queries: jax.Array, num_kv_heads: int) -> jax.Array:
    batch, length, heads, width = queries.shape
    shape = (batch, length, num_kv_heads, heads // num_kv_heads, width)
    return queries.reshape(shape).transpose(0, 2, 3, 1, 4)


def _ungrouped(heads_out: jax.Array) -> jax.Array:
    batch, kv_heads, group, length, width = heads_out.shape
    out = heads_out.transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, kv_heads * group, width)


def _attend(queries, keys, values, mask, config: AttentionConfig) -> jax.Array:
    """[B, K, G, S, hd] queries over [B, K, T, hd] keys and values; mask broadcasts to [B, K, G, S, T]."""
    scores = jnp.einsum(
        "bkgsd,bktd->bkgst",
        queries * jnp.asarray(config.scale, queries.dtype),
        keys,
        preferred_element_type=jnp.float32,
    )
    if config.softcap is not None:
        scores = config.softcap * jnp.tanh(scores / config.softcap)
    weights = jax.nn.softmax(jnp.where(mask, scores, _MASKED), axis=-1)
    return jnp.einsum("bkgst,bktd->bkgsd", weights.astype(values.dtype), values)


def _blocked(queries, keys, values, config: AttentionConfig, segments) -> jax.Array:
    """Blocks of queries, each with the keys it can see and no others: half the products of the whole square."""
    scaled = _grouped(queries, keys.shape[2]) * jnp.asarray(config.scale, queries.dtype)
    keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    return _ungrouped(_blocks(scaled, keys, values, segments, config))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocks(queries, keys, values, segments, config: AttentionConfig) -> jax.Array:
    """[B, K, G, T, hd] scaled queries over [B, K, T, hd] keys and values, each block's scores made and gone in turn.

    The gradient is written out because the derived one keeps every block's weights and takes half as long again on a
    CPU. With s the scores, p = exp(s − l) the weights and l the logarithm of their sum:

        ∂v = pᵀ g,   ∂s = p · (g vᵀ − Σ_d g · out),   ∂q = ∂s k,   ∂k = ∂sᵀ q

    References:
      Dao et al., 2022, https://arxiv.org/abs/2205.14135, Appendix B.
    """
    return _blocks_forward(queries, keys, values, segments, config)[0]


def _blocks_forward(queries, keys, values, segments, config: AttentionConfig):
    outs, log_sums, kept = [], [], []
    for block in _spans(queries.shape[3], config.window):
        scores, _ = _scores(queries, keys, segments, block, config)
        most = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - most)
        sums = jnp.sum(weights, axis=-1, keepdims=True)
        seen = values[:, :, block.first : block.stop]
        out = _product("bkgst,bktd->bkgsd", weights.astype(values.dtype), seen)
        outs.append((out / sums).astype(values.dtype))
        log_sums.append(most + jnp.log(sums))
        keeps = _keeps_weights(queries, keys.shape[2], config)
        kept.append(weights / sums if keeps else None)
    out, log_sum = _joined(outs), _joined(log_sums)
    return out, (queries, keys, values, segments, out, log_sum, kept)


def _blocks_backward(config: AttentionConfig, kept, g):
    queries, keys, values, segments, out, log_sum, known = kept
    if known[0] is None:
        queries = once(g, queries)
        keys, values = (once(g[:, :, 0], part) for part in (keys, values))
    # A product with ones: the sum over so short an axis takes a CPU longer, and once more for every score.
    ones = jnp.ones((g.shape[-1], 1), jnp.float32)
    dots = jnp.matmul(g.astype(jnp.float32) * out, ones, precision="highest")
    of_queries = []
    of_keys = jnp.zeros(keys.shape, jnp.float32)
    of_values = jnp.zeros(values.shape, jnp.float32)
    for block, weights in zip(_spans(queries.shape[3], config.window), known):
        new = (slice(None), slice(None), slice(None), slice(block.start, block.stop))
        old = (slice(None), slice(None), slice(block.first, block.stop))
        slope = None
        if weights is None:
            scores, slope = _scores(queries, keys, segments, block, config)
            weights = jnp.exp(scores - log_sum[new])
        of_weights = _product("bkgsd,bktd->bkgst", g[new], values[old])
        of_scores = weights * (of_weights - dots[new])
        if slope is not None:
            of_scores = of_scores * slope
        of_scores = of_scores.astype(keys.dtype)
        of_queries.append(_product("bkgst,bktd->bkgsd", of_scores, keys[old]))
        of_keys = of_keys.at[old].add(_gathered(of_scores, queries[new]))
        weights = weights.astype(g.dtype)
        of_values = of_values.at[old].add(_gathered(weights, g[new]))
    return (
        _joined(of_queries).astype(queries.dtype),
        of_keys.astype(keys.dtype),
        of_values.astype(values.dtype),
        None,
    )


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _keeps_weights(queries, length: int, config: AttentionConfig) -> bool:
    """Whether the backward pass is handed the weights of attention over `length` keys: where they are no larger than the
    queries, as of short sequences, and no soft cap asks for the scores all the same."""
    return length <= queries.shape[-1] and config.softcap is None


class _Span(NamedTuple):
    """Queries start..stop, which see keys first..stop."""

    start: int
    stop: int
    first: int


def _spans(length: int, window: int | None) -> list[_Span]:
    # Measured on a CPU: products of larger blocks are faster, and more of each is masked, at a window's edge too. At most 16
    # of them keep long programs short, and 512 queries their memory.
    quarter = 128 if window is not None else 2 ** int(np.log2(max(length // 4, 1)))
    size = max(128, min(quarter, 512), -(-length // 16))
    return [
        _Span(
            start,
            min(start + size, length),
            0 if window is None else max(0, start - window + 1),
        )
        for start in range(0, length, size)
    ]


def _scores(queries, keys, segments, block: _Span, config: AttentionConfig):
    """A block's masked scores f32[B, K, G, S, T'], and by how much the soft cap slowed each; None without one."""
    scores = _product(
        "bkgsd,bktd->bkgst",
        queries[:, :, :, block.start : block.stop],
        keys[:, :, block.first : block.stop],
    )
    slope = None
    if config.softcap is not None:
        bent = jnp.tanh(scores / config.softcap)
        scores, slope = config.softcap * bent, 1 - jnp.square(bent)
    new = np.arange(block.start, block.stop)[:, None]
    old = np.arange(block.first, block.stop)[None]
    mask = old <= new
    if config.window is not None:
        mask &= old > new - config.window
    if segments is not None:
        of_new = segments[:, block.start : block.stop, None]
        same = of_new == segments[:, None, block.first : block.stop]
        mask = (mask & same)[:, None, None]
    return jnp.where(mask, scores, _MASKED), slope


def _product(spec: str, one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.einsum(spec, one, other, preferred_element_type=jnp.float32)


def _gathered(weights: jax.Array, of_queries: jax.Array) -> jax.Array:
    """f32[B, K, T, hd]: what all queries [B, K, G, S, hd] hand to each key, by weights [B, K, G, S, T].

    The transposed product comes first: the narrow operand is then the one that is turned, and not the weights.
    """
    product = _product("bkgsd,bkgst->bkdt", of_queries, weights)
    return jax.lax.optimization_barrier(product).swapaxes(2, 3)


def _joined(blocks: list[jax.Array]) -> jax.Array:
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=3)


def _splash(queries, keys, values, config: AttentionConfig, segments, mesh):
    """Pallas' splash attention: skips masked blocks, never holds the scores. Lengths are padded to blocks of 128."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    batch, length = queries.shape[:2]
    padding = -length % 128
    shape = (length + padding, length + padding)
    mask = (
        masks.CausalMask(shape)
        if config.window is None
        else masks.LocalMask(shape, (config.window - 1, 0), offset=0)
    )
    if segments is None:
        segments = jnp.zeros((batch, length), jnp.int32)
    pads = ((0, 0), (0, padding), (0, 0), (0, 0))
    queries, keys, values = (
        jnp.pad(x, pads).swapaxes(1, 2)
        for x in (queries * jnp.asarray(config.scale, queries.dtype), keys, values)
    )
    segments = jnp.pad(segments, pads[:2], constant_values=-1)

    def attend(queries, keys, values, segments):
        # Made here, of the heads that this shard holds.
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * queries.shape[1]),
            attn_logits_soft_cap=config.softcap,
            head_shards=1,
            q_seq_shards=1,
        )
        return jax.vmap(
            lambda q, k, v, ids: kernel(q, k, v, kernels.SegmentIds(ids, ids))
        )(queries, keys, values, segments)

    if mesh is not None:
        split = P(("data", "fsdp"), "tensor", None, None)
        attend = jax.shard_map(
            attend,
            mesh=mesh,
            in_specs=(split, split, split, P(("data", "fsdp"), None)),
            out_specs=split,
            check_vma=False,
        )
    return attend(queries, keys, values, segments).swapaxes(1, 2)[:, :length]
