"""Causal attention, and the one place where its kernel is chosen.

Everything takes queries `[B, S, H, hd]` and keys and values `[B, S, K, hd]` with H a multiple of K (grouped queries:
head h reads key head h // (H / K)).
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gvjax.models import blocked
from gvjax.models.blocked import MASKED, AttentionConfig

Kernel = Literal["xla", "cudnn", "splash"]


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
    pattern, loops = blocked.Causal(config), blocked.loops(platform, mesh)
    return blocked.blocked(queries, keys, values, segments, pattern, loops)


def cached_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    config: AttentionConfig,
    positions: jax.Array,
    slot_positions: jax.Array,
    prompts: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Attention of new tokens over a cache.

    Args:
      queries: [B, S, H, hd].
      keys, values: [B, K, T, hd], head-major so that no step transposes the cache.
      config: AttentionConfig.
      positions: int32[B, S], the position of each new token in its row; −1 is padding.
      slot_positions: int32[B, T], the position of the token in each slot; −1 is an empty slot or padding.
      prompts: what stands in front of those: keys and values [N, K, P, hd] of prompts and int32[N, P], each seen by the
        B / N rows that continue it, which stand together. They are read once a prompt, and not once a row.

    Returns:
      [B, S, H, hd].
    """

    def sees(slots):
        slots, new = slots[:, None, :], positions[:, :, None]
        mask = (slots >= 0) & (slots <= new)
        if config.window is not None:
            mask &= slots > new - config.window
        return mask[:, None, None]

    split = blocked.grouped(
        queries * jnp.asarray(config.scale, queries.dtype), keys.shape[1]
    )
    parts = [(_scores(split, keys, config), sees(slot_positions))]
    if prompts is not None:
        in_keys, in_values, places = prompts
        each = len(queries) // len(in_keys)
        shape = split.shape[:-1]
        scores = _scores(_by_prompt(split, each), in_keys, config)
        seen = sees(jnp.repeat(places, each, axis=0))
        parts.append((_by_row(scores, shape, each), seen))
    scores = jnp.concatenate(
        [jnp.where(mask, part, MASKED) for part, mask in parts], axis=-1
    )
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    if prompts is None:
        return blocked.ungrouped(_read(weights, values))
    # Rounded once, when both are added.
    of_own, of_prompt = jnp.split(weights, [keys.shape[2]], axis=-1)
    out = _read(of_own, values, jnp.float32)
    read = _read(_by_prompt(of_prompt, each), in_values, jnp.float32)
    out += _by_row(read, shape, each)
    return blocked.ungrouped(out.astype(values.dtype))


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
    pattern = blocked.Grouped(config, group_size)
    return blocked.blocked(queries, keys, values, prompt_mask, pattern, "never")


def _scores(queries, keys, config: AttentionConfig) -> jax.Array:
    """f32[B, K, G, S, T] of scaled queries [B, K, G, S, hd] and keys [B, K, T, hd]."""
    scores = jnp.einsum(
        "bkgsd,bktd->bkgst", queries, keys, preferred_element_type=jnp.float32
    )
    return blocked.capped(scores, config)[0]


def _read(weights: jax.Array, values: jax.Array, dtype: Any = None) -> jax.Array:
    return jnp.einsum(
        "bkgst,bktd->bkgsd", weights, values, preferred_element_type=dtype
    )


def _by_prompt(of_rows: jax.Array, each: int) -> jax.Array:
    """[N, K, 1, each · G · S, n] of [N · each, K, G, S, n]: what reads the same prompt stands together."""
    rows, heads, group, length, width = of_rows.shape
    apart = of_rows.reshape(rows // each, each, heads, group, length, width)
    together = apart.transpose(0, 2, 1, 3, 4, 5)
    return together.reshape(rows // each, heads, 1, -1, width)


def _by_row(together: jax.Array, shape: tuple[int, ...], each: int) -> jax.Array:
    """[*shape, n]: what `_by_prompt` made of rows with leading axes `shape`."""
    rows, heads, group, length = shape
    apart = together.reshape(rows // each, heads, each, group, length, -1)
    return apart.transpose(0, 2, 1, 3, 4, 5).reshape(*shape, -1)


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
