"""Normal numbers for many arrays, which are pieces of one draw, without the memory of the whole draw.

Threefry is a function of the key and of a number's place in the draw. `jax.random.normal` counts places from 0; here
they are counted from where the piece begins, over the shape it is wanted in, so that nothing is cut, reshaped or moved:
on a mesh each device makes the numbers of its own shards, and no others.
"""

import math
from collections.abc import Sequence

import jax
import jax.extend
import jax.numpy as jnp

ONE_DRAW = 2**24
"""So many numbers (64 MiB) are drawn at once and cut up: compiling a draw for each of a small network's matrices takes
longer than training it. A larger draw, spread over a mesh, would be in the wrong places: cutting it moves nearly all."""


def normals(
    key: jax.Array, shapes: Sequence[tuple[int, ...]], *, one_draw: int = ONE_DRAW
) -> list[jax.Array]:
    """Standard normal numbers: those of `jax.random.normal(key, (N,))` in their order, N what all shapes hold.

    Args:
      key: a threefry key, consumed.
      shapes: of the arrays.
      one_draw: up to so many numbers are drawn at once; it changes what is compiled and not what comes out.

    Returns:
      f32[shape] for each.
    """
    sizes = [math.prod(shape) for shape in shapes]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    if sum(sizes) > one_draw:
        return [piece(key, start, shape) for start, shape in zip(starts, shapes)]
    drawn = jnp.split(jax.random.normal(key, (sum(sizes),)), starts[1:])
    return [numbers.reshape(shape) for numbers, shape in zip(drawn, shapes)]


def piece(key: jax.Array, start: int, shape: tuple[int, ...]) -> jax.Array:
    """`jax.random.normal(key, (N,))[start:][:size].reshape(shape)`, for any N that is large enough.

    Args:
      key: a threefry key, consumed together with all the other pieces of its draw.
      start: >= 0, below 2⁶⁴; the place in the draw of the piece's first number.
      shape: of the piece; all axes but the last hold fewer than 2³² rows.

    Returns:
      f32[shape].
    """
    placed = jnp.concatenate(
        [
            jax.random.key_data(key),
            jnp.array([start >> 32, start & 0xFFFFFFFF], jnp.uint32),
        ]
    )
    return jax.random.normal(jax.random.wrap_key_data(placed, impl=_FROM_START), shape)


def _bits(placed: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    """Random bits of the places `start`, `start` + 1, …, of a key that carries its start: uint32[4]."""
    if bit_width != 32:
        raise NotImplementedError(f"pieces are of 32 bits a number, not {bit_width}")
    *leading, width = shape
    rows = math.prod(leading)
    row = jnp.arange(rows, dtype=jnp.uint32).reshape(*leading, 1)
    high, low = _product(row, width)
    column = jax.lax.broadcasted_iota(jnp.uint32, shape, len(leading))
    high, low = _sum(high, low, jnp.uint32(0), column)
    high, low = _sum(high, low, placed[2], placed[3])
    first, second = jax.extend.random.threefry2x32_p.bind(
        *(jnp.broadcast_to(word, shape) for word in (placed[0], placed[1], high, low))
    )
    return first ^ second


def _product(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
    """The high and the low 32 bits of a product of two uint32, from products of their halves."""
    top, bottom = a >> 16, a & 0xFFFF
    b_top, b_bottom = jnp.uint32(b >> 16), jnp.uint32(b & 0xFFFF)
    crossed = top * b_bottom, bottom * b_top
    middle = (bottom * b_bottom >> 16) + sum(each & 0xFFFF for each in crossed)
    high = top * b_top + sum(each >> 16 for each in crossed) + (middle >> 16)
    return high, a * jnp.uint32(b)


def _sum(
    high: jax.Array, low: jax.Array, more_high: jax.Array, more_low: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The high and the low 32 bits of a sum of two 64-bit numbers."""
    total = low + more_low
    return high + more_high + (total < more_low).astype(jnp.uint32), total


def _refused(*unused):
    raise NotImplementedError("a piece of a draw is neither split nor seeded")


_FROM_START = jax.extend.random.define_prng_impl(
    key_shape=(4,),
    seed=_refused,
    split=_refused,
    random_bits=_bits,
    fold_in=_refused,
    name="threefry_from_start",
    tag="thf",
)
