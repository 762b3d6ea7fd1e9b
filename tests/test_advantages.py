"""Advantages by hand, against a slow loop, and what they must not depend on."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from gvjax import advantages


class GroupTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_leave_one_out_by_hand(self):
        rewards = jnp.array([1.0, 0.0, 0.0, 5.0, 5.0, 8.0])
        result = self.variant(lambda r: advantages.leave_one_out(r, 3))(rewards)
        expected = [1 - 0, 0 - 0.5, 0 - 0.5, 5 - 6.5, 5 - 6.5, 8 - 5]
        np.testing.assert_allclose(result, expected, rtol=1e-6)

    def test_group_relative_by_hand(self):
        rewards = jnp.array([1.0, 0.0, 0.0, 1.0])
        deviation = np.sqrt(4 * 0.25 / 3)
        expected = np.array([0.5, -0.5, -0.5, 0.5])
        np.testing.assert_allclose(
            advantages.group_relative(rewards, 4),
            expected / (deviation + 1e-4),
            rtol=1e-6,
        )
        np.testing.assert_allclose(
            advantages.group_relative(rewards, 4, scale=False), expected, rtol=1e-6
        )

    @parameterized.parameters(2, 4, 8)
    def test_groups_sum_to_zero_and_ignore_a_prompt_constant(self, group_size):
        rng = np.random.default_rng(group_size)
        rewards = rng.normal(size=24).astype(np.float32)
        shift = np.repeat(rng.normal(size=24 // group_size), group_size) * 3
        for function in (advantages.leave_one_out, advantages.group_relative):
            result = function(jnp.asarray(rewards), group_size)
            np.testing.assert_allclose(
                result.reshape(-1, group_size).sum(1), 0.0, atol=2e-5
            )
            np.testing.assert_allclose(
                function(jnp.asarray(rewards + shift, jnp.float32), group_size),
                result,
                atol=2e-4,
            )

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(value=[0.1, 0.3, 0.7, -0.9, 2.3, 7.0], size=[3, 5, 6, 7, 8])
    def test_equal_rewards_give_zero(self, value, size):
        # The mean of these is not the number itself: it is rounded.
        rewards = jnp.full(2 * size, value)
        for estimator in (
            advantages.mean_baseline,
            lambda r: advantages.leave_one_out(r, size),
            lambda r: advantages.group_relative(r, size),
            lambda r: advantages.group_relative(r, size, scale=False),
        ):
            np.testing.assert_array_equal(self.variant(estimator)(rewards), 0.0)

    def test_mean_baseline_by_hand(self):
        result = advantages.mean_baseline(jnp.array([1.0, 0.0, 5.0]))
        np.testing.assert_allclose(result, [-1.0, -2.0, 3.0], rtol=1e-6)
        np.testing.assert_array_equal(advantages.mean_baseline(jnp.ones(1)), 0.0)

    def test_bad_groups_are_refused(self):
        with pytest.raises(ValueError, match="group_size is 1"):
            advantages.leave_one_out(jnp.ones(4), 1)
        with pytest.raises(ValueError, match="5 rewards are not divisible"):
            advantages.group_relative(jnp.ones(5), 2)


def _slow_gae(rewards, values, mask, gamma, lam):
    result = np.zeros_like(rewards)
    for b in range(len(rewards)):
        steps = np.flatnonzero(mask[b])
        running, next_value = 0.0, 0.0
        for t in steps[::-1]:
            delta = rewards[b, t] + gamma * next_value - values[b, t]
            running = delta + gamma * lam * running
            result[b, t], next_value = running, values[b, t]
    return result


class GaeTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(gamma=[1.0, 0.9], lam=[0.0, 0.95, 1.0])
    def test_against_a_loop(self, gamma, lam):
        rng = np.random.default_rng(int(10 * gamma + lam))
        shape = (6, 9)
        rewards, values = rng.normal(size=(2, *shape)).astype(np.float32)
        lengths = rng.integers(0, 7, 6)
        mask = (np.arange(9) >= 2) & (np.arange(9) < 2 + lengths[:, None])
        result, returns = self.variant(
            lambda *args: advantages.gae(*args, gamma=gamma, lam=lam)
        )(rewards, values, mask)
        expected = _slow_gae(rewards, values, mask, gamma, lam)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            returns, np.where(mask, expected + values, 0), rtol=1e-5, atol=1e-5
        )
        poison = np.where(mask, values, np.nan).astype(np.float32)
        again, _ = self.variant(
            lambda *args: advantages.gae(*args, gamma=gamma, lam=lam)
        )(rewards, poison, mask)
        np.testing.assert_array_equal(result, again)

    def test_undiscounted_returns_are_rewards_to_go(self):
        rewards = jnp.array([[0.0, 1.0, 2.0]])
        mask = jnp.ones((1, 3), bool)
        _, returns = advantages.gae(
            rewards, jnp.zeros((1, 3)), mask, gamma=1.0, lam=1.0
        )
        np.testing.assert_allclose(returns, [[3.0, 3.0, 2.0]])

    def test_impossible_discounts_are_refused(self):
        with pytest.raises(ValueError, match=r"gamma is 1\.5"):
            advantages.gae(
                jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.ones((1, 1), bool), gamma=1.5
            )
