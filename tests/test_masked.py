"""Masked sums against numpy.ma, and what must not leak from behind a mask."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from gvjax import masked


def _case(seed: int, shape: tuple[int, ...] = (5, 7)):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape).astype(np.float32)
    mask = rng.random(shape) < 0.6
    return values, mask, np.ma.array(values, mask=~mask, dtype=np.float64)


class MaskedTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(name=["sum", "mean", "std"], axis=[None, 0, 1], seed=[0, 1])
    def test_agrees_with_numpy_ma(self, name, axis, seed):
        values, mask, truth = _case(seed)
        ours = self.variant(lambda v, m: getattr(masked, name)(v, m, axis))
        np.testing.assert_allclose(
            ours(values, mask),
            np.ma.filled(getattr(truth, name)(axis=axis), 0.0),
            rtol=2e-6,
            atol=2e-6,
        )

    def test_sample_standard_deviation(self):
        values, mask, truth = _case(3)
        np.testing.assert_allclose(
            masked.std(values, mask, ddof=1), truth.std(ddof=1), rtol=1e-5
        )

    @parameterized.parameters("sum", "mean", "std")
    def test_nothing_behind_the_mask_is_seen(self, name):
        values, mask, _ = _case(2)
        function = getattr(masked, name)
        poisoned = np.where(mask, values, np.inf)
        poisoned[~mask & (np.arange(values.size).reshape(values.shape) % 2 == 0)] = (
            np.nan
        )
        np.testing.assert_array_equal(function(values, mask), function(poisoned, mask))
        gradient = jax.grad(lambda v: function(v, mask).sum())
        np.testing.assert_array_equal(gradient(values), gradient(jnp.asarray(poisoned)))

    @parameterized.parameters("sum", "mean", "std")
    def test_an_empty_mask_gives_zero_and_no_gradient(self, name):
        values, mask = jnp.ones((2, 3)), jnp.zeros((2, 3), bool)
        function = getattr(masked, name)
        np.testing.assert_array_equal(function(values, mask), 0.0)
        np.testing.assert_array_equal(
            jax.grad(lambda v: function(v, mask))(values), 0.0
        )

    def test_equal_values_whiten_to_0(self):
        for value in (-0.9, 0.1, 0.7):
            for rows in (13, 48, 100):
                values = jnp.full((rows, 6), value)
                mask = jnp.broadcast_to(jnp.arange(6) < 5, (rows, 6))
                whitened = jax.jit(masked.whiten)(values, mask)
                np.testing.assert_array_equal(whitened, 0.0)

    def test_whiten_by_hand(self):
        values = jnp.array([1.0, 2.0, 3.0, 99.0])
        mask = jnp.array([True, True, True, False])
        scale = np.sqrt(2 / 3)
        np.testing.assert_allclose(
            masked.whiten(values, mask), [-1 / scale, 0, 1 / scale, 0], rtol=1e-6
        )
        np.testing.assert_allclose(
            masked.whiten(values, mask, shift_mean=False),
            [2 - 1 / scale, 2, 2 + 1 / scale, 0],
            rtol=1e-6,
        )


class MeanTest(chex.TestCase):
    def test_parts_add_to_the_whole(self):
        values, mask, truth = _case(4)
        parts = [masked.weighted_mean(values[i], mask[i]) for i in range(len(values))]
        whole = sum(parts[1:], start=parts[0])
        np.testing.assert_allclose(whole.value, truth.mean(), rtol=1e-6)
        stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *parts)
        np.testing.assert_allclose(stacked.merged().value, truth.mean(), rtol=1e-6)

    def test_weight_zero_is_zero(self):
        empty = masked.Mean(jnp.array(jnp.nan), jnp.array(0.0))
        self.assertEqual(float(empty.value), 0.0)

    def test_extremes_merge(self):
        parts = jnp.array([3.0, -1.0, 2.0])
        self.assertEqual(float(masked.Max(parts).merged().value), 3.0)
        self.assertEqual(float(masked.Min(parts).merged().value), -1.0)


def test_a_mask_that_is_not_boolean_is_refused():
    with pytest.raises(AssertionError, match="bool"):
        masked.sum(jnp.ones(3), jnp.ones(3))
