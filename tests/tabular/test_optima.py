"""Closed-form optima against numerical search and simulation."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax

from gvjax import tabular


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    tree = tabular.token_tree(3, 2, eos=0)
    reference = tabular.random_policy(rng, tree)
    rewards = rng.standard_normal(len(tree.leaves))
    return tree, reference, tabular.completion_logps(tree, reference), rewards


def test_gibbs_maximises_the_regularised_value(problem):
    _, _, ref_logps, rewards = problem
    found = minimize(
        lambda logits: (
            -tabular.regularised_value(log_softmax(logits), ref_logps, rewards, 0.4)
        ),
        np.zeros(len(rewards)),
    )
    best = tabular.gibbs(ref_logps, rewards, 0.4)
    np.testing.assert_allclose(np.exp(log_softmax(found.x)), np.exp(best), atol=1e-4)
    value = tabular.regularised_value(best, ref_logps, rewards, 0.4)
    np.testing.assert_allclose(-found.fun, value, atol=1e-8)


def test_soft_bellman_is_the_gibbs_distribution(problem):
    tree, reference, ref_logps, rewards = problem
    values, policy = tabular.soft_bellman(tree, reference, rewards, 0.4)
    best = tabular.gibbs(ref_logps, rewards, 0.4)
    np.testing.assert_allclose(tabular.completion_logps(tree, policy), best, atol=1e-12)
    value = tabular.regularised_value(best, ref_logps, rewards, 0.4)
    np.testing.assert_allclose(values[0], value, atol=1e-12)


def test_soft_bellman_takes_many_prompts_at_once(problem):
    tree, reference, _, rewards = problem
    both = np.stack([rewards, -rewards])
    values, policy = tabular.soft_bellman(tree, reference, both, 0.4)
    for prompt in range(2):
        alone = tabular.soft_bellman(tree, reference, both[prompt], 0.4)
        np.testing.assert_allclose(values[prompt], alone[0], atol=1e-12)
        np.testing.assert_allclose(policy[prompt], alone[1], atol=1e-12)


def test_best_of_n_by_enumerating_draws():
    logps = np.log([0.5, 0.2, 0.3])
    scores = np.array([1.0, 3.0, 2.0])
    expected = np.zeros(3)
    for draw in np.ndindex(3, 3, 3):
        expected[max(draw, key=lambda arm: scores[arm])] += np.exp(
            logps[list(draw)].sum()
        )
    np.testing.assert_allclose(
        np.exp(tabular.best_of_n(logps, scores, 3)), expected, atol=1e-12
    )


def test_best_of_n_refuses_ties():
    with pytest.raises(ValueError, match="ties"):
        tabular.best_of_n(np.log([0.5, 0.5]), np.array([1.0, 1.0]), 2)
