"""Token log-probabilities, their entropy, and estimates of KL divergence. The only shift by one in the library."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from gvjax import masked

KEPT_LOGITS = 2**25
"""As many logits as are computed in one piece where nobody says otherwise."""


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


def chunked_token_logps(
    hidden: jax.Array,
    unembed: jax.Array,
    tokens: jax.Array,
    *,
    chunk_size: int | None = None,
    logits_fn: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """`token_logps(hidden @ unembed, tokens)`, never holding more than a chunk of the logits.

    Positions are flattened to `[B·(T − 1), D]` and walked through in chunks of one size; each chunk's logits are
    recomputed in the backward pass, so peak memory is `chunk_size · V` floats in both directions.

    Args:
      hidden: [B, T, D], final hidden states; position t predicts token t + 1. The last predicts nothing and may be left
        out: [B, T − 1, D] gives the same.
      unembed: [D, V].
      tokens: int32[B, T].
      chunk_size: > 0, most positions per chunk. A chunk that holds all positions is computed in one piece and kept. None
        is as many as have 2²⁵ logits (128 MiB), at least 1024: recomputing costs a product more, so what is small is
        kept.
      logits_fn: what to do to the float32 logits of a chunk (a soft cap, say); None leaves them.

    Returns:
      f32[B, T], nats, aligned to `tokens`; column 0 is 0.
    """
    _check_rank(3, float, hidden=hidden)
    _check_rank(2, float, unembed=unembed)
    _check_rank(2, int, tokens=tokens)
    if hidden.shape[1] != tokens.shape[1] - 1:
        chex.assert_equal_shape_prefix(
            [hidden, tokens], 2, custom_message="arguments hidden and tokens"
        )
    if chunk_size is None:
        chunk_size = max(1024, KEPT_LOGITS // unembed.shape[1])
    if chunk_size <= 0:
        raise ValueError(f"chunk_size is {chunk_size}; it must be positive, e.g. 1024")
    (batch, length), width = tokens.shape, hidden.shape[-1]
    predicted = batch * (length - 1)
    states = hidden[:, : length - 1].reshape(predicted, width)
    targets = tokens[:, 1:].reshape(predicted)

    def logps_of(states: jax.Array, targets: jax.Array) -> jax.Array:
        # bf16 products are accumulated, and the logits kept, in float32.
        logits = jnp.dot(states, unembed, preferred_element_type=jnp.float32)
        return _picked_logps(
            logits if logits_fn is None else logits_fn(logits), targets
        )

    if predicted <= chunk_size:
        return _align(logps_of(states, targets).reshape(batch, length - 1))

    # The fewest chunks that will do, of one size: filling the last one up to `chunk_size` could double the work.
    chunks = -(-predicted // chunk_size)
    chunk_size = -(-predicted // chunks)
    padding = chunks * chunk_size - predicted
    states = jnp.pad(states, ((0, padding), (0, 0))).reshape(chunks, chunk_size, width)
    targets = jnp.pad(targets, (0, padding)).reshape(chunks, chunk_size)
    logps = jax.lax.map(
        lambda chunk: jax.checkpoint(logps_of)(*chunk), (states, targets)
    )
    return _align(logps.reshape(-1)[:predicted].reshape(batch, length - 1))


def logps_from_logits(
    apply_fn: Callable[[Any, jax.Array], jax.Array],
) -> Callable[[Any, jax.Array], jax.Array]:
    """Makes a LogpsFn of a plain forward pass `(params, tokens) -> logits`, an ApplyFn."""

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


def _align(logps: jax.Array) -> jax.Array:
    """Puts the 0 of the unpredicted first token in front."""
    return jnp.pad(logps, ((0, 0), (1, 0)))
