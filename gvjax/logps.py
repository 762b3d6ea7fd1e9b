"""Token log-probabilities, their entropy, and estimates of KL divergence. The only shift by one in the library."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from gvjax import masked

KEPT_LOGITS = 2**25
"""As many logits as are computed in one piece where nobody says otherwise."""

_PIECES, _SMALLEST = 4, 2**18
"""Into how many pieces what would be one is cut where only some positions are scored, of how many logits at least: with
completions of 128 tokens behind prompts of 512, a vocabulary of 8192 took a CPU 721 ms in one piece, 195 in 4 and 231 in 8;
where every position is scored 718, 693 and 789. A few dozen tokens to a vocabulary are not worth what pieces take to compile:
the quickstart's steps took 4.8 s for it and 4.0 without, and run as fast."""


def token_logps(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probability of every token given those before it.

        logps[b, t] = log softmax(logits[b, t − 1])[tokens[b, t]],   logps[b, 0] = 0

    Args:
      logits: [B, T, V], any float dtype; `logits[b, t]` predicts `tokens[b, t + 1]`.
      tokens: int32[B, T].

    Returns:
      f32[B, T], nats, aligned to `tokens`.
    """
    _check_rank(3, float, logits=logits)
    _check_rank(2, int, tokens=tokens)
    chex.assert_equal_shape_prefix(
        [logits, tokens], 2, custom_message="arguments logits and tokens"
    )
    return _align(_picked_logps(logits[:, :-1], tokens[:, 1:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(states: jax.Array, matrix: jax.Array, turned: bool = False) -> jax.Array:
    """f32[..., V] of states [..., D] and a matrix [D, V], or [V, D] where it is `turned`, accumulated in float32.

    Backwards both products take operands of these dtypes too: the derived gradient of bf16 ones multiplies in float32,
    which accelerators do at a fraction of the rate.
    """
    matrix = matrix.T if turned else matrix
    return jnp.dot(states, matrix, preferred_element_type=jnp.float32)


def _product_forward(states, matrix, turned):
    return product(states, matrix, turned), (states, matrix)


def _product_backward(turned, kept, g):
    states, matrix = kept
    g = g.astype(states.dtype)
    rows = tuple(range(g.ndim - 1))
    back = matrix if turned else matrix.T
    of_states = jnp.dot(g, back, preferred_element_type=jnp.float32)
    of_matrix = jnp.tensordot(
        g, states, (rows, rows), preferred_element_type=jnp.float32
    )
    of_matrix = of_matrix if turned else of_matrix.T
    return of_states.astype(states.dtype), of_matrix.astype(matrix.dtype)


product.defvjp(_product_forward, _product_backward)


def chunked_token_logps(
    hidden: jax.Array,
    unembed: jax.Array,
    tokens: jax.Array,
    *,
    chunk_size: int | None = None,
    logits_fn: Callable[[jax.Array], jax.Array] | None = None,
    scored: jax.Array | None = None,
    turned: bool = False,
) -> jax.Array:
    """`token_logps(hidden @ unembed, tokens)`, a chunk of the logits at a time where there are many.

    Positions are flattened to `[B·(T − 1), D]` and walked through in chunks of one size; each chunk's logits are
    recomputed in the backward pass, so peak memory is `chunk_size · V` floats in both directions. Where only some positions
    are scored these go in front, and the chunks behind the last of them are left out.

    Args:
      hidden: [B, T, D], final hidden states; position t predicts token t + 1. The last predicts nothing and may be left
        out: [B, T − 1, D] gives the same.
      unembed: [D, V].
      tokens: int32[B, T].
      chunk_size: > 0, most positions per chunk. A chunk that holds all positions is computed in one piece and kept. None
        is as many as have 2²⁵ logits (128 MiB), at least 1024: recomputing costs a product more, so what is small is
        kept.
      logits_fn: what to do to the float32 logits of a chunk (a soft cap, say); None leaves them.
      scored: bool[B, T], the tokens whose log-probability is asked for; the others get 0. None: all.
      turned: unembed is [V, D] instead, as tied embeddings are; every chunk would otherwise turn a copy of its own.

    Returns:
      f32[B, T], nats, aligned to `tokens`; column 0 is 0.

    Raises:
      AssertionError: an array has another rank, dtype or length.
      ValueError: chunk_size is not positive.
    """
    _check_rank(3, float, hidden=hidden)
    _check_rank(2, float, unembed=unembed)
    _check_rank(2, int, tokens=tokens)
    if hidden.shape[1] != tokens.shape[1] - 1:
        chex.assert_equal_shape_prefix(
            [hidden, tokens], 2, custom_message="arguments hidden and tokens"
        )
    vocabulary = unembed.shape[0 if turned else 1]
    if chunk_size is None:
        chunk_size = max(1024, KEPT_LOGITS // vocabulary)
    if chunk_size <= 0:
        raise ValueError(f"chunk_size is {chunk_size}; it must be positive, e.g. 1024")
    (batch, length), width = tokens.shape, hidden.shape[-1]
    predicted = batch * (length - 1)
    states = hidden[:, : length - 1].reshape(predicted, width)
    targets = tokens[:, 1:].reshape(predicted)

    def logps_of(states: jax.Array, targets: jax.Array) -> jax.Array:
        # Of bf16 ones too the logits are kept in float32.
        logits = product(states, unembed, turned)
        return _picked_logps(
            logits if logits_fn is None else logits_fn(logits), targets
        )

    kept = predicted <= chunk_size
    # The fewest chunks that will do, of one size: filling the last one up to `chunk_size` could double the work.
    chunks = -(-predicted // chunk_size)
    wanted = None
    if scored is not None:
        chex.assert_equal_shape([tokens, scored])
        wanted = scored[:, 1:].reshape(predicted)
        if kept:
            chunks = predicted * vocabulary // _SMALLEST
            chunks = max(1, min(_PIECES, chunks))

    def aligned(logps: jax.Array) -> jax.Array:
        if wanted is not None:
            logps = jnp.where(wanted, logps, 0.0)
        return _align(logps.reshape(batch, length - 1))

    if chunks == 1:
        return aligned(logps_of(states, targets))
    if wanted is None:
        in_front = jnp.ones(predicted, bool)
    else:
        order = jnp.argsort(~wanted, stable=True)
        places = jnp.argsort(order)
        states, targets = _reordered(states, order, places), targets[order]
        in_front = wanted[order]
    size = -(-predicted // chunks)
    padding = chunks * size - predicted
    parts = (
        jnp.pad(states, ((0, padding), (0, 0))).reshape(chunks, size, width),
        jnp.pad(targets, (0, padding)).reshape(chunks, size),
        jnp.pad(in_front, (0, padding)).reshape(chunks, size),
    )

    def chunk_logps(states, targets, in_front):
        if wanted is None:
            return logps_of(states, targets)
        return jax.lax.cond(
            in_front[0], logps_of, lambda *_: jnp.zeros(size), states, targets
        )

    if kept:
        pieces = [chunk_logps(*(part[i] for part in parts)) for i in range(chunks)]
        logps = jnp.concatenate(pieces)
    else:
        again = jax.checkpoint(chunk_logps)
        logps = jax.lax.map(lambda chunk: again(*chunk), parts).reshape(-1)
    logps = logps[:predicted]
    return aligned(logps if wanted is None else logps[places])


def logps_from_logits(
    apply_fn: Callable[[Any, jax.Array], jax.Array],
) -> Callable[[Any, jax.Array], jax.Array]:
    """Makes a LogpsFn of a plain forward pass.

    Args:
      apply_fn: `(params, tokens int32[B, T]) -> logits [B, T, V]`, of token t + 1 at position t.

    Returns:
      `(params, tokens) -> f32[B, T]`, nats, aligned to tokens; 0 in column 0, which nothing predicts.
    """

    def logps_fn(params: Any, tokens: jax.Array) -> jax.Array:
        return token_logps(apply_fn(params, tokens), tokens)

    return logps_fn


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy of the softmax of the last axis.

        H = −Σ_v p_v log p_v,   p = softmax(logits);   a token of probability 0 adds 0

    Args:
      logits: [..., V]; −inf marks a token outside the support.

    Returns:
      f32[...], nats, in [0, log V].
    """
    logps = jax.nn.log_softmax(masked.at_least_float32(logits), axis=-1)
    possible = jnp.isfinite(logps)
    return -jnp.sum(
        jnp.where(possible, jnp.exp(logps) * jnp.where(possible, logps, 0.0), 0.0),
        axis=-1,
    )


def kl_k1(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """k1 = log π/π_ref at samples of π: an unbiased, high-variance estimate of KL(π ‖ π_ref), of either sign.

    Its derivative is the plain score, whose mean is 0: use it as part of a reward, never as a loss.

    Args:
      logps, ref_logps: f32[...], nats.

    Returns:
      f32[...], nats.

    References:
      Schulman, 2020, http://joschu.net/blog/kl-approx.html.
    """
    _check_same_shape(logps, ref_logps)
    return logps - ref_logps


def kl_k2(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """k2 = ½ (log π/π_ref)² at samples of π: non-negative, biased by third-order terms; on-policy its gradient is KL's.

    Args:
      logps, ref_logps: f32[...], nats.

    Returns:
      f32[...], nats, >= 0.

    References:
      Schulman, 2020, http://joschu.net/blog/kl-approx.html.
    """
    _check_same_shape(logps, ref_logps)
    return 0.5 * jnp.square(logps - ref_logps)


def kl_k3(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """k3 = π_ref/π − 1 − log π_ref/π at samples of π: unbiased for KL(π ‖ π_ref) and non-negative (GRPO's choice).

    Args:
      logps, ref_logps: f32[...], nats.

    Returns:
      f32[...], nats, >= 0.

    References:
      Schulman, 2020, http://joschu.net/blog/kl-approx.html; Shao et al., 2024, https://arxiv.org/abs/2402.03300, Eq. 4.
    """
    _check_same_shape(logps, ref_logps)
    return jnp.expm1(ref_logps - logps) - (ref_logps - logps)


def _check_rank(rank: int, dtype: type, **arrays: jax.Array) -> None:
    for name, array in arrays.items():
        chex.assert_rank(array, rank, custom_message=f"argument {name}")
        chex.assert_type(array, dtype, custom_message=f"argument {name}")


def _check_same_shape(logps: jax.Array, ref_logps: jax.Array) -> None:
    chex.assert_equal_shape(
        [logps, ref_logps], custom_message="arguments logps and ref_logps"
    )


def _picked_logps(logits: jax.Array, targets: jax.Array) -> jax.Array:
    logits = masked.at_least_float32(logits)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


@jax.custom_vjp
def _reordered(rows: jax.Array, order: jax.Array, places: jax.Array) -> jax.Array:
    """rows[order], where order[places] counts up: so the gradient can be looked up too, and is not scattered."""
    return rows[order]


_reordered.defvjp(
    lambda rows, order, places: (rows[order], places),
    lambda places, g: (g[places], None, None),
)


def _align(logps: jax.Array) -> jax.Array:
    """Puts the 0 of the unpredicted first token in front."""
    return jnp.pad(logps, ((0, 0), (1, 0)))
