"""What every loss agrees on: which arrays it may ask for, and how it checks what it is given.

A preference loss asks for its arrays by parameter name, from one fixed vocabulary, so that a step can pass exactly
what a loss needs and a new loss is one function. Log-probabilities of completions are always *sums* over the
completion, in nats; a loss that its paper defines on averages asks for the lengths and divides itself, so there is one
unit for everybody.
"""

import difflib
import functools
import inspect
import numbers
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp

from gvjax import masked

Loss = Callable[..., jax.Array]
"""Arrays in, unreduced float32 losses out."""

VOCABULARY = (
    "chosen_logps",
    "rejected_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "chosen_lengths",
    "rejected_lengths",
    "chosen_probability",
    "margin",
)
"""Arrays `[B]` that a loss on pairs may ask for, in this order.

`*_logps`: f32, nats, summed over the completion; `ref_*` under the reference policy. `*_lengths`: int32, completion
tokens, the EOS included. `chosen_probability`: f32 in [0, 1]. `margin`: f32, reward units.
"""

UNPAIRED_VOCABULARY = ("logps", "ref_logps", "desirable", "kl")
"""Arrays that a loss on single completions may ask for: f32[B], f32[B], bool[B] and f32[]."""


def arguments(loss: Loss, vocabulary: tuple[str, ...] = VOCABULARY) -> tuple[str, ...]:
    """Lists the arrays a loss asks for, in the vocabulary's order.

    Hyper-parameters are bound beforehand, with `functools.partial`; a parameter that has a default, or was bound, is
    not asked for.

    Args:
      loss: a loss function, a `functools.partial` of one, or a `weighted_sum`.
      vocabulary: the names it may use.

    Returns:
      The names, to be passed as keyword arguments.

    Raises:
      ValueError: a required parameter is not in the vocabulary, or the signature hides what is needed.
    """
    required = set()
    for parameter in inspect.signature(loss).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(
                f"{_name(loss)} takes {parameter}, which hides the arrays it needs; name its parameters, from "
                f"{', '.join(vocabulary)} (a decorator keeps them with functools.wraps)"
            )
        if parameter.default is not parameter.empty:
            continue
        if parameter.name not in vocabulary:
            near = difflib.get_close_matches(parameter.name, vocabulary, n=3)
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise ValueError(
                f"{_name(loss)} requires {parameter.name!r}, which no batch supplies{hint}; an array must be one of "
                f"{', '.join(vocabulary)}, and a hyper-parameter needs a default or must be bound: "
                f"functools.partial({_name(loss)}, {parameter.name}=...)"
            )
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ValueError(
                f"{_name(loss)} takes {parameter.name!r} by position only; losses are called by name: remove the '/'"
            )
        required.add(parameter.name)
    return tuple(name for name in vocabulary if name in required)


_NOT_FLOATS = {
    "chosen_lengths": jnp.int32,
    "rejected_lengths": jnp.int32,
    "chosen_from_reference": jnp.bool_,
    "desirable": jnp.bool_,
    "mask": jnp.bool_,
}


def try_out(loss: Loss, names: tuple[str, ...]) -> None:
    """Calls a loss on shapes alone, so that a hyper-parameter it refuses is refused when a step is built.

    Args:
      loss: as for `arguments`.
      names: the arrays it asks for.

    Raises:
      ValueError: the loss's own, for a value that is impossible whatever the arrays hold.
    """
    shapes = {
        name: jax.ShapeDtypeStruct(
            () if name == "kl" else (2,), _NOT_FLOATS.get(name, jnp.float32)
        )
        for name in names
    }
    jax.eval_shape(loss, **shapes)


def underlying(loss: Loss) -> Iterator[Loss]:
    """Yields the functions a loss is made of, looking through partials, sums and wrappers."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    parts = getattr(loss, "parts", ())
    if not parts:
        yield loss
    for part in parts:
        yield from underlying(part)


def _name(loss: Loss) -> str:
    while isinstance(loss, functools.partial):
        loss = loss.func
    return getattr(loss, "__name__", repr(loss))


def float_rows(**arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Checks that arrays are floating, of rank 1 and of one shape, naming the one that is not; at least float32."""
    return _floats(1, arrays)


def float_tokens(**arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Checks that arrays are floating, `[B, T]` and of one shape, naming the one that is not; at least float32."""
    return _floats(2, arrays)


def _floats(rank: int, arrays: dict[str, Any]) -> tuple[jax.Array, ...]:
    first, *_ = arrays
    converted = {name: jnp.asarray(array) for name, array in arrays.items()}
    for name, array in converted.items():
        chex.assert_rank(array, rank, custom_message=f"argument {name}")
        chex.assert_type(array, float, custom_message=f"argument {name}")
        chex.assert_equal_shape(
            [converted[first], array], custom_message=f"arguments {first} and {name}"
        )
    return tuple(masked.at_least_float32(array) for array in converted.values())


def lengths_like(rows: jax.Array, **lengths: jax.Array) -> tuple[jax.Array, ...]:
    """Checks token counts `[B]` against `rows`, naming the one that is wrong.

    Returns:
      f32[B] >= 1: an empty completion has the log-probability 0, and 0 / 1 keeps it so.
    """
    checked = []
    for name, array in lengths.items():
        array = jnp.asarray(array)
        chex.assert_rank(array, 1, custom_message=f"argument {name}")
        chex.assert_equal_shape([rows, array], custom_message=f"argument {name}")
        checked.append(jnp.maximum(array.astype(rows.dtype), 1.0))
    return tuple(checked)


def bools_like(values: jax.Array, **flags: jax.Array) -> tuple[jax.Array, ...]:
    """Checks bool arrays against the shape of `values`, naming the one that is wrong."""
    checked = []
    for name, array in flags.items():
        array = jnp.asarray(array)
        chex.assert_equal_shape([values, array], custom_message=f"argument {name}")
        chex.assert_type(array, bool, custom_message=f"argument {name}")
        checked.append(array)
    return tuple(checked)


def require_positive(**hyper_parameters: Any) -> None:
    """Raises ValueError for Python numbers that are not > 0 and finite; traced values pass unseen."""
    for name, value in hyper_parameters.items():
        if isinstance(value, numbers.Real) and not 0 < float(value) < float("inf"):
            raise ValueError(
                f"{name} is {value}, but must be > 0 and finite; pass for example {name}=0.1"
            )


def require_non_negative(**hyper_parameters: Any) -> None:
    """Raises ValueError for Python numbers that are not >= 0 and finite; traced values pass unseen."""
    for name, value in hyper_parameters.items():
        if isinstance(value, numbers.Real) and not 0 <= float(value) < float("inf"):
            raise ValueError(
                f"{name} is {value}, but must be >= 0 and finite; pass {name}=0.0 to switch it off"
            )


def require_smoothing(label_smoothing: Any) -> None:
    """Raises ValueError for a label smoothing outside [0, 0.5); traced values pass unseen."""
    if isinstance(label_smoothing, numbers.Real) and not (
        0 <= float(label_smoothing) < 0.5
    ):
        raise ValueError(
            f"label_smoothing is {label_smoothing}, but it is the probability that a label is flipped and must lie "
            "in [0, 0.5); at 0.5 labels say nothing, and above it swap chosen and rejected instead"
        )
