"""One decoder for every family: GPT-NeoX, Llama, Qwen2, Qwen3 and Gemma differ by switches of `ModelConfig`.

Parameters are a nested dict of float32 arrays; those of the layers are stacked, `layers/**` has a leading axis L,
whether the layers run as a scan or unrolled, so sharding rules, checkpoints and conversions see one layout:

    embed/embedding [V, D]
    layers/attention_norm, mlp_norm [, attention_post_norm, mlp_post_norm]: scale [, bias] [L, D]
    layers/attention/query, key, value, output: kernel [L, in, out] [, bias [L, out]] [, lora_a, lora_b: see `lora`]
    layers/attention/query_norm, key_norm: scale [L, hd]
    layers/mlp/gate, up, down: kernel [L, in, out] [, bias [L, out]]
    final_norm: scale [, bias] [D]
    unembed/kernel [D, V]                                    absent where the embeddings are tied

Activations around linear layers are `[tokens, D]`, not `[B, T, D]`: XLA's CPU backend computes the gradient of a gated
MLP twice as fast so.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gvjax import logps
from gvjax.models import draws, platforms
from gvjax.models.attention import causal_attention, selected_attention
from gvjax.models.config import ModelConfig
from gvjax.models.layers import PROJECTIONS, Block, Kept, Norm, rotation_of
from gvjax.types import Params

PARTITION_RULES = (
    (r"positions/embedding", P(None, "fsdp")),
    (r"embed/embedding", P("tensor", "fsdp")),
    (r"unembed/kernel", P("fsdp", "tensor")),
    (r"(query|key|value|gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"(query|key|value|gate|up)/bias", P(None, "tensor")),
    (r"(output|down)/kernel", P(None, "tensor", "fsdp")),
    (r"(output|down)/bias", P()),
    (r"[a-z_]*norm/(scale|bias)", P()),
)
"""(path-ending regex, PartitionSpec): vocabulary, heads and mlp over `tensor`, embedding over `fsdp`."""

# Parameters.


def init(key: jax.Array, config: ModelConfig) -> Params:
    """Random parameters: kernels normal with variance 1/fan-in, residual outputs 1/√(2L) of that, embeddings 0.02.

    All normal numbers are those of one draw, of which every matrix takes its piece: see `draws.normals`.

    Args:
      key: consumed.
      config: ModelConfig.

    Returns:
      Nested dict of float32 arrays, as in the module's docstring.
    """
    x = jnp.zeros((1, config.embed_dim))
    rotation = rotation_of(jnp.zeros((1, 1), jnp.int32), config, 0, None)

    def blank_layer(_):
        block, unused = Block(config), jax.random.key(0)
        return block.init(unused, x, 1, rotation, lambda q, k, v: (q, None))["params"]

    def table(rows: int) -> Params:
        return {"embedding": jnp.zeros((rows, config.embed_dim))}

    def blank() -> Params:
        params = {
            "embed": table(config.vocab_size),
            "layers": jax.vmap(blank_layer)(jnp.arange(config.num_layers)),
            "final_norm": _final_norm(config).init(jax.random.key(0), x)["params"],
        }
        if config.learned_positions is not None:
            params["positions"] = table(config.learned_positions)
        if not config.tied_embeddings:
            shape = (config.embed_dim, config.vocab_size)
            params["unembed"] = {"kernel": jnp.zeros(shape)}
        return params

    def stddev(path: str, shape: tuple[int, ...]) -> float:
        if path.endswith("embedding") or path.startswith("unembed"):
            return 0.02
        if not path.endswith("kernel"):
            return 0.0
        residual = re.search(r"/(output|down)/", path) is not None
        return shape[-2] ** -0.5 * ((2 * config.num_layers) ** -0.5 if residual else 1)

    params = blank()
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    scales = [
        stddev(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape)
        for path, leaf in leaves
    ]
    shapes = [leaf.shape for (_, leaf), scale in zip(leaves, scales) if scale]
    drawn = iter(draws.normals(key, shapes))
    filled = [
        scale * next(drawn) if scale else leaf
        for (_, leaf), scale in zip(leaves, scales)
    ]
    return jax.tree_util.tree_unflatten(treedef, filled)


def init_shapes(config: ModelConfig) -> Params:
    """The parameters as jax.ShapeDtypeStructs; nothing is allocated."""
    # Every caller has dicts of its own.
    return jax.tree.map(lambda shape: shape, _init_shapes(config))


@functools.lru_cache
def _init_shapes(config: ModelConfig) -> Params:
    return jax.eval_shape(lambda: init(jax.random.key(0), config))


# Forward.


def hidden(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    segments: jax.Array | None = None,
    *,
    kept: Kept | None = None,
    mesh: Mesh | None = None,
    platform: str | None = None,
) -> jax.Array:
    """Hidden states after the last norm.

    Padding on the right needs no mask: attention is causal. Positions are counted along the row also where it is
    packed: rotary embeddings see differences only.

    Args:
      config: ModelConfig.
      params: from `init`; `unembed` is not read.
      tokens: int32[B, T].
      segments: int32[B, T] or None; with packing, a token sees its own segment only.
      kept: `[B, T, ...] -> [B, T', ...]`, the positions whose states are asked for: of the others the last layer makes only
        keys and values. None: all. Not with packing.
      mesh: where given, activations are split over it, batch over (data, fsdp).
      platform: what the program will run on, for the choice of kernels; None is the mesh's, and plain XLA without one.

    Returns:
      [B, T', D] in the config's dtype.
    """
    chex.assert_rank(tokens, 2)
    if config.learned_positions is not None:
        if segments is not None:
            raise ValueError(
                "learned positions count from the start of a row, so rows cannot be packed; use rotary embeddings"
            )
        if tokens.shape[1] > config.learned_positions:
            raise ValueError(
                f"sequences of {tokens.shape[1]} tokens exceed learned_positions {config.learned_positions}; raise it"
            )
    platform = platforms.name_of(mesh, platform)

    positions = jnp.arange(tokens.shape[1])[None]

    def attend(layer: int, queries, keys, values):
        attention = config.attention(layer)
        if kept and queries.shape[1] < keys.shape[1]:
            asked = kept(jnp.broadcast_to(positions, tokens.shape))
            return selected_attention(
                queries, keys, values, config=attention, positions=asked
            )
        return causal_attention(
            queries,
            keys,
            values,
            config=attention,
            segments=segments,
            platform=platform,
            mesh=mesh,
        )

    return run_layers(
        config,
        params,
        tokens,
        positions,
        attend,
        kept=kept,
        mesh=mesh,
        platform=platform,
    )


def run_layers(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array],
    *,
    kept: Kept | None = None,
    mesh: Mesh | None = None,
    platform: str | None = None,
) -> jax.Array:
    """The embeddings, all layers and the last norm, whoever says which token attends to which.

    Args:
      config, params, mesh, platform: as for `hidden`.
      tokens: int32[B, T].
      positions: int32[B, T] or [1, T], the position of each in its sequence, from 0.
      attend: `(layer, queries [B, T', H, hd], keys [B, T, K, hd], values [B, T, K, hd]) -> [B, T', H, hd]`; the queries
        are those of the positions that are kept.
      kept: `[B, T, ...] -> [B, T', ...]`, the positions whose states are asked for: of the others the last layer makes only
        keys and values. None: all.

    Returns:
      [B, T', D] in the config's dtype.
    """
    batch = len(tokens)
    platform = platforms.name_of(mesh, platform)
    arrange = _arranging(mesh, platform)

    def run(layer: int, kept: Kept | None = None):
        rotation = rotation_of(positions, config, layer, platform)

        def apply_layer(x, layer_params):
            x, _ = Block(config).apply(
                {"params": arrange(layer_params)},
                x,
                batch,
                rotation,
                lambda *heads: (attend(layer, *heads), None),
                kept,
            )
            return constrain(x, mesh)

        if config.remat == "none":
            return apply_layer
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = dots if config.remat == "dots" else None
        return jax.checkpoint(apply_layer, policy=policy)

    x = constrain(embed(config, params, tokens, positions), mesh)
    # A scan walks over whole periods, so that what differs between layers stays static; the rest is unrolled.
    period = config.period
    scan = scans(config, platform)
    scanned = config.num_layers // period * period if scan else 0
    layers = params["layers"]
    if scanned:
        stacked = jax.tree.map(
            lambda p: p[:scanned].reshape(-1, period, *p.shape[1:]), layers
        )

        def body(x, period_params):
            for layer, layer_params in enumerate(apart(period_params)):
                x = run(layer)(x, layer_params)
            return x, None

        x, _ = jax.lax.scan(body, x, stacked)
    last = config.num_layers - 1
    if scanned < config.num_layers:
        each = apart(layers)
        for layer in range(scanned, config.num_layers):
            x = run(layer, kept if layer == last else None)(x, each[layer])
    if kept and scanned == config.num_layers:
        x = kept(x.reshape(batch, -1, config.embed_dim)).reshape(-1, config.embed_dim)
    return normed(config, params, x).reshape(batch, -1, config.embed_dim)


def scans(config: ModelConfig, platform: str | None) -> bool:
    """Whether the layers run as one scan on a platform, where the config leaves it open.

    On a CPU unrolled layers are faster (a training step of 4 layers 1.2 times), and compiling them is what limits
    their number; on accelerators, where it has not been measured yet, only shallow networks are unrolled.
    """
    if config.scan_layers is not None:
        return config.scan_layers
    return config.num_layers > platforms.traits(platform).unrolled_layers


def unembedding(config: ModelConfig, params: Params) -> jax.Array:
    """What hidden states are multiplied by, in the config's dtype: [D, V], or [V, D] where embeddings are tied."""
    tied = config.tied_embeddings
    matrix = params["embed"]["embedding"] if tied else params["unembed"]["kernel"]
    return matrix.astype(config.dtype)


def apply(
    config: ModelConfig,
    params: Params,
    tokens: jax.Array,
    *,
    segments: jax.Array | None = None,
    mesh: Mesh | None = None,
    platform: str | None = None,
) -> jax.Array:
    """Logits f32[B, T, V]; `[b, t]` predicts token t + 1. Arguments as for `hidden`."""
    states = hidden(config, params, tokens, segments, mesh=mesh, platform=platform)
    return logits_of(config, params, states)


def token_logps_fn(
    config: ModelConfig,
    *,
    chunk_size: int | None = None,
    shortest_prompt: int = 0,
    mesh: Mesh | None = None,
    platform: str | None = None,
) -> Callable[..., jax.Array]:
    """A LogpsFn that holds no more of `[B, T, V]` than one chunk, or all of it where that is small.

    Args:
      config: ModelConfig.
      chunk_size: most positions whose logits exist at one time; None: see `logps.chunked_token_logps`.
      shortest_prompt: >= 0, tokens at the start of every row whose log-probabilities nobody asks for; packed rows have
        none.
      mesh, platform: as for `hidden`.

    Returns:
      `(params, tokens int32[B, T], segments int32[B, T] | None = None, scored bool[B, T] | None = None) -> f32[B, T]`,
      nats, aligned to tokens. The first token of every row, and of every segment, gets 0: nothing predicts it. So may
      tokens that are not scored.
    """

    # The last token predicts nothing. Of a prompt only the last token predicts what is asked for; the others have done their
    # part before the last layer ends. Nor need there be logits of what is not scored.
    trims = platforms.traits(platforms.name_of(mesh, platform)).trims

    def logps_fn(params, tokens, segments=None, scored=None):
        stop = tokens.shape[1] - 1 if trims and tokens.shape[1] > 1 else None
        skip = 0
        if stop is not None and segments is None:
            skip = max(min(shortest_prompt, stop) - 1, 0)
        states = hidden(
            config,
            params,
            tokens[:, :stop],
            None if segments is None else segments[:, :stop],
            kept=(lambda part: part[:, skip:]) if skip else None,
            mesh=mesh,
            platform=platform,
        )
        result = logps_of_states(
            config,
            params,
            states,
            tokens[:, skip:],
            chunk_size,
            scored=scored[:, skip:] if trims and scored is not None else None,
            mesh=mesh,
        )
        result = jnp.pad(result, ((0, 0), (skip, 0)))
        if segments is None:
            return result
        starts = segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
        return jnp.where(starts, 0.0, result)

    return logps_fn


def logps_of_states(
    config: ModelConfig,
    params: Params,
    states: jax.Array,
    tokens: jax.Array,
    chunk_size: int | None = None,
    *,
    scored: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """`logps.chunked_token_logps` of hidden states under this model's unembedding and soft cap.

    On a mesh every shard of the batch walks through chunks of its own: chunks that were cut from the whole batch would
    lie on a few devices each, and be gathered from them one after the other. The vocabulary stays with the compiler, which
    splits it over `tensor`.
    """

    def of_states(states, matrix, tokens, scored):
        return logps.chunked_token_logps(
            states,
            matrix,
            tokens,
            chunk_size=chunk_size,
            logits_fn=lambda logits: _softcap(logits, config.logit_softcap),
            scored=scored,
            turned=config.tied_embeddings,
        )

    if mesh is not None and mesh.shape["data"] * mesh.shape["fsdp"] > 1:
        rows = P(("data", "fsdp"))
        of_states = jax.shard_map(
            of_states,
            mesh=mesh,
            in_specs=(rows, P(), rows, rows),
            out_specs=rows,
            axis_names={"data", "fsdp"},
            check_vma=False,
        )
    return of_states(states, unembedding(config, params), tokens, scored)


# Parts of the forward pass.


def _final_norm(config: ModelConfig) -> Norm:
    return Norm(config, config.norm == "layer")


def normed(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """[tokens, D]: what the last layer leaves, normalised."""
    states: Any = _final_norm(config).apply({"params": params["final_norm"]}, x)
    return states


def apart(layers: Params) -> tuple[Params, ...]:
    """Every layer of stacked ones, or of those that are apart already."""
    if isinstance(layers, tuple):
        return layers
    leaves, treedef = jax.tree.flatten(layers)
    pieces = zip(*map(_pieces, leaves))
    return tuple(jax.tree.unflatten(treedef, each) for each in pieces)


@jax.custom_vjp
def _pieces(stacked: jax.Array) -> tuple[jax.Array, ...]:
    """What axis 0 holds. Gradients are stacked in one go: that of a slice is by itself as large as all layers, and adding
    those up is what a CPU took longer for."""
    return tuple(stacked[index] for index in range(len(stacked)))


_pieces.defvjp(
    lambda stacked: (_pieces(stacked), None), lambda _, grads: (jnp.stack(grads),)
)


def _arranging(mesh: Mesh | None, platform: str | None) -> Callable[[Params], Params]:
    """How one layer's parameters are laid out before they are multiplied with: as they are, but on a CPU."""
    if not platforms.traits(platform).arranges:
        return lambda layer: layer
    # Heads that are split over devices stay apart: side by side, they would have to be dealt out anew.
    join = mesh is None or mesh.shape["tensor"] == 1
    return functools.partial(_arranged, join=join)


def _arranged(layer: Params, *, join: bool) -> Params:
    """One layer's parameters as a CPU multiplies and differentiates them fastest: a step of a small network 1.06 times.

    Products are fast where their result is wide. So queries, keys and values are one product (`join`), and the gradient
    of a kernel that is taller than wide comes out turned: XLA would otherwise undo the turning.
    """

    def turned(p):
        return p if p.ndim < 2 or p.shape[0] <= p.shape[1] else _turned_gradient(p)

    attention = layer["attention"]
    if join and not any("lora_a" in attention[name] for name in PROJECTIONS):
        parts = [attention[name] for name in PROJECTIONS]
        others = {k: v for k, v in attention.items() if k not in PROJECTIONS}
        together = jax.tree.map(lambda *each: jnp.concatenate(each, axis=-1), *parts)
        attention = {**others, "together": together}
    return jax.tree.map(turned, {**layer, "attention": attention})


@jax.custom_vjp
def _turned_gradient(kernel: jax.Array) -> jax.Array:
    """The kernel, whose gradient is computed as that of its transpose."""
    return kernel


_turned_gradient.defvjp(
    lambda kernel: (kernel, None),
    lambda _, g: (jax.lax.optimization_barrier(g.T).T,),
)


def embed(
    config: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array
) -> jax.Array:
    """[B · S, D]: what the first layer reads, of tokens and positions int32[B, S]."""
    x = params["embed"]["embedding"][tokens.reshape(-1)].astype(config.dtype)
    if config.scale_embedding:
        x = x * jnp.asarray(config.embed_dim**0.5, x.dtype)
    if config.learned_positions is not None:
        at = jnp.broadcast_to(jnp.maximum(positions, 0), tokens.shape).reshape(-1)
        x = x + params["positions"]["embedding"][at].astype(config.dtype)
    return x


def logits_of(config: ModelConfig, params: Params, states: jax.Array) -> jax.Array:
    """f32[..., V] of normalised states [..., D]."""
    matrix = unembedding(config, params)
    logits = logps.product(states, matrix, config.tied_embeddings)
    return _softcap(logits, config.logit_softcap)


def _softcap(x: jax.Array, cap: float | None) -> jax.Array:
    return x if cap is None else cap * jnp.tanh(x / cap)


def constrain(x: jax.Array, mesh: Mesh | None, *rest: str | None) -> jax.Array:
    """Splits axis 0 over (data, fsdp), which holds for `[B, ...]` and `[B · T, D]` alike."""
    if mesh is None:
        return x
    spec = P(("data", "fsdp"), *rest)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
