"""Sums and means over the entries a mask keeps, and the one place where a sum is divided.

Masking is always `where` first and arithmetic second: multiplying by a mask lets an infinity behind it turn the
gradient into NaN.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

Axis = int | tuple[int, ...] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean that has not been divided yet, so that parts of a batch can be added exactly.

    Sums over micro-batches, devices and hosts add field by field; `value` divides once, at the end. The choice of
    `weight` is the choice of normaliser (tokens, sequences, a constant).

    Attributes:
      total: f32[...], weighted sum.
      weight: f32[...], sum of weights, >= 0.
    """

    total: jax.Array
    weight: jax.Array

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    def merged(self) -> "Mean":
        """The mean over parts stacked on the leading axis."""
        return Mean(jnp.sum(self.total, axis=0), jnp.sum(self.weight, axis=0))

    @property
    def value(self) -> jax.Array:
        """f32[...]: total / weight, and 0 where the weight is 0."""
        empty = self.weight == 0
        return jnp.where(empty, 0.0, self.total / jnp.where(empty, 1.0, self.weight))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Max:
    """The largest of some values, which joins over parts of a batch as `Mean` does.

    Attributes:
      value: f32[...].
    """

    value: jax.Array

    def merged(self) -> "Max":
        """The largest over parts stacked on the leading axis."""
        return Max(jnp.max(self.value, axis=0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Min:
    """The smallest of some values, which joins over parts of a batch as `Mean` does.

    Attributes:
      value: f32[...].
    """

    value: jax.Array

    def merged(self) -> "Min":
        """The smallest over parts stacked on the leading axis."""
        return Min(jnp.min(self.value, axis=0))


def at_least_float32(values: jax.Array) -> jax.Array:
    """values in float32, or in float64 where they come so (the exact checks do)."""
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def select(values: jax.Array, mask: jax.Array) -> jax.Array:
    """f32[...]: values where mask is True, else 0 and no gradient to what it hides."""
    chex.assert_equal_shape([values, mask])
    chex.assert_type(mask, bool)
    return jnp.where(mask, at_least_float32(values), 0.0)


def sum(values: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
    """f32: sum of the values the mask keeps."""
    return jnp.sum(select(values, mask), axis=axis)


def mean(values: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
    """f32: mean of the values the mask keeps, and 0 where it keeps none."""
    return weighted_mean(values, mask, axis).value


def weighted_mean(values: jax.Array, mask: jax.Array, axis: Axis = None) -> Mean:
    """Mean: the undivided mean of the values the mask keeps."""
    return Mean(sum(values, mask, axis), jnp.sum(mask, axis=axis, dtype=jnp.float32))


def std(
    values: jax.Array, mask: jax.Array, axis: Axis = None, *, ddof: int = 0
) -> jax.Array:
    """f32: standard deviation of the values the mask keeps; 0 where it keeps `ddof` or fewer."""
    count = jnp.sum(mask, axis=axis, keepdims=True, dtype=jnp.float32)
    centre = jnp.sum(select(values, mask), axis=axis, keepdims=True) / jnp.maximum(
        count, 1.0
    )
    squares = jnp.sum(
        jnp.square(select(values - centre, mask)), axis=axis, keepdims=True
    )
    enough = count > ddof
    variance = jnp.where(enough, squares / jnp.where(enough, count - ddof, 1.0), 0.0)
    # The gradient of sqrt at 0 is infinite; a constant group must give 0, not NaN.
    positive = variance > 0
    result = jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)
    return (
        jnp.squeeze(result, axis=axis) if axis is not None else jnp.reshape(result, ())
    )


def whiten(
    values: jax.Array,
    mask: jax.Array,
    *,
    shift_mean: bool = True,
    epsilon: float = 1e-8,
) -> jax.Array:
    """f32[...]: values scaled to unit variance over the mask (and zero mean, if `shift_mean`), 0 elsewhere.

    As in PPO practice (Huang et al., 2024, https://arxiv.org/abs/2403.17031): the variance is the population one.
    """
    # Measured from one of them, equal values are 0; their mean rounds, and would be told apart from them.
    least = jnp.min(jnp.where(mask, values, jnp.inf))
    least = jnp.where(jnp.isfinite(least), least, 0.0)
    values = select(values - least, mask)
    centre = mean(values, mask)
    variance = mean(jnp.square(values - centre), mask)
    whitened = (values - centre) * jax.lax.rsqrt(variance + epsilon)
    return select(whitened if shift_mean else whitened + (centre + least), mask)
