"""What the network costs by arithmetic: parameters, floating-point operations, bytes. Nothing is compiled or measured.

A multiply-add is two operations. Norms, activations, softmax and the look-up of embeddings are left out: at most a few
per cent of the operations, and bytes that a compiler fuses away. What is recomputed for memory's sake is not counted:
these are the operations that the mathematics needs, so a share of the machine's rate made of them is honest.

    forward of one sequence of T tokens, s of them scored = 2 N T + 4 L H hd · pairs(T) + 2 V D s

with N the parameters inside the layers' matrices and pairs(T) ≈ T²/2 the (query, key) pairs of causal attention.
Training is three forwards: one up, two down.
"""

import functools
import math

import jax

from gvjax.models import transformer
from gvjax.models.config import ModelConfig

TRAINING = 3
"""Forwards that one forward and its gradient cost."""

ITEMSIZE = {"float32": 4, "bfloat16": 2}
"""Bytes of a number, by the config's dtype."""


@functools.cache
def num_params(model: ModelConfig) -> int:
    """All parameters."""
    shapes = transformer.init_shapes(model)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@functools.cache
def body_params(model: ModelConfig) -> int:
    """N: parameters of the layers' matrices, which every token is multiplied with."""
    layers = transformer.init_shapes(model)["layers"]
    return sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(layers) if len(leaf.shape) > 2
    )


def head_params(model: ModelConfig) -> int:
    """V · D: what a scored token's hidden state is multiplied with."""
    return model.vocab_size * model.embed_dim


def attended(model: ModelConfig, tokens: int, before: int = 0) -> float:
    """(query, key) pairs of one row, summed over the layers: `tokens` new ones after `before` old ones.

    The causal half counts T²/2, not T (T + 1)/2: the diagonal is where blocks are half empty.
    """
    whole = tokens * (before + tokens / 2)
    pairs = 0.0
    for layer in range(model.num_layers):
        window = model.sliding_window
        if window is None or not model.is_local(layer):
            pairs += whole
            continue
        # Those that still see everything, then those that see a whole window.
        free = min(max(window - before, 0), tokens)
        pairs += free * (min(before, window) + free / 2) + (tokens - free) * window
    return pairs


def forward_flops(
    model: ModelConfig, length: int, *, scored: int | None = None, before: int = 0
) -> float:
    """Operations of the forward pass of one row.

    Args:
      model: the network.
      length: tokens that are run.
      scored: tokens whose logits are taken; None is all of them, 0 a reward model or a critic (their heads are free).
      before: tokens that stand in a cache already.
    """
    scored = length if scored is None else scored
    # Scores and the weighted sum of the values: a multiply-add of hd numbers each, for every head.
    attention = 4 * model.num_heads * model.width * attended(model, length, before)
    return (
        2.0 * body_params(model) * length
        + attention
        + 2.0 * head_params(model) * scored
    )


def grouped_flops(
    model: ModelConfig, prompt: int, completion: int, group: int
) -> float:
    """Operations of the forward pass of one prompt with `group` completions of it, the prompt run once.

    Sampling the completions costs the same, since every token of a cache is still multiplied once.
    """
    return forward_flops(model, prompt, scored=0) + group * forward_flops(
        model, completion, before=prompt
    )


def cache_bytes(model: ModelConfig, dtype: str | None = None) -> int:
    """Bytes of one token's keys and values in all layers.

    Args:
      model: the network.
      dtype: of the cache; the config's by default.
    """
    numbers = 2 * model.num_layers * model.kv_heads * model.width
    return numbers * ITEMSIZE[dtype or model.dtype]


def decode_bytes(model: ModelConfig, rows: int, length: float) -> float:
    """Bytes that one step of decoding must read: all matrices once, and every row's cache.

    Args:
      model: the network; matrices and cache in its dtype.
      rows: completions that grow by a token.
      length: tokens in each row's cache, on average over the completion. With a sliding window, at most it counts.
    """
    matrices = (body_params(model) + head_params(model)) * ITEMSIZE[model.dtype]
    per_layer = cache_bytes(model) / model.num_layers
    window = model.sliding_window or math.inf
    seen = sum(
        min(length, window) if model.is_local(layer) else length
        for layer in range(model.num_layers)
    )
    return matrices + rows * per_layer * seen


def decode_flops(model: ModelConfig, rows: int, length: int) -> float:
    """Operations of one step of decoding, `length` tokens in each row's cache."""
    return rows * forward_flops(model, 1, before=length)


def update_bytes(num_params: int) -> int:
    """Bytes that one AdamW update must move: float32 parameters and both moments read and written, gradient read."""
    return 28 * num_params


def state_bytes(num_params: int) -> int:
    """Bytes of a train state under AdamW: float32 parameters and two moments."""
    return 12 * num_params
