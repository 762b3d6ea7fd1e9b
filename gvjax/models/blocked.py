"""Attention in plain XLA with its gradient written out: the scores of a block of queries are made and gone, block by block.

What a `Pattern` says is which query sees which key. Everything else is common to all: sequences `[B, S, H, hd]` are taken
apart by the key heads that queries read, `[B, K, ...]`; on a CPU a few sequences, or key heads of one, go through attention at
a time, so that their scores stay in its cache.

With s the scores, p = exp(s − l) the weights and l the logarithm of their sum, a block's gradient is

    ∂v = pᵀ g,   ∂s = p · (g vᵀ − Σ_d g · out),   ∂q = ∂s k,   ∂k = ∂sᵀ q

The derived one keeps every block's weights and takes half as long again on a CPU. Backwards a whole sequence's scores are
made turned, a row a key: two of the five products read them as they are, and only keys and ∂q, which are narrow, are turned.

References:
  Dao et al., 2022, https://arxiv.org/abs/2205.14135, Appendix B.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gvjax.models.platforms import traits
from gvjax.models.xla import once

MASKED = -1e30  # finite, so that a padding row which sees nothing stays finite too

_CACHED = 3 * 2**19
"""As many scores as are made at one time where they are to stay in a CPU's cache. Of 4 sequences of 640 tokens with 8 heads of
64, forwards and back, 8 heads at a time took 140 CPU-ms in blocks of 128 queries, 16 at a time 162, all 32 178, 2 at a time
145; in blocks of 256, 1.3 million scores, 8 at a time took 130 and 4 at a time 138."""

Loops = Literal["always", "never", "on a CPU"]
"""Whether sequences may go through attention in a loop; "on a CPU" is decided when a program is compiled."""


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


class Pattern(Protocol):
    """Which query sees which key; hashable. Its parts are scaled queries [B, K, g, s, hd], keys and values [B, K, T, hd] and a
    mask [B, 1, M], or None."""

    config: AttentionConfig

    def scores(self, queries: jax.Array, keys: jax.Array) -> int:
        """How many a key head makes at one time, of sequences [B, S, H, hd] and [B, T, K, hd]; 0 where no loop pays."""

    def split(self, of_queries: jax.Array, kv_heads: int) -> jax.Array:
        """[B, K, g, s, hd] of [B, S, H, hd]."""

    def joined(self, parts: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """What `split` took apart, of that shape."""

    def forward(self, queries, keys, values, mask) -> tuple[jax.Array, Any, Any]:
        """What queries read, [B, K, g, s, hd]; the logarithms of their sums; and the weights, where they are kept."""

    def backward(self, queries, keys, values, mask, out, log_sum, known, g):
        """The gradients of queries, keys and values, in float32."""


def loops(platform: str | None, mesh: Mesh | None) -> Loops:
    """What suits a platform. Sequences that lie on several devices walk through no loop together."""
    if mesh is not None and mesh.size > 1:
        return "never"
    if platform is None:
        return "on a CPU"
    return "always" if traits(platform).keeps_scores_cached else "never"


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def blocked(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array | None,
    pattern: Pattern,
    loops: Loops,
) -> jax.Array:
    """[B, S, H, hd] of queries, and keys and values [B, T, K, hd]; mask is the pattern's, [B, M]."""
    return _forward(queries, keys, values, mask, pattern, loops)[0]


def _forward(queries, keys, values, mask, pattern: Pattern, loops: Loops):
    kv_heads, scores = keys.shape[2], pattern.scores(queries, keys)

    def some(sequences):
        def heads(parts):
            return pattern.forward(*parts)

        parts = _by_head(pattern, *sequences)
        out, *rest = _in_heads(heads, loops, scores, parts)
        return pattern.joined(out, sequences[0].shape), rest

    sequences = queries, keys, values, mask
    out, rest = _in_pieces(some, loops, kv_heads * scores, sequences)
    return out, (sequences, out, rest)


def _backward(pattern: Pattern, loops: Loops, kept, g):
    queries, keys = kept[0][:2]
    kv_heads, scores = keys.shape[2], pattern.scores(queries, keys)

    def some(kept):
        sequences, out, rest, g = kept
        queries, keys = sequences[:2]

        def heads(parts):
            return pattern.backward(*parts)

        of_out = pattern.split(out, kv_heads), *rest, pattern.split(g, kv_heads)
        parts = *_by_head(pattern, *sequences), *of_out
        of_queries, *of_others = _in_heads(heads, loops, scores, parts)
        of_queries = pattern.joined(of_queries, queries.shape).astype(queries.dtype)
        of_keys, of_values = (x.astype(keys.dtype).swapaxes(1, 2) for x in of_others)
        return of_queries * _scale(pattern, queries), of_keys, of_values

    def all_at_once(kept):
        (queries, keys, values, mask), out, rest, g = kept
        if rest[1] is None:
            # Else XLA computes the scores of all layers again before the first of them is needed.
            queries = once(g, queries)
        return some(((queries, keys, values, mask), out, rest, g))

    found = _in_pieces(some, loops, kv_heads * scores, (*kept, g), all_at_once)
    return (*found, None)


blocked.defvjp(_forward, _backward)


def _by_head(pattern: Pattern, queries, keys, values, mask):
    scaled = pattern.split(queries * _scale(pattern, queries), keys.shape[2])
    mask = None if mask is None else mask[:, None]
    return scaled, keys.swapaxes(1, 2), values.swapaxes(1, 2), mask


def _scale(pattern: Pattern, queries):
    return jnp.asarray(pattern.config.scale, queries.dtype)


def _in_pieces(function: Callable, loops: Loops, scores: int, parts, all_at_once=None):
    """`function` of arrays that are independent along axis 0, each with so many scores: of all at once, or on a CPU of as many
    at a time as its cache holds the scores of."""
    all_at_once = all_at_once or function
    number = len(jax.tree.leaves(parts)[0])
    if loops == "never" or number * scores <= _CACHED:
        return all_at_once(parts)
    fits = max(_CACHED // scores, 1)
    size = max(n for n in range(1, fits + 1) if number % n == 0)

    def loop(parts):
        if size == 1:
            # An axis of length 1 outside would cost a copy: XLA takes its layout for another one.
            def alone(part):
                out = function(jax.tree.map(lambda x: x[None], part))
                return jax.tree.map(lambda x: x[0], out)

            return jax.lax.map(alone, parts)
        split = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), parts)
        out = jax.lax.map(function, split)
        return jax.tree.map(lambda x: x.reshape(number, *x.shape[2:]), out)

    if loops == "always":
        return loop(parts)
    return jax.lax.platform_dependent(parts, cpu=loop, default=all_at_once)


def _in_heads(function: Callable, loops: Loops, scores: int, parts):
    """The same of [B, K, ...], where one sequence alone may have more scores than a cache holds."""
    batch, kv_heads = parts[0].shape[:2]
    if loops == "never" or batch > 1:
        return function(parts)

    def turned(x):
        return jnp.broadcast_to(x, (1, kv_heads, *x.shape[2:])).swapaxes(0, 1)

    out = _in_pieces(function, loops, scores, jax.tree.map(turned, parts))
    return jax.tree.map(lambda x: x.swapaxes(0, 1), out)


# Whole sequences.


class _Span(NamedTuple):
    """Queries start..stop, which see keys first..stop."""

    start: int
    stop: int
    first: int

    @property
    def new(self) -> tuple[slice, ...]:
        """Its queries, of [B, K, g, S, ...]."""
        return np.s_[:, :, :, self.start : self.stop]

    @property
    def old(self) -> tuple[slice, ...]:
        """The keys they see, of [B, K, T, ...]."""
        return np.s_[:, :, self.first : self.stop]


@dataclasses.dataclass(frozen=True)
class Causal:
    """Position t sees positions <= t of its own segment, within the window; the mask is segments int32[B, T] or None."""

    config: AttentionConfig

    def scores(self, queries, keys):
        group = queries.shape[2] // keys.shape[2]
        spans = self._spans(queries.shape[1])
        return group * max((s.stop - s.start) * (s.stop - s.first) for s in spans)

    def split(self, of_queries, kv_heads):
        return grouped(of_queries, kv_heads)

    def joined(self, parts, shape):
        return ungrouped(parts)

    def forward(self, queries, keys, values, segments):
        keeps = _keeps_weights(queries, keys.shape[2], self.config)
        outs, log_sums, kept = [], [], []
        for block in self._spans(keys.shape[2]):
            scores = self._scores(queries, keys, segments, block)
            most = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - most)
            sums = jnp.sum(weights, axis=-1, keepdims=True)
            read = weights.astype(values.dtype)
            out = _product("bkgst,bktd->bkgsd", read, values[block.old])
            outs.append((out / sums).astype(values.dtype))
            log_sums.append(most + jnp.log(sums))
            if keeps:
                kept.append(weights / sums)
        return _joined(outs, 3), _joined(log_sums, 3), kept if keeps else None

    def backward(self, queries, keys, values, segments, out, log_sum, known, g):
        dots = _a_row(_dots(g, out))
        turned_keys = keys.swapaxes(2, 3)
        of_queries = []
        of_keys = jnp.zeros(keys.shape, jnp.float32)
        of_values = jnp.zeros(values.shape, jnp.float32)
        for number, block in enumerate(self._spans(keys.shape[2])):
            new, old = block.new, block.old
            slope = None
            if known is None:
                scores, slope = self._turned_scores(queries, keys, segments, block)
                weights = jnp.exp(scores - _a_row(log_sum[new]))
            else:
                weights = known[number].transpose(0, 1, 4, 2, 3)
            of_weights = _product("bktd,bkgsd->bktgs", values[old], g[new])
            of_scores = weights * (of_weights - dots[..., new[3]])
            if slope is not None:
                of_scores = of_scores * slope
            of_scores = of_scores.astype(keys.dtype)
            turned = turned_keys[..., old[2]]
            of_queries.append(_product("bkdt,bktgs->bkdgs", turned, of_scores))
            handed = _product("bktgs,bkgsd->bktd", of_scores, queries[new])
            of_keys = of_keys.at[old].add(handed)
            handed = _product("bktgs,bkgsd->bktd", weights.astype(g.dtype), g[new])
            of_values = of_values.at[old].add(handed)
        return _joined(of_queries, 4).transpose(0, 1, 3, 4, 2), of_keys, of_values

    def _spans(self, length: int) -> list[_Span]:
        # Measured on a CPU: products of larger blocks are faster, and more of each is masked, at a window's edge too. At
        # most 16 of them keep long programs short, and 512 queries their memory.
        window = self.config.window
        third = 128 if window is not None else 2 ** round(np.log2(length / 3))
        size = max(128, min(third, 512), -(-length // 16))
        return [
            _Span(
                start,
                min(start + size, length),
                0 if window is None else max(0, start - window + 1),
            )
            for start in range(0, length, size)
        ]

    def _scores(self, queries, keys, segments, block: _Span):
        """A block's masked scores f32[B, K, g, s, T']."""
        scores = _product("bkgsd,bktd->bkgst", queries[block.new], keys[block.old])
        mask = self._sees(block, segments, np.s_[..., None], np.s_[..., None, :])
        scores, _ = capped(scores, self.config)
        return jnp.where(mask[..., None, :, :], scores, MASKED)

    def _turned_scores(self, queries, keys, segments, block: _Span):
        """The same turned, [B, K, T', g, s], and by how much the soft cap slowed each; None without one."""
        scores = _product("bktd,bkgsd->bktgs", keys[block.old], queries[block.new])
        mask = self._sees(block, segments, np.s_[..., None, :], np.s_[..., None])
        scores, slope = capped(scores, self.config)
        return jnp.where(mask[..., None, :], scores, MASKED), slope

    def _sees(self, block: _Span, segments, of_new: tuple, of_old: tuple):
        """Which of the block's keys each query sees, bool [s, T'] or [B, 1, s, T']; indices say which of both axes is which."""
        new = np.arange(block.start, block.stop)[of_new]
        old = np.arange(block.first, block.stop)[of_old]
        mask = old <= new
        if self.config.window is not None:
            mask &= old > new - self.config.window
        if segments is None:
            return mask
        new = segments[:, :, block.start : block.stop][of_new]
        old = segments[:, :, block.first : block.stop][of_old]
        return mask & (new == old)


# Completions of one prompt.


@dataclasses.dataclass(frozen=True)
class Grouped:
    """k completions see the prompt they share and each itself; sequences hold k · S queries and P + k · S keys, the mask is what
    of the prompt is not padding, bool[B, P]. No window."""

    config: AttentionConfig
    group_size: int

    def scores(self, queries, keys):
        # Few rows of many scores: pairs and groups of four were as fast in a loop, and held a tenth more memory.
        return 0

    def split(self, of_queries, kv_heads):
        number, length, heads, width = of_queries.shape
        each = length // self.group_size
        shape = (number, self.group_size, each, kv_heads, heads // kv_heads, width)
        # [B, K, k, G · S, hd]: the queries that see the same keys stand together.
        split = of_queries.reshape(shape).transpose(0, 3, 1, 4, 2, 5)
        return split.reshape(number, kv_heads, self.group_size, -1, width)

    def joined(self, parts, shape):
        each = shape[1] // self.group_size
        split = parts.reshape(*parts.shape[:3], -1, each, shape[-1])
        return split.transpose(0, 2, 4, 1, 3, 5).reshape(shape)

    def forward(self, queries, keys, values, prompt_mask):
        prompt, own = self._apart(keys, values, prompt_mask)
        scores, _ = self._scores(queries, prompt[0], own[0], prompt_mask)
        most = jnp.maximum(*(jnp.max(part, axis=-1, keepdims=True) for part in scores))
        weights = [jnp.exp(part - most) for part in scores]
        sums = sum(jnp.sum(part, axis=-1, keepdims=True) for part in weights)
        of_prompt, of_own = (part.astype(queries.dtype) for part in weights)
        out = _product("bkist,bktd->bkisd", of_prompt, prompt[1])
        out += _product("bkist,bkitd->bkisd", of_own, own[1])
        out = (out / sums).astype(queries.dtype)
        kept = None
        if _keeps_weights(queries, prompt[0].shape[2] + own[0].shape[3], self.config):
            kept = [part / sums for part in weights]
        return out, most + jnp.log(sums), kept

    def backward(self, queries, keys, values, prompt_mask, out, log_sum, known, g):
        prompt, own = self._apart(keys, values, prompt_mask)
        weights, slopes = known, None
        if weights is None:
            scores, slopes = self._scores(queries, prompt[0], own[0], prompt_mask)
            weights = [jnp.exp(part - log_sum) for part in scores]
        of_prompt, of_own = weights
        dots = _dots(g, out)
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

        # [B, K, k, ...] -> [B, K · k, 1, ...]: every completion hands to keys of its own.
        def each(part):
            return part.reshape(part.shape[0], -1, 1, *part.shape[3:])

        def handed(of_prompt, of_own, turned):
            handed = _gathered(each(of_own), each(turned))
            handed = handed.reshape(*turned.shape[:2], -1, handed.shape[-1])
            return jnp.concatenate([_gathered(of_prompt, turned), handed], axis=2)

        of_keys = handed(to_prompt, to_own, queries.swapaxes(3, 4))
        return of_queries, of_keys, handed(of_prompt, of_own, g.swapaxes(3, 4))

    def _apart(self, keys, values, prompt_mask):
        """Keys and values of the prompt [B, K, P, hd], and of its completions [B, K, k, S, hd]."""
        width = prompt_mask.shape[2]
        of_prompt, of_own = np.s_[:, :, :width], np.s_[:, :, width:]
        own = (*keys.shape[:2], self.group_size, -1, keys.shape[-1])
        prompt = keys[of_prompt], values[of_prompt]
        return prompt, (keys[of_own].reshape(own), values[of_own].reshape(own))

    def _scores(self, queries, prompt, own, prompt_mask):
        """Masked scores f32[B, K, k, G · S, P] and [B, K, k, G · S, S]; how much the soft cap slowed each, or None."""
        each = own.shape[3]
        # Query g · S + s is the s-th of its completion.
        causal = np.tile(np.tri(each, dtype=bool), (queries.shape[3] // each, 1))
        parts = [
            capped(_product("bkisd,bktd->bkist", queries, prompt), self.config),
            capped(_product("bkisd,bkitd->bkist", queries, own), self.config),
        ]
        masks = (prompt_mask[:, :, None, None], causal)
        scores = [jnp.where(m, part, MASKED) for m, (part, _) in zip(masks, parts)]
        slopes = [slope for _, slope in parts]
        return scores, None if slopes[0] is None else slopes


# Parts of both, and of attention over a cache.


def grouped(of_queries: jax.Array, kv_heads: int) -> jax.Array:
    """[B, K, G, S, hd] of [B, S, H, hd]."""
    batch, length, heads, width = of_queries.shape
    shape = (batch, length, kv_heads, heads // kv_heads, width)
    return of_queries.reshape(shape).transpose(0, 2, 3, 1, 4)


def ungrouped(parts: jax.Array) -> jax.Array:
    """[B, S, H, hd] of [B, K, G, S, hd]."""
    batch, kv_heads, group, length, width = parts.shape
    out = parts.transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, kv_heads * group, width)


def capped(scores: jax.Array, config: AttentionConfig):
    """Scores under the soft cap, and by how much it slowed each; as they are, and None, without one."""
    if config.softcap is None:
        return scores, None
    bent = jnp.tanh(scores / config.softcap)
    return config.softcap * bent, 1 - jnp.square(bent)


def _keeps_weights(queries, length: int, config: AttentionConfig) -> bool:
    """Whether the backward pass is handed the weights of attention over `length` keys: where they are no larger than the
    queries, as of short sequences, and no soft cap asks for the scores all the same."""
    return length <= queries.shape[-1] and config.softcap is None


def _dots(g, out):
    """Σ_d g · out. A product with ones: the sum over so short an axis takes a CPU longer, and once more for every score."""
    ones = jnp.ones((g.shape[-1], 1), jnp.float32)
    return jnp.matmul(g.astype(jnp.float32) * out, ones, precision="highest")


def _product(spec: str, one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.einsum(spec, one, other, preferred_element_type=jnp.float32)


def _gathered(weights: jax.Array, turned: jax.Array) -> jax.Array:
    """f32[B, K, T, hd]: what queries, turned [B, K, g, hd, s], hand to each key, by weights [B, K, g, s, T].

    The transposed product comes first: the narrow operands are then the ones that are turned, and not the weights.
    """
    product = _product("bkgds,bkgst->bkdt", turned, weights)
    return jax.lax.optimization_barrier(product).swapaxes(2, 3)


def _a_row(of_queries: jax.Array) -> jax.Array:
    """[B, K, 1, g, s] of [B, K, g, s, 1]."""
    return of_queries[:, :, None, ..., 0]


def _joined(blocks: list[jax.Array], axis: int) -> jax.Array:
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis)
