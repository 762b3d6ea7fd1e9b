"""The layers of the decoder. Attention itself comes in as a callable, so a layer does not know whether there is a cache."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gvjax.models.config import ACTIVATIONS, ModelConfig
from gvjax.models.platforms import traits
from gvjax.models.xla import once, settled

PROJECTIONS = ("query", "key", "value")
"""The linear layers that attention reads with, in the order in which `together` holds them."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _standardise(x: jax.Array, epsilon: float, centred: bool) -> jax.Array:
    """x / √(mean x² + ε) over the last axis, its mean removed first if `centred`.

    The gradient is written out because the derived one runs ten times as long on a CPU, where it cost a third of a
    whole training step of a small network:

        ∂x = (g − mean(g) − y · mean(g y)) / √(…),   without mean(g) where nothing was centred
    """
    return _standardise_forward(x, epsilon, centred)[0]


def _standardise_forward(x, epsilon, centred):
    if centred:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + epsilon)
    y = x * inverse
    return y, (y, inverse)


def _standardise_backward(epsilon, centred, kept, g):
    y, inverse = kept
    moved = g - y * jnp.mean(g * y, axis=-1, keepdims=True)
    if centred:
        moved = moved - jnp.mean(g, axis=-1, keepdims=True)
    return (moved * inverse,)


_standardise.defvjp(_standardise_forward, _standardise_backward)


class Norm(nn.Module):
    config: ModelConfig
    centred: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        plus_one = self.config.norm_plus_one
        unit = nn.initializers.zeros if plus_one else nn.initializers.ones
        scale = self.param("scale", unit, (x.shape[-1],))
        epsilon = self.config.norm_epsilon
        y = _standardise(x.astype(jnp.float32), epsilon, self.centred)
        y = y * (1 + scale if plus_one else scale)
        if self.centred:
            y = y + self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return y.astype(x.dtype)


Activation = Callable[..., jax.Array]
"""(what is activated, what it is multiplied by, or None) -> the same shape."""


class Linear(nn.Module):
    features: int
    bias: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        factor: jax.Array | None = None,
        activation: Activation | None = None,
    ) -> jax.Array:
        """x times the kernel; with an activation, activation(x, factor) times it."""
        # `init` fills kernels, all in one place.
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.zeros, shape).astype(x.dtype)
        adapted = self.has_variable("params", "lora_a")
        if activation and not adapted:
            y = _activated_product(x, factor, kernel, activation)
        else:
            x = _activated(x, factor, activation) if activation else x
            y = x @ kernel
        if adapted:
            a: jax.Array = self.get_variable("params", "lora_a")
            b: jax.Array = self.get_variable("params", "lora_b")
            y = y + (x @ a.astype(x.dtype)) @ b.astype(x.dtype)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(x.dtype)
        return y


Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""(queries of the positions that are kept, keys, values) -> (what they read, the cache)."""

Kept = Callable[[jax.Array], jax.Array]
"""[B, T, ...] -> [B, T', ...]: the positions whose states go on."""


def at(part: jax.Array, place: jax.Array) -> jax.Array:
    """[B, 1, ...]: one position of every row, by place int32[B], of [B, T, ...]."""
    index = place.reshape(-1, *(1,) * (part.ndim - 1))
    return jnp.take_along_axis(part, index, axis=1)


class Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, batch: int, rotation, attend: Attend, kept: Kept | None
    ):
        c = self.config

        def heads(flat: jax.Array) -> jax.Array:
            return flat.reshape(batch, -1, flat.shape[-1] // c.width, c.width)

        counts = (c.num_heads, c.kv_heads, c.kv_heads)
        widths = [count * c.width for count in counts]
        if self.has_variable("params", "together"):
            flat = Linear(sum(widths), c.qkv_bias, name="together")(x)
            parts = jnp.split(flat, np.cumsum(widths)[:-1], axis=-1)
        else:
            parts = [
                Linear(width, c.qkv_bias, name=name)(x)
                for name, width in zip(PROJECTIONS, widths)
            ]
        queries, keys, values = map(heads, parts)
        if c.qk_norm:
            queries = Norm(c, name="query_norm")(queries)
            keys = Norm(c, name="key_norm")(keys)
        queries, keys = _rotate(queries, rotation), _rotate(keys, rotation)
        out, cache = attend(kept(queries) if kept else queries, keys, values)
        out = out.reshape(-1, c.num_heads * c.width)
        return Linear(c.embed_dim, c.output_bias, name="output")(out), cache


@functools.cache
def _activation(name: str) -> Activation:
    """One function a name: what traces of it are kept by."""

    def activate(x: jax.Array, factor: jax.Array | None) -> jax.Array:
        y = ACTIVATIONS[name](x)
        return y if factor is None else y * factor

    return activate


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _activated(x, factor, activation: Activation) -> jax.Array:
    """activation(x, factor). The gradient computes it again: what lies between is as large as x, and every layer would keep
    two or three of it until the backward pass."""
    return activation(x, factor)


def _activated_forward(x, factor, activation):
    return activation(x, factor), (x, factor)


def _activated_backward(activation, kept, g):
    x, factor = kept
    _, pull = jax.vjp(activation, once(g, x), factor)
    return pull(g)


_activated.defvjp(_activated_forward, _activated_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _activated_product(x, factor, kernel, activation: Activation) -> jax.Array:
    """activation(x, factor) @ kernel, which need not keep the activation either. Of a frozen kernel a gradient would be made
    all the same: there `_activated` does."""
    return activation(x, factor) @ kernel


def _activated_product_forward(x, factor, kernel, activation):
    return activation(x, factor) @ kernel, (x, factor, kernel)


def _activated_product_backward(activation, kept, g):
    x, factor, kernel = kept
    of_activated = g @ kernel.T
    x = once(of_activated, x)
    # As large as x are three arrays on the way; by the derived gradient of the whole they would be four.
    activated, slope = jax.jvp(lambda x: activation(x, None), (x,), (jnp.ones_like(x),))
    of_x, of_factor = of_activated * slope, None
    if factor is not None:
        of_x, of_factor = of_x * factor, of_activated * activated
        activated = activated * factor
    return of_x, of_factor, activated.T @ g


_activated_product.defvjp(_activated_product_forward, _activated_product_backward)


class Mlp(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        up = Linear(c.mlp_dim, c.mlp_bias, name="up")(x)
        gate = Linear(c.mlp_dim, c.mlp_bias, name="gate")(x) if c.mlp_gated else None
        entered, factor = (up, None) if gate is None else (gate, up)
        down = Linear(c.embed_dim, c.mlp_bias, name="down")
        return down(entered, factor, _activation(c.activation))


class Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        batch: int,
        rotation,
        attend: Attend,
        kept: Kept | None = None,
    ):
        """The layer's output, and its cache; of positions that are not kept only keys and values are made."""

        def norm(name: str, x: jax.Array) -> jax.Array:
            return Norm(self.config, self.config.norm == "layer", name=name)(x)

        def post_norm(name: str, x: jax.Array) -> jax.Array:
            return norm(name, x) if self.config.post_norms else x

        mixed, cache = Attention(self.config, name="attention")(
            norm("attention_norm", x), batch, rotation, attend, kept
        )
        if kept:
            x = kept(x.reshape(batch, -1, x.shape[-1])).reshape(-1, x.shape[-1])
        after = x + post_norm("attention_post_norm", mixed)
        read = x if self.config.parallel_residual else after
        out = Mlp(self.config, name="mlp")(norm("mlp_norm", read))
        return after + post_norm("mlp_post_norm", out), cache


def rotation_of(
    positions: jax.Array, config: ModelConfig, layer: int, platform: str | None
):
    """cos and sin f32[B, S, 1, r / 2] of the angles by which a layer turns its queries and keys; None turns nothing."""
    if config.learned_positions is not None:
        return None
    local = config.is_local(layer)
    theta = (config.local_rope_theta if local else None) or config.rope_theta
    scale = 1.0 if local else config.rope_scale
    exponents = jnp.arange(0, config.rotary_dim, 2) / config.rotary_dim
    frequencies = theta**-exponents
    if config.rope_llama3 is not None and not local:
        factor, low, high, length = config.rope_llama3
        turns = length * frequencies / (2 * jnp.pi)
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    angles = positions[..., None].astype(jnp.float32) / scale * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if traits(platform).settles_tables:
        cos, sin = settled(cos), settled(sin)
    return cos[..., None, :], sin[..., None, :]


def _rotate(x: jax.Array, rotation) -> jax.Array:
    """Turns pairs (i, i + r/2) of the first r dimensions of every head."""
    if rotation is None:
        return x
    cos, sin = rotation
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
