"""Bradley–Terry maximum likelihood against a general optimiser, and the conditions for its existence."""

import dataclasses

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from gvjax.tabular import bradley_terry

UNIFORM = np.full(6, -np.log(6))


def wins_only(pairs):
    first, second = np.array(pairs).T
    won = np.ones(len(pairs))
    return bradley_terry.Comparisons(first, second, won, np.zeros(len(pairs)))


def test_population_counts_every_ordered_pair():
    rewards = np.array([0.0, 1.0, -2.0])
    sampler = np.log([0.2, 0.5, 0.3])
    data = bradley_terry.population(rewards, sampler)
    for i, j, wins, losses in zip(data.first, data.second, data.wins, data.losses):
        drawn = 2 * np.exp(sampler[i] + sampler[j])
        np.testing.assert_allclose(wins, drawn * expit(rewards[i] - rewards[j]))
        np.testing.assert_allclose(wins + losses, drawn)


def test_a_sample_converges_to_its_population():
    rewards = np.array([0.0, 1.0, -1.0, 0.5, 0.2, -0.3])
    rng = np.random.default_rng(0)
    data = bradley_terry.sample(rng, rewards, UNIFORM, 200_000)
    expected = bradley_terry.population(rewards, UNIFORM)
    assert data.wins.sum() + data.losses.sum() == 200_000
    scale = 200_000 / (expected.wins + expected.losses).sum()
    standard_error = np.sqrt(expected.wins * scale)
    assert np.all(np.abs(data.wins - scale * expected.wins) < 5 * standard_error)


def test_the_population_gives_the_rewards_back():
    rewards = np.array([0.0, 1.0, -2.0, 0.5, 3.0, -0.7])
    fitted = bradley_terry.fit(np.eye(6), bradley_terry.population(rewards, UNIFORM))
    np.testing.assert_allclose(fitted, rewards - rewards.mean(), atol=1e-11)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_fit_is_the_maximum_a_general_optimiser_finds(ridge):
    rng = np.random.default_rng(1)
    features = rng.standard_normal((6, 2))
    data = bradley_terry.sample(rng, rng.standard_normal(6), UNIFORM, 300)

    def loss(weights):
        fit = bradley_terry.negative_log_likelihood(features @ weights, data)
        return fit + 0.5 * ridge * weights @ weights

    fitted = bradley_terry.fit(features, data, ridge=ridge)
    found = minimize(loss, np.zeros(2), tol=1e-10)
    np.testing.assert_allclose(fitted, found.x, atol=1e-5)
    assert loss(fitted) <= found.fun + 1e-14


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_what_no_comparison_touches_stays_at_0(ridge):
    features = np.array([[1.0, 2.0], [1.0, 2.0], [0.0, 5.0]])
    alike = wins_only([(0, 1)])
    np.testing.assert_array_equal(
        bradley_terry.fit(features, alike, ridge=ridge), [0.0, 0.0]
    )
    none = dataclasses.replace(alike, wins=np.zeros(1))
    np.testing.assert_array_equal(
        bradley_terry.fit(features, none, ridge=ridge), [0.0, 0.0]
    )


def test_negative_log_likelihood_by_hand():
    data = bradley_terry.Comparisons(
        np.array([0]), np.array([1]), np.array([3.0]), np.array([1.0])
    )
    value = bradley_terry.negative_log_likelihood(np.array([1.0, 0.0]), data)
    expected = -(3 * np.log(expit(1.0)) + np.log(expit(-1.0))) / 4
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_connectedness_decides_whether_a_maximum_exists():
    cycle = wins_only([(0, 1), (1, 2), (2, 0)])
    chain = wins_only([(0, 1), (1, 2), (0, 2)])
    assert bradley_terry.strongly_connected(3, cycle)
    np.testing.assert_allclose(bradley_terry.fit(np.eye(3), cycle), 0.0, atol=1e-12)
    assert not bradley_terry.strongly_connected(3, chain)
    with pytest.raises(ValueError, match="add a ridge"):
        bradley_terry.fit(np.eye(3), chain)
    ridged = bradley_terry.fit(np.eye(3), chain, ridge=0.01)
    assert ridged[0] > ridged[1] > ridged[2]


def test_a_maximum_at_infinity_is_refused_though_other_directions_are_fitted():
    data = wins_only([(0, 1), (1, 0), (2, 0), (2, 1)])
    with pytest.raises(ValueError, match="do not identify"):
        bradley_terry.fit(np.eye(3), data)


def test_separable_in_features():
    chain = wins_only([(0, 1), (1, 2)])
    features = np.array([[2.0], [1.0], [0.0]])
    assert bradley_terry.separable(features, chain)
    mixed = dataclasses.replace(chain, losses=np.array([0.0, 1.0]))
    assert not bradley_terry.separable(features, mixed)
    assert not bradley_terry.separable(np.zeros((3, 1)), chain)
    assert not bradley_terry.separable(features, wins_only([(0, 1), (1, 0)]))
