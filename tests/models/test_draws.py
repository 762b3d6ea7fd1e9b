"""Pieces of a draw of normal numbers, against the draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gvjax import sharding
from gvjax.models import draws

SHAPES = ((5,), (3, 4, 8), (6, 16))


@pytest.mark.parametrize("seed", (7,))
def test_pieces_are_the_numbers_of_one_draw(seed):
    key = jax.random.key(seed)
    size = sum(int(np.prod(shape)) for shape in SHAPES)
    drawn = np.asarray(jax.random.normal(key, (size,)))
    for one_draw in (0, size - 1, size):
        made = draws.normals(key, SHAPES, one_draw=one_draw)
        assert [each.shape for each in made] == list(SHAPES)
        joined = np.concatenate([np.ravel(each) for each in made])
        np.testing.assert_array_equal(joined, drawn)


def test_a_piece_begins_beyond_32_bits():
    key = jax.random.key(0)
    across = np.ravel(draws.piece(key, 2**32 - 6, (3, 4)))
    np.testing.assert_array_equal(across[6:], draws.piece(key, 2**32, (6,)))
    np.testing.assert_array_equal(
        across[2:10], np.ravel(draws.piece(key, 2**32 - 4, (2, 4)))
    )
    assert not np.isin(across, draws.piece(key, 0, (12,))).any()


@pytest.mark.parametrize("a, b", ((1, 1), (2**32 - 1, 2**32 - 1), (123456789, 128256)))
def test_products_have_64_bits(a, b):
    high, low = draws._product(jnp.array([a], jnp.uint32), b)
    assert (int(high[0]) << 32 | int(low[0])) == a * b


def test_each_device_makes_its_own_shards():
    mesh = sharding.make_mesh(data=1, fsdp=8, tensor=1)
    whole = NamedSharding(mesh, P())
    split = NamedSharding(mesh, P(None, "fsdp"))
    shape = (4, 64, 48)
    made = jax.jit(
        lambda key: draws.piece(key, 1000, shape),
        in_shardings=whole,
        out_shardings=split,
    )
    compiled = made.lower(jax.random.key(5)).compile()
    assert not any(
        kind in compiled.as_text()
        for kind in ("all-gather", "all-to-all", "collective-permute")
    )
    # Making a number takes about nine words beside it; so many for every number of the whole would be 432 KiB.
    whole_bytes = 4 * 4 * 64 * 48
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * whole_bytes
    np.testing.assert_array_equal(
        compiled(jax.random.key(5)), draws.piece(jax.random.key(5), 1000, shape)
    )
