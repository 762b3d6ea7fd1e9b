"""Sampling: one prefill per prompt, one compiled loop for all completions, and the pick of the best.

Everything here is a pure function of arrays that may stand inside a larger jitted one: generate, score and update can
be one program.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from gvjax.types import DecodeFn, EosId, Params, Rollouts


def generate(
    decode_fn: DecodeFn,
    init_cache: Callable[..., Any],
    params: Params,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    eos_id: EosId | None = None,
    pad_id: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    allow_truncated_support: bool = False,
    prompt_ids: jax.Array | None = None,
    compact: int | None = None,
    share_prompts: bool = False,
) -> Rollouts:
    """Samples completions.

    Each prompt is run once, for all its samples. The cache grows with the completions, in a few steps, so that attention
    reads little more than there is. The loop ends when every row has drawn its EOS. A row's draws depend on the key, its
    prompt's id and its number in the group alone: the same completion comes out alone, in any batch and for any
    `max_new_tokens`.

    Args:
      decode_fn: DecodeFn, e.g. `decoding.decode_fn(config)`.
      init_cache: `(batch, length) -> cache`, e.g. `functools.partial(decoding.init_cache, config)`. An array whose shape
        depends on the length must hold the same numbers when it is put in front of an empty one for a greater length.
      params: what decode_fn reads; `decoding.decode_params` of them is read faster.
      prompts: int32[N, P], padded on the right with anything.
      prompt_lengths: int32[N], >= 1 (begin with a BOS or the like).
      key: consumed.
      max_new_tokens: C, completions are cut there.
      num_samples: k, completions per prompt.
      eos_id: the token that ends a completion and belongs to it, or several of which each does; None: every completion
        has C tokens.
      pad_id: what stands after completions; may be the EOS's id.
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: keep the k likeliest tokens (and what ties with the last of them).
      top_p: keep the likeliest tokens that together have this probability, after temperature and top_k.
      allow_truncated_support: say that some tokens may never be drawn. Off-policy corrections and KL estimates assume
        that every token could have been, so greedy, top_k and top_p are refused unless this is set.
      prompt_ids: int32[N], what each prompt's randomness is derived from; None: its row.
      compact: None, or >= 1: when half of the rows have drawn their EOS the others go on without them, and again at a
        quarter, in numbers that this divides (1, or on a mesh the devices that rows are split over). It pays where
        completions differ much in length, and is a loop more to compile each time.
      share_prompts: the samples of a prompt read its cache together, where each would have a copy of its own:
        `init_cache(batch, length, after=cache)` is the cache of rows that continue the prompts of another one, as
        `decoding.init_cache` makes it. Rows that go on alone (`compact`) take copies of their prompts along.

    Returns:
      Rollouts of N · k rows, the k of a prompt together, with T = P + C. `logps` are at temperature 1 over the full
      vocabulary. `sampler_logps` is None where these are also what was drawn from; else it holds the log-probabilities
      under the distribution drawn from, and a loss that takes `logps` for those can refuse.

    Raises:
      ValueError: impossible settings, or truncated support not asked for.
    """
    _check(max_new_tokens, num_samples, temperature, top_k, top_p, compact)
    truncates = temperature == 0 or top_k is not None or top_p is not None
    if truncates and not allow_truncated_support:
        raise ValueError(
            f"temperature={temperature}, top_k={top_k}, top_p={top_p} never draw some tokens, and losses assume that "
            "every token can be drawn; train on temperature > 0 without top_k and top_p, or pass "
            "allow_truncated_support=True where nothing is learned from the samples"
        )
    chex.assert_rank([prompts, prompt_lengths], [2, 1])
    chex.assert_equal_shape_prefix([prompts, prompt_lengths], 1)
    number, width = prompts.shape
    if prompt_ids is None:
        prompt_ids = jnp.arange(number)

    # One uniform number a token, drawn ahead; that of token t does not depend on how many are drawn.
    row_keys = jax.vmap(
        lambda prompt: jax.vmap(
            lambda sample: jax.random.fold_in(jax.random.fold_in(key, prompt), sample)
        )(jnp.arange(num_samples))
    )(prompt_ids).reshape(-1)
    uniforms = jax.vmap(
        lambda step: jax.vmap(
            lambda row_key: jax.random.uniform(jax.random.fold_in(row_key, step))
        )(row_keys)
    )(jnp.arange(max_new_tokens))

    places = jnp.arange(width)[None]
    positions = jnp.where(places < prompt_lengths[:, None], places, -1)
    logits, cache = decode_fn(params, prompts, positions, init_cache(number, width))

    def repeat(x):
        return jnp.repeat(x, num_samples, axis=0) if jnp.ndim(x) else x

    logits, prompts, lengths = jax.tree.map(repeat, (logits, prompts, prompt_lengths))
    rows = number * num_samples
    stops = _stops(width, max_new_tokens)

    def empty(rows: int, length: int, before: Any) -> Any:
        """A cache with room for so many new tokens, behind that of the prompts where it is shared."""
        if share_prompts:
            return init_cache(rows, length, after=before)
        return init_cache(rows, width + length)

    if share_prompts:
        before, cache = cache, empty(rows, stops[0], cache)
    else:
        before, cache = None, jax.tree.map(repeat, cache)
    off_policy = truncates or temperature != 1

    def draw(logits, uniform):
        logps = jax.nn.log_softmax(logits)
        if temperature == 0:
            token = jnp.argmax(logits, axis=-1)
            drawn_logps: jax.Array | None = jnp.zeros(len(logits))
        else:
            shaped = _truncate(logits / temperature, top_k, top_p)
            token = _inverse_cdf(shaped, uniform)
            drawn_logps = _at(jax.nn.log_softmax(shaped), token) if off_policy else None
        return token.astype(jnp.int32), _at(logps, token), drawn_logps

    def write(columns, step, values, live):
        return columns.at[:, step].set(jnp.where(live, values, columns[:, step]))

    def record(some, step, logits):
        """What stands after a token was drawn for each of some rows."""
        token, logps, drawn_logps = draw(logits, some["uniforms"][step])
        out, live = some["out"], some["live"]
        out = {
            "tokens": write(out["tokens"], step, token, live),
            "logps": write(out["logps"], step, logps, live),
            "counts": out["counts"] + live,
            "drawn_logps": write(out["drawn_logps"], step, drawn_logps, live)
            if off_policy
            else None,
        }
        if eos_id is not None:
            live = live & ~is_eos(token, eos_id)
        return {**some, "out": out, "token": token, "live": live}

    def drawn(step, stop, fewest, some, before):
        """Tokens `step` up to `stop` of some rows, over a cache no longer than they need, while more than `fewest` live."""
        longer = empty(len(some["token"]), stop, before)
        some = {**some, "cache": _grown(some["cache"], longer)}

        def unfinished(carry):
            step, some = carry
            # Without an EOS the count alone decides, which keeps the loop cheap under vmap.
            more = step < stop
            return more if eos_id is None else more & (some["live"].sum() > fewest)

        def advance(carry):
            step, some = carry
            positions = (some["lengths"] + step - 1)[:, None]
            logits, cache = decode_fn(
                params, some["token"][:, None], positions, some["cache"]
            )
            return step + 1, record({**some, "cache": cache}, step, logits)

        return jax.lax.while_loop(unfinished, advance, (step, some))

    def completed(step, some, stops, numbers, before):
        """The columns of some rows, drawn to their ends; when at most numbers[0] of them live, these go on alone."""
        fewer, *numbers = numbers or [0]
        for stop in stops:
            step, some = drawn(step, stop, fewer, some, before)
        if not fewer:
            return some["out"]
        # Nobody is left behind: at most so many live, or every completion has all its tokens.
        kept = jnp.argsort(~some["live"], stable=True)[:fewer]
        count = len(some["live"])

        def alone(x):
            # What a prompt's rows had in common, each that is kept now has for itself.
            return x[kept // (count // len(x))] if jnp.ndim(x) else x

        others, before = jax.tree.map(alone, ({**some, "uniforms": None}, before))
        others["uniforms"] = some["uniforms"][:, kept]
        ends = completed(step, others, [max_new_tokens], numbers, before)
        return jax.tree.map(lambda x, end: x.at[kept].set(end), some["out"], ends)

    shape = (rows, max_new_tokens)
    out = {
        "tokens": jnp.zeros(shape, jnp.int32),
        "logps": jnp.zeros(shape),
        "counts": jnp.zeros(rows, jnp.int32),
        "drawn_logps": jnp.zeros(shape) if off_policy else None,
    }
    some = {
        "token": jnp.zeros(rows, jnp.int32),
        "live": jnp.ones(rows, bool),
        "lengths": lengths,
        "uniforms": uniforms,
        "cache": cache,
        "out": out,
    }
    out = completed(
        jnp.int32(1),
        record(some, 0, logits),
        stops,
        [] if eos_id is None or compact is None else _numbers(rows, compact),
        before,
    )

    # From columns of the loop to the layout of training batches: prompt, completion, padding.
    places = jnp.arange(width + max_new_tokens)[None] - lengths[:, None]
    mask = (places >= 0) & (places < out["counts"][:, None])
    places_or_0 = jnp.clip(places, 0, max_new_tokens - 1)

    def aligned(columns, elsewhere):
        return jnp.where(
            mask, jnp.take_along_axis(columns, places_or_0, axis=1), elsewhere
        )

    wide = jnp.pad(prompts, ((0, 0), (0, max_new_tokens)))
    return Rollouts(
        tokens=aligned(out["tokens"], jnp.where(places < 0, wide, pad_id)),
        completion_mask=mask,
        logps=aligned(out["logps"], 0.0),
        sampler_logps=aligned(out["drawn_logps"], 0.0) if off_policy else None,
    )


def is_eos(tokens: Any, eos_id: EosId) -> Any:
    """bool of the shape of `tokens`, of numpy's or of JAX' kind: which of them end a completion."""
    ids = eos_id if isinstance(eos_id, tuple) else (eos_id,)
    return functools.reduce(operator.or_, [tokens == each for each in ids])


def truncated(rollouts: Rollouts, eos_id: EosId) -> jax.Array:
    """bool[B]: completions that were cut before their EOS."""
    ended = rollouts.completion_mask & is_eos(rollouts.tokens, eos_id)
    return ~jnp.any(ended, axis=1)


def best_of_n(rollouts: Rollouts, scores: jax.Array, group_size: int) -> Rollouts:
    """The best completion of every group; the first of equals.

    Args:
      rollouts: N · group_size rows, a prompt's together.
      scores: f32[N · group_size], higher is better.
      group_size: >= 1.

    Returns:
      Rollouts of N rows. Their `logps` are those of the policy that sampled, not of best-of-n.
    """
    rows = rollouts.tokens.shape[0]
    chex.assert_shape(scores, (rows,))
    if group_size < 1 or rows % group_size:
        raise ValueError(
            f"{rows} rows are not whole groups of {group_size}; group_size must divide them"
        )
    best = jnp.argmax(scores.reshape(-1, group_size), axis=1)
    chosen = jnp.arange(rows // group_size) * group_size + best
    return jax.tree.map(lambda x: x[chosen], rollouts)


def _check(max_new_tokens, num_samples, temperature, top_k, top_p, compact) -> None:
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("num_samples", num_samples),
        ("top_k", top_k),
        ("compact", compact),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if temperature < 0:
        raise ValueError(
            f"temperature is {temperature}; it must be >= 0, and 0 is greedy"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must lie in (0, 1]")
    if temperature == 0 and not (top_k is None and top_p is None):
        raise ValueError(
            f"temperature 0 takes the likeliest token, so top_k={top_k} and top_p={top_p} do nothing; leave them out"
        )


def _stops(width: int, max_new_tokens: int) -> list[int]:
    """The numbers of new tokens at which the cache is made longer; the last is all of them.

    Four equal pieces spare three quarters of what would be read for nothing: with prompts of 64 tokens and completions
    of 448 a CPU samples 1.24 times as fast. Each is compiled by itself, so none is shorter than 64 tokens, where nothing
    was gained, or than an eighth of the whole cache.
    """
    least = max(64, (width + max_new_tokens) // 8)
    pieces = min(4, max(1, max_new_tokens // least))
    each = -(-max_new_tokens // pieces)
    return [*range(each, max_new_tokens, each), max_new_tokens]


def _numbers(rows: int, multiple: int) -> list[int]:
    """Half of the rows and a quarter of them, in multiples, as far as there are such."""
    numbers = [rows // 2 // multiple * multiple, rows // 4 // multiple * multiple]
    return sorted({number for number in numbers if number}, reverse=True)


def _grown(cache: Any, longer: Any) -> Any:
    """A cache in front of an empty one with more slots."""

    def grown(empty, filled):
        if empty is None or jnp.shape(empty) == jnp.shape(filled):
            return filled
        return jax.lax.dynamic_update_slice(empty, filled, (0,) * jnp.ndim(empty))

    return jax.tree.map(grown, longer, cache, is_leaf=lambda x: x is None)


def _at(logps: jax.Array, token: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logps, token[:, None], axis=1)[:, 0]


def _truncate(logits: jax.Array, top_k: int | None, top_p: float | None) -> jax.Array:
    """Logits with −inf where a token is not kept."""
    if top_k is not None:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The likeliest token is always kept: nothing stands before it.
        kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
        least = jnp.take_along_axis(ordered, jnp.maximum(kept, 1) - 1, axis=-1)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def _inverse_cdf(logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """int32[B]: the token at which the cumulative probability passes a uniform number in [0, 1).

    One random number a row, not one a token of the vocabulary: on a CPU 7 times as fast as Gumbel noise at V = 8192. Sums
    run over blocks of the vocabulary and then within the one that is hit: no row is summed up token by token. A token of
    probability 0 is never drawn: u = 0 passes over the ones in front, u < 1 stops before those behind.
    """
    width = 2 ** math.ceil(math.log2(logits.shape[-1]) / 2)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -logits.shape[-1] % width)))
    blocks = weights.reshape(len(logits), -1, width)
    ends = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
    threshold = uniform[:, None] * ends[:, -1:]
    block = jnp.sum(ends <= threshold, axis=-1, keepdims=True)
    inside = jnp.take_along_axis(blocks, block[:, :, None], axis=1)[:, 0]
    before = jnp.where(block > 0, jnp.take_along_axis(ends, block - 1, axis=-1), 0.0)
    passed = jnp.cumsum(inside, axis=-1) <= threshold - before
    # The block's sum was made in another order, and may be an ulp more than where its tokens' sums end.
    last = jnp.max(jnp.where(inside > 0, jnp.arange(width), 0), axis=-1)
    return block[:, 0] * width + jnp.minimum(jnp.sum(passed, axis=-1), last)
