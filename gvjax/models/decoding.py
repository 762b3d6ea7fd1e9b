"""Decoding: the same decoder with a cache of keys and values, a prefill for whole prompts and then token by token."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gvjax.models import layers, platforms, transformer
from gvjax.models.attention import cached_attention, causal_attention
from gvjax.models.config import ModelConfig
from gvjax.types import DecodeFn, Params

Cache = dict[str, Any]


def init_cache(
    config: ModelConfig,
    batch: int,
    length: int,
    dtype: Any = None,
    *,
    mesh: Mesh | None = None,
    after: Cache | None = None,
) -> Cache:
    """An empty cache for `batch` rows of up to `length` slots.

    One key and one value array `[B, K, length, hd]` per layer, written in place. All rows write to the same slot at a
    time, and each slot remembers the position that its token has in its row (−1: none), so that ragged prompts need no
    scatter. Every array of the cache but the slot counter has the batch as axis 0; those of prompts in front, that of theirs.

    Args:
      config: ModelConfig.
      batch, length: sizes; writing past `length` is not detected.
      dtype: of keys and values; the config's by default.
      mesh: where given, batch is split over (data, fsdp) and heads over tensor.
      after: a cache that N prompts have filled. The rows of this one continue them, batch / N each, together: prompts are
        kept once, and read once for all rows that continue them.

    Raises:
      ValueError: the rows, with the prompts in front, are longer than the learned positions; those past the last would all
        be taken for it.
    """
    longest = length + (0 if after is None else after["positions"].shape[1])
    if config.learned_positions is not None and longest > config.learned_positions:
        raise ValueError(
            f"sequences of {longest} tokens exceed learned_positions {config.learned_positions}; raise it, or ask for "
            "shorter completions"
        )
    shape = (batch, config.kv_heads, length, config.width)

    def empty():
        array = jnp.zeros(shape, dtype or config.dtype)
        return transformer.constrain(array, mesh, "tensor", None, None)

    return {
        "keys": tuple(empty() for _ in range(config.num_layers)),
        "values": tuple(empty() for _ in range(config.num_layers)),
        "positions": jnp.full((batch, length), -1, jnp.int32),
        "slot": None if after is None else jnp.int32(0),
        "prompts": after,
    }


def decode_params(config: ModelConfig, params: Params) -> Params:
    """Parameters as decoding reads them: matrices in the config's dtype, layers taken apart.

    `decode_fn` takes either form. Made once before a loop, this one spares every step of the loop the conversion.
    """

    def cast(p):
        return p.astype(config.dtype) if p.ndim > 1 else p

    layers = transformer.apart(params["layers"])
    return jax.tree.map(cast, {**params, "layers": layers})


def decode_fn(
    config: ModelConfig, *, mesh: Mesh | None = None, platform: str | None = None
) -> DecodeFn:
    """A DecodeFn: new tokens in, the logits after the last of them out, the cache grown by them.

    Into an empty cache a whole batch of prompts goes at once, padded on the right, with the kernels of training
    (`slot` is None in an empty cache, so this is decided while tracing). Afterwards any number of tokens may follow,
    usually one.

    Args:
      config: ModelConfig.
      mesh, platform: as for `hidden`.

    Returns:
      `(params, tokens int32[B, S], positions int32[B, S], cache) -> (logits f32[B, V], cache)`; `positions` count from
      0 in each row, −1 marks padding; the logits are those after each row's token of the highest position.
    """
    platform = platforms.name_of(mesh, platform)

    def decode(params, tokens, positions, cache):
        batch, count = tokens.shape
        prefill = cache["slot"] is None
        slot = jnp.int32(0) if prefill else cache["slot"]
        if count > cache["positions"].shape[1]:
            raise ValueError(
                f"{count} tokens do not fit a cache of length {cache['positions'].shape[1]}; make it as long as prompt "
                "and completion together"
            )
        slot_positions = jax.lax.dynamic_update_slice(
            cache["positions"], positions, (0, slot)
        )
        x = transformer.constrain(
            transformer.embed(config, params, tokens, positions), mesh
        )
        # The last token only: the logits of a whole prompt batch would dwarf the cache.
        last = jnp.argmax(positions, axis=1)

        def kept(part):
            return layers.at(part, last)

        def prompts(layer):
            filled = cache["prompts"]
            if filled is None:
                return None
            return filled["keys"][layer], filled["values"][layer], filled["positions"]

        new_keys, new_values = [], []
        for layer, layer_params in enumerate(transformer.apart(params["layers"])):

            def attend(queries, keys, values, layer=layer):
                written = tuple(
                    jax.lax.dynamic_update_slice(
                        old, new.swapaxes(1, 2).astype(old.dtype), (0, 0, slot, 0)
                    )
                    for old, new in (
                        (cache["keys"][layer], keys),
                        (cache["values"][layer], values),
                    )
                )
                attention = config.attention(layer)
                read = positions if queries.shape[1] == count else kept(positions)
                if prefill and read is positions:
                    out = causal_attention(
                        queries,
                        keys,
                        values,
                        config=attention,
                        platform=platform,
                        mesh=mesh,
                    )
                else:
                    out = cached_attention(
                        queries,
                        *written,
                        config=attention,
                        positions=read,
                        slot_positions=slot_positions,
                        prompts=prompts(layer),
                    )
                return out.astype(queries.dtype), written

            x, (keys, values) = layers.Block(config).apply(
                {"params": layer_params},
                x,
                batch,
                layers.rotation_of(positions, config, layer, platform),
                attend,
                kept if count > 1 and layer == config.num_layers - 1 else None,
            )
            new_keys.append(keys)
            new_values.append(values)
        x = transformer.normed(config, params, x)
        cache = {
            "keys": tuple(new_keys),
            "values": tuple(new_values),
            "positions": slot_positions,
            "slot": slot + count,
            "prompts": cache["prompts"],
        }
        return transformer.logits_of(config, params, x), cache

    return decode
