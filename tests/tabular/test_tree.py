"""Trees and policies against brute force over every completion."""

import itertools

import numpy as np
import pytest

from gvjax import tabular

TREES = [(3, 3, None), (3, 3, 0), (2, 4, 1), (4, 1, 2), (5, 1, None)]


def random(tree, seed, *prompts):
    return tabular.random_policy(np.random.default_rng(seed), tree, *prompts)


@pytest.mark.parametrize(("vocabulary", "horizon", "eos"), TREES)
def test_leaves_are_every_completion_once(vocabulary, horizon, eos):
    tree = tabular.token_tree(vocabulary, horizon, eos)
    expected = set()
    for tokens in itertools.product(range(vocabulary), repeat=horizon):
        end = tokens.index(eos) + 1 if eos in tokens else horizon
        expected.add(tokens[:end])
    assert len(tree.leaves) == len(expected)
    assert set(tree.leaves) == expected
    for row, leaf in enumerate(tree.leaves):
        assert tuple(tree.tokens[row][tree.mask[row]]) == leaf
        walked = [tree.states[state] for state in tree.paths[row][tree.mask[row]]]
        assert walked == [leaf[:depth] for depth in range(len(leaf))]


def test_a_truncated_completion_is_a_leaf():
    tree = tabular.token_tree(vocabulary=2, horizon=2, eos=0)
    assert set(tree.leaves) == {(0,), (1, 0), (1, 1)}
    assert sorted(tree.lengths) == [1, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 3), "vocabulary 1"),
        ((3, 0), "horizon 0"),
        ((3, 2, 3), "eos 3"),
        ((10, 7), "too many"),
    ],
)
def test_impossible_trees_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tabular.token_tree(*arguments)


@pytest.mark.parametrize(("vocabulary", "horizon", "eos"), TREES)
def test_completion_logps_are_products_and_sum_to_one(vocabulary, horizon, eos):
    tree = tabular.token_tree(vocabulary, horizon, eos)
    policy = random(tree, 0, 2)
    logps = tabular.completion_logps(tree, policy)
    state = {prefix: index for index, prefix in enumerate(tree.states)}
    for prompt in range(2):
        for row, leaf in enumerate(tree.leaves):
            product = np.prod(
                [
                    np.exp(policy[prompt, state[leaf[:depth]], token])
                    for depth, token in enumerate(leaf)
                ]
            )
            np.testing.assert_allclose(np.exp(logps[prompt, row]), product, rtol=1e-12)
    np.testing.assert_allclose(np.exp(logps).sum(axis=-1), 1.0, rtol=1e-12)


@pytest.mark.parametrize(("vocabulary", "horizon", "eos"), TREES)
def test_conditionals_invert_completion_logps(vocabulary, horizon, eos):
    tree = tabular.token_tree(vocabulary, horizon, eos)
    policy = random(tree, 1, 3)
    logps = tabular.completion_logps(tree, policy)
    np.testing.assert_allclose(tabular.conditionals(tree, logps), policy, atol=1e-12)
    single = tabular.conditionals(tree, logps[1])
    np.testing.assert_allclose(single, policy[1], atol=1e-12)


def test_a_state_that_is_never_reached_has_no_conditionals():
    tree = tabular.token_tree(3, 2, eos=0)
    probabilities = np.array([float(leaf[0] == 0) for leaf in tree.leaves])
    probabilities[tree.leaves.index((1, 2))] = 1.0
    with np.errstate(divide="ignore"):
        logps = np.log(probabilities / probabilities.sum())
    with pytest.raises(ValueError, match=r"begins with \(2,\) has a probability above"):
        tabular.conditionals(tree, logps)
    # A completion that never comes is no obstacle in a state that does.
    logps[tree.leaves.index((2, 1))] = np.log(0.5)
    policy = tabular.conditionals(tree, logps)
    assert policy[tree.states.index((2,)), 0] == -np.inf


def test_divergences_by_hand():
    half, skew = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    np.testing.assert_allclose(tabular.kl(half, skew), 0.5 * np.log(4 / 3), rtol=1e-12)
    np.testing.assert_allclose(tabular.entropy(half), np.log(2), rtol=1e-12)
    np.testing.assert_allclose(tabular.total_variation(half, skew), 0.25, rtol=1e-12)
    np.testing.assert_allclose(
        tabular.expectation(skew, np.array([4.0, 0.0])), 1.0, rtol=1e-12
    )


def test_impossible_completions_count_nothing():
    with np.errstate(divide="ignore"):
        certain = np.log([1.0, 0.0])
    assert tabular.entropy(certain) == 0.0
    np.testing.assert_allclose(tabular.kl(certain, np.log([0.5, 0.5])), np.log(2))


def test_policy_gradient_is_the_derivative_of_the_expected_reward():
    tree = tabular.token_tree(3, 2, eos=0)
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((len(tree.states), tree.vocabulary))
    rewards = rng.standard_normal(len(tree.leaves))

    def value(logits):
        policy = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return tabular.expectation(tabular.completion_logps(tree, policy), rewards)

    numeric = np.zeros_like(logits)
    for index in np.ndindex(*logits.shape):
        bump = np.zeros_like(logits)
        bump[index] = 1e-5
        numeric[index] = (value(logits + bump) - value(logits - bump)) / 2e-5
    policy = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    exact = tabular.policy_gradient(tree, policy, rewards)
    np.testing.assert_allclose(exact, numeric, atol=1e-9)


def test_action_values_are_conditional_means():
    tree = tabular.token_tree(2, 3, eos=1)
    policy = random(tree, 3)
    rewards = np.random.default_rng(3).standard_normal(len(tree.leaves))
    probabilities = np.exp(tabular.completion_logps(tree, policy))
    q, v = tabular.action_values(tree, policy, rewards)
    for index, prefix in enumerate(tree.states):
        below = np.array([leaf[: len(prefix)] == prefix for leaf in tree.leaves])
        mean = (probabilities * rewards)[below].sum() / probabilities[below].sum()
        np.testing.assert_allclose(v[index], mean, atol=1e-12)
        for token in range(tree.vocabulary):
            start = (*prefix, token)
            below = np.array([leaf[: len(start)] == start for leaf in tree.leaves])
            mean = (probabilities * rewards)[below].sum() / probabilities[below].sum()
            np.testing.assert_allclose(q[index, token], mean, atol=1e-12)
