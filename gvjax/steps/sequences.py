"""What the steps read off a batch of sequences: token log-probabilities, their sums, and which of them count."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from gvjax import masked
from gvjax.types import (
    LogpsFn,
    Params,
    PolicyBatch,
    PreferenceBatch,
    SequenceBatch,
    SharedPrompts,
    UnpairedBatch,
)


def check_sequences(**batches: SequenceBatch) -> None:
    """Checks types, ranks, shapes and dtypes of sequences, naming what is wrong."""
    for name, batch in batches.items():
        check_kind(SequenceBatch, **{name: batch})
        whole = {"tokens": int, "completion_mask": bool}
        if batch.segments is not None:
            whole["segments"] = int
        for field, dtype in whole.items():
            array, message = getattr(batch, field), f"argument {name}.{field}"
            chex.assert_rank(array, 2, custom_message=message)
            chex.assert_type(array, dtype, custom_message=message)
            chex.assert_equal_shape([batch.tokens, array], custom_message=message)


def check_kind(kind: type, **arguments: Any) -> None:
    """Checks that arguments are of a type, naming the one that is not."""
    for name, value in arguments.items():
        if not isinstance(value, kind):
            raise TypeError(
                f"argument {name} is a {type(value).__name__}; give a {kind.__name__}"
            )


def check_floats(like: jax.Array, **arrays: jax.Array | None) -> None:
    """Checks that arrays are floating and of the shape of `like`, naming the one that is not; None passes."""
    for name, array in arrays.items():
        if array is not None:
            message = f"argument {name}"
            chex.assert_shape(array, like.shape, custom_message=message)
            chex.assert_type(array, float, custom_message=message)


def check_completions(
    rewards: jax.Array, logps: jax.Array, ref_logps: jax.Array, mask: jax.Array
) -> None:
    """Checks rewards `[B]` against what stands on the tokens `[B, T]`, naming the array that is wrong."""
    chex.assert_rank(mask, 2, custom_message="argument mask")
    chex.assert_type(mask, bool, custom_message="argument mask")
    check_floats(mask, logps=logps, ref_logps=ref_logps)
    check_floats(mask[:, 0], rewards=rewards)


def predicted_mask(batch: SequenceBatch) -> jax.Array:
    """bool[B, T]: completion tokens that something stands before; a sequence's first token is never predicted."""
    mask = jnp.asarray(batch.completion_mask).at[:, 0].set(False)
    if batch.segments is not None:
        same = batch.segments[:, 1:] == batch.segments[:, :-1]
        mask = mask.at[:, 1:].set(mask[:, 1:] & same)
    return mask


def completion_logps(
    logps_fn: LogpsFn | SharedPrompts, params: Params, batch: SequenceBatch
) -> jax.Array:
    """Log-probabilities of the completion tokens.

    Packed sequences need a model that also takes `segments`. One that takes `scored` is told which tokens count.

    Args:
      logps_fn: the model; of `SharedPrompts`, rows are whole groups and each prompt is run once where that pays.
      params: its parameters.
      batch: tokens int32[B, T] and completion_mask bool[B, T].

    Returns:
      f32[B, T], nats; 0 where no completion token stands.

    Raises:
      AssertionError, TypeError: an array of the batch, or the batch itself, is of another type or shape.
      ValueError: the model returned another shape, or the rows are no whole groups.
    """
    check_sequences(batch=batch)
    tokens, scored = jnp.asarray(batch.tokens), predicted_mask(batch)
    shared = None
    if isinstance(logps_fn, SharedPrompts):
        if batch.segments is None and logps_fn.pays(tokens.shape[1]):
            shared = _shared_logps(logps_fn, params, batch)
        logps_fn = logps_fn.plain
    if shared is not None:
        logps = shared
    else:
        more: dict[str, jax.Array] = {}
        if batch.segments is not None:
            more["segments"] = jnp.asarray(batch.segments)
        if "scored" in inspect.signature(logps_fn).parameters:
            more["scored"] = scored
        model: Callable[..., jax.Array] = logps_fn
        logps = model(params, tokens, **more)
    if logps.shape != tokens.shape:
        raise ValueError(
            f"the model returned log-probabilities of shape {logps.shape} for tokens of shape {tokens.shape}; return"
            " one a token, 0 in column 0 (`logps_from_logits` makes them of a forward pass)"
        )
    return masked.select(logps, scored)


def _shared_logps(
    model: SharedPrompts, params: Params, batch: SequenceBatch
) -> jax.Array:
    """f32[B, T]: as a LogpsFn's on the completions, 0 on prompts."""
    rows, width = batch.tokens.shape
    group, length = model.group_size, model.completion_length
    if rows % group:
        raise ValueError(
            f"{rows} rows are not whole groups of {group}; the completions of one prompt stand in consecutive rows"
        )
    tokens, mask = jnp.asarray(batch.tokens), jnp.asarray(batch.completion_mask)
    # Where a completion is empty nobody sees where its prompt ends; the others of the group know.
    starts = jnp.where(mask.any(axis=1), mask.argmax(axis=1), width)
    starts = starts.reshape(-1, group)
    known = jnp.argmin(starts, axis=1)[:, None]
    starts = jnp.take_along_axis(starts, known, axis=1)
    prompts = jnp.take_along_axis(
        tokens.reshape(-1, group, width), known[:, :, None], axis=1
    )[:, 0, : model.prompt_length]
    places = jnp.arange(width) - jnp.repeat(starts, group, axis=0)
    at = jnp.repeat(starts, group, axis=0) + jnp.arange(length)
    completions = jnp.take_along_axis(tokens, jnp.minimum(at, width - 1), axis=1)
    logps = model.logps_fn(
        params,
        prompts,
        jnp.minimum(starts[:, 0], model.prompt_length),
        completions.reshape(-1, group, length),
    ).reshape(rows, length)
    inside = (places >= 0) & (places < length)
    at = jnp.clip(places, 0, length - 1)
    return jnp.where(inside, jnp.take_along_axis(logps, at, axis=1), 0.0)


def summed_logps(
    logps_fn: LogpsFn | SharedPrompts, params: Params, batch: SequenceBatch
) -> jax.Array:
    """Log-probability of each whole completion.

    Args:
      logps_fn, params, batch: as in `completion_logps`, not packed.

    Returns:
      f32[B], nats; 0 for an empty completion.

    Raises:
      ValueError: the sequences are packed, or see `completion_logps`.
    """
    check_kind(SequenceBatch, batch=batch)
    if batch.segments is not None:
        raise ValueError(
            "these sequences are packed (they have `segments`), and a packed row has no log-probability of its own;"
            " pack demonstrations and pairs only"
        )
    return jnp.sum(completion_logps(logps_fn, params, batch), axis=1)


def row_mean(rows: jax.Array, weight: jax.Array) -> masked.Mean:
    """Mean of rows [B] under weights [B] >= 0; a row of weight 0 is not looked at."""
    kept = masked.select(rows, weight > 0)
    return masked.Mean(jnp.sum(kept * weight), jnp.sum(weight))


def row_weights(weight: jax.Array | None, filled: jax.Array) -> jax.Array:
    """f32[B]: a batch's own weights, or 1, on the rows that hold what they should; 0 on the others."""
    if weight is None:
        return filled.astype(jnp.float32)
    check_floats(filled, weight=weight)
    return jnp.where(filled, jnp.asarray(weight, jnp.float32), 0.0)


def lengths(batch: SequenceBatch) -> jax.Array:
    """f32[B]: completion tokens per row."""
    return jnp.sum(predicted_mask(batch), axis=1, dtype=jnp.float32)


def interleave(first: SequenceBatch, second: SequenceBatch) -> SequenceBatch:
    """Rows of two batches in turn, [2B, T], so that one forward pass serves both.

    In turn rather than one after the other: on a mesh every pair then stays on the device that holds it.

    Args:
      first, second: B rows each, [B, T1] and [B, T2]; T is the longer of both.

    Raises:
      ValueError: they have different numbers of rows.
    """
    check_sequences(first=first, second=second)
    if first.tokens.shape[0] != second.tokens.shape[0]:
        raise ValueError(
            f"{first.tokens.shape[0]} rows cannot be paired with {second.tokens.shape[0]}; row b of both shares a prompt"
        )
    length = max(first.tokens.shape[1], second.tokens.shape[1])

    def joined(one: jax.Array, other: jax.Array) -> jax.Array:
        wide = [
            jnp.pad(part, ((0, 0), (0, length - part.shape[1])))
            for part in (one, other)
        ]
        return jnp.stack(wide, axis=1).reshape(-1, length)

    return jax.tree.map(joined, first, second)


def paired_logps(
    logps_fn: LogpsFn | SharedPrompts, params: Params, batch: PreferenceBatch
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of both completions of every pair, in one forward pass.

    Args:
      logps_fn, params: as in `completion_logps`.
      batch: B pairs, or B rows of S packed ones.

    Returns:
      (chosen f32[N], rejected f32[N]), nats; N is B, or B · S where pairs are packed.

    Raises:
      ValueError: packed pairs do not say which of their segments are pairs, or see `completion_logps`.
    """
    check_kind(PreferenceBatch, batch=batch)
    check_sequences(chosen=batch.chosen, rejected=batch.rejected)
    if batch.chosen.segments is not None:
        pairs_per_row(batch)
    both = interleave(batch.chosen, batch.rejected)
    return sums_by_pair(batch, completion_logps(logps_fn, params, both))


def paired_lengths(batch: PreferenceBatch) -> tuple[jax.Array, jax.Array]:
    """(chosen f32[N], rejected f32[N]): completion tokens of every pair."""
    both = interleave(batch.chosen, batch.rejected)
    return sums_by_pair(batch, predicted_mask(both).astype(jnp.float32))


def sums_by_pair(
    batch: PreferenceBatch, values: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(chosen [N], rejected [N]): sums over each completion of values [2B, T], rows interleaved and 0 elsewhere."""
    segments = interleave(batch.chosen, batch.rejected).segments
    if segments is None:
        return by_pair(batch, jnp.sum(values, axis=1))
    # One comparison a segment and not a scatter: the same bits on every device.
    here = segments[:, None, :] == 1 + jnp.arange(pairs_per_row(batch))[:, None]
    return by_pair(batch, jnp.sum(jnp.where(here, values[:, None, :], 0), axis=2))


def by_pair(batch: PreferenceBatch, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(chosen [N], rejected [N]) of one value a completion: [2B], or [2B, S] where pairs are packed."""
    first, second = values[0::2], values[1::2]
    if batch.swapped is not None:
        swapped = jnp.asarray(batch.swapped)
        first, second = (
            jnp.where(swapped, second, first),
            jnp.where(swapped, first, second),
        )
    return first.reshape(-1), second.reshape(-1)


def pairs_per_row(batch: PreferenceBatch) -> int:
    """S of a packed batch.

    Raises:
      ValueError: it does not say which of its segments are pairs.
    """
    if batch.weight is None or jnp.ndim(batch.weight) != 2:
        raise ValueError(
            "these pairs are packed (they have `segments`), so `weight` must be f32[B, S]: 1 for a pair, 0 where a row has"
            " fewer than S"
        )
    return batch.weight.shape[1]


def flat(values: jax.Array | None) -> jax.Array | None:
    """[N] of what a batch says of its pairs, packed or not."""
    return None if values is None else jnp.reshape(values, -1)


def with_ref_logps(
    logps_fn: LogpsFn | SharedPrompts,
    ref_params: Params,
    batch: PreferenceBatch | UnpairedBatch | PolicyBatch,
):
    """The batch with the reference policy's log-probabilities filled in.

    The reference is a scorer whose output is data: no step ever holds two models.

    Args:
      logps_fn: the model.
      ref_params: parameters of the reference policy.
      batch: PreferenceBatch, UnpairedBatch or PolicyBatch.

    Returns:
      A batch of the same type; no gradient flows into the new fields.

    Raises:
      TypeError: it is none of these.
      ValueError: see `completion_logps`.
    """
    ref_params = jax.lax.stop_gradient(ref_params)
    if isinstance(batch, PreferenceBatch):
        chosen, rejected = paired_logps(logps_fn, ref_params, batch)
        if batch.chosen.segments is not None:
            shape = (-1, pairs_per_row(batch))
            chosen, rejected = chosen.reshape(shape), rejected.reshape(shape)
        return dataclasses.replace(
            batch, ref_chosen_logps=chosen, ref_rejected_logps=rejected
        )
    if isinstance(batch, UnpairedBatch):
        batch = dataclasses.replace(
            batch, ref_logps=summed_logps(logps_fn, ref_params, batch.sequences)
        )
        if batch.kl_sequences is None:
            return batch
        kl_logps = summed_logps(logps_fn, ref_params, batch.kl_sequences)
        return dataclasses.replace(batch, ref_kl_logps=kl_logps)
    if isinstance(batch, PolicyBatch):
        sequences = SequenceBatch(batch.tokens, batch.completion_mask)
        logps = completion_logps(logps_fn, ref_params, sequences)
        return dataclasses.replace(batch, ref_logps=logps)
    raise TypeError(
        f"cannot add reference log-probabilities to {type(batch).__name__}; give a PreferenceBatch, UnpairedBatch or"
        " PolicyBatch"
    )
