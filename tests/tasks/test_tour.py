"""Tour and its twins: hand values on a small graph, and the optimum against brute force."""

import itertools
import time

import numpy as np
import pytest

from gvjax.tasks.hidden_goals import HiddenGoals
from gvjax.tasks.task import Completions, Prompts
from gvjax.tasks.tour import Tour


def ring(**options) -> Tour:
    """Five nodes, edges i -> i + 1 and i -> i + 2, two goals, four steps."""
    task = Tour(num_nodes=5, degree=2, num_goals=2, horizon=4, **options)
    nodes = np.arange(5)
    task.__dict__["successors"] = np.stack([nodes + 1, nodes + 2], axis=1) % 5
    return task


def reward_of(task, prompt, nodes) -> float:
    prompts = Prompts(np.array([prompt]), np.array([len(prompt)]))
    completions = Completions(
        np.array([nodes], int).reshape(1, -1), np.array([len(nodes)])
    )
    return float(task.reward(prompts, completions)[0])


@pytest.mark.parametrize(
    ("nodes", "gold"),
    [
        ([1, 2, 3, 4], 1.0),
        ([1, 3, 4, 0], 1 / 2),
        ([2, 2, 4, 0], 1.0),
        ([2, 2, 2, 4], 1 - 1 / 4),
        ([2, 2, 4, 4], 1.0),
        ([1, 1, 2, 3], 1 / 2 - 1 / 4),
        ([0, 2, 3, 4], 1 - 1 / 4),
        ([4, 0, 2, 3], 1 - 1 / 4),
        ([4, 3, 2, 1], 1 - 4 / 4),
        ([2, 9, 4, 0], 1 - 2 / 4),
        ([2, 4], 1 - 2 / 4),
        ([], -4 / 4),
        ([1, 3, 0, 1, 2, 4], 0.0),
    ],
    ids=str,
)
def test_gold_by_hand(nodes, gold):
    assert reward_of(ring(), [0, 2, 4], nodes) == pytest.approx(gold)


def test_without_dwell_no_stay_is_valid():
    task = ring(dwell=False)
    assert reward_of(task, [0, 2, 4], [2, 2, 4, 0]) == pytest.approx(1 - 1 / 4)


@pytest.mark.parametrize(
    ("tokens", "gold"),
    [
        ([2, 4, 6], 1 - 2 * 0.1),
        ([2, 6, 4], 1 / 2 - 1 * 0.1),
        ([6], 0.0),
        ([], 0.0),
        ([2, 2, 4], 1 - 3 * 0.1),
        ([3, 4, 6], 1 / 2 - 1 / 4 - 2 * 0.1),
        ([2, 4, 0, 1, 2], 1 - 4 * 0.1),
    ],
    ids=str,
)
def test_gold_with_eos_by_hand(tokens, gold):
    task = ring(eos=True, token_cost=0.1)
    assert task.eos_id == 6
    assert reward_of(task, [0, 2, 4], tokens) == pytest.approx(gold)


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("make", [Tour, HiddenGoals])
@pytest.mark.parametrize("seed", range(3))
def test_optimum_is_what_brute_force_finds(make, seed, eos):
    task = make(
        seed=seed,
        num_nodes=6,
        degree=1 + seed % 2,
        num_goals=2,
        horizon=3,
        eos=eos,
        token_cost=0.1,
    )
    prompts = task.prompts(np.random.default_rng(seed), 6, "train")
    tokens = np.array(list(itertools.product(range(6), repeat=3)))
    best = np.full(6, -np.inf)
    for length in range(4) if eos else [3]:
        completions = Completions(tokens, np.full(len(tokens), length))
        for row in range(6):
            same = prompts.take([row]).repeat(len(tokens))
            best[row] = max(best[row], task.reward(same, completions).max())
    np.testing.assert_allclose(task.optimum(prompts), best, atol=1e-6)
    assert len(np.unique(best)) > 1


def test_an_invalid_shortcut_can_be_worth_its_price():
    # One goal next door, one four moves away: jumping costs 1/4 and earns 1/2.
    task = Tour(num_nodes=8, degree=1, num_goals=2, horizon=4)
    task.__dict__["successors"] = (np.arange(8)[:, None] + 1) % 8
    prompts = Prompts(np.array([[0, 1, 7]]), np.array([3]))
    assert task.optimum(prompts)[0] == pytest.approx(1 - 1 / 4)


@pytest.mark.parametrize("seed", range(5))
def test_graph_has_its_degree_and_is_strongly_connected(seed):
    task = Tour(seed=seed)
    assert task.successors.shape == (20, 3)
    assert all(len(set(row)) == 3 for row in task.successors.tolist())
    assert (task.successors != np.arange(20)[:, None]).all()
    assert task.distances.max() < 20
    assert (task.successors != Tour(seed=seed + 1).successors).any()


def test_distances_on_the_ring():
    np.testing.assert_array_equal(ring().distances[0], [0, 1, 1, 2, 2])


def test_start_and_goals_are_distinct_and_cover_all_nodes():
    prompts = Tour().prompts(np.random.default_rng(0), 2000, "train")
    assert (np.diff(np.sort(prompts.tokens, axis=1), axis=1) > 0).all()
    for column in prompts.tokens.T:
        assert len(np.unique(column)) == 20


@pytest.mark.parametrize("horizon", [1, 2])
def test_short_forms_have_one_goal_in_reach(horizon):
    task = Tour(horizon=horizon, goal_within=horizon)
    prompts = task.prompts(np.random.default_rng(0), 300, "test")
    steps = task.distances[prompts.tokens[:, :1], prompts.tokens[:, 1:]]
    assert ((steps <= horizon).sum(axis=1) == 1).all()
    np.testing.assert_allclose(task.optimum(prompts), 1 / 3, atol=1e-6)


def test_demonstrations_without_noise_make_no_invalid_move_and_dwell():
    task = Tour(noise=0.0)
    prompts = task.prompts(np.random.default_rng(0), 500, "train")
    walks = task.demonstrations(np.random.default_rng(1), prompts)
    assert task.valid_moves(prompts, walks.tokens).all()
    goals = prompts.tokens[:, 1:]
    on_goal = (walks.tokens[:, 0, None] == goals).any(axis=1)
    assert on_goal.any()
    stays = walks.tokens[:, 0] == walks.tokens[:, 1]
    np.testing.assert_array_equal(stays, on_goal)


def test_noise_is_the_share_of_random_tokens():
    task = Tour(noise=0.2, dwell=False)
    prompts = task.prompts(np.random.default_rng(0), 4000, "train")
    walks = task.demonstrations(np.random.default_rng(1), prompts)
    invalid = 1 - task.valid_moves(prompts, walks.tokens).mean()
    # A random node is a successor with probability 3/20.
    assert invalid == pytest.approx(0.2 * (1 - 3 / 20), abs=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_demonstrations_earn_what_the_study_is_built_on(seed):
    task = Tour(seed=seed)
    prompts = task.prompts(np.random.default_rng(0), 3000, "train")
    walks = task.demonstrations(np.random.default_rng(1), prompts)
    assert 0.33 < task.reward(prompts, walks).mean() < 0.38
    assert task.optimum(prompts).mean() > 0.995


def test_hidden_goals_depend_on_the_whole_prompt_and_the_seed():
    task = HiddenGoals()
    prompts = task.prompts(np.random.default_rng(0), 3000, "train")
    hidden = task.counted_goals(prompts)
    assert hidden.shape == (3000, 3)
    assert (np.diff(np.sort(hidden, axis=1), axis=1) > 0).all()
    assert (hidden != prompts.tokens[:, :1]).all()
    # Hidden and shown goals are unrelated: a node of the other 19 is shown with probability 3/19.
    shown = (hidden[:, :, None] == prompts.tokens[:, None, 1:]).any(axis=2).mean()
    assert shown == pytest.approx(3 / 19, abs=0.02)
    swapped = Prompts(prompts.tokens[:, [0, 2, 1, 3]], prompts.lengths)
    for other in (
        task.counted_goals(swapped),
        HiddenGoals(seed=1).counted_goals(prompts),
    ):
        same = (np.sort(hidden, axis=1) == np.sort(other, axis=1)).all(axis=1)
        assert same.mean() < 0.01


def test_hidden_goals_share_everything_but_the_reward_with_tour():
    task, twin = Tour(seed=4), HiddenGoals(seed=4)
    np.testing.assert_array_equal(task.successors, twin.successors)
    rows = []
    for each in (task, twin):
        rng = np.random.default_rng(0)
        prompts = each.prompts(rng, 50, "train")
        rows.append((prompts.tokens, each.demonstrations(rng, prompts).tokens))
    for a, b in zip(*rows):
        np.testing.assert_array_equal(a, b)


def test_rewards_of_100k_rows_take_well_under_a_second():
    task = Tour()
    rng = np.random.default_rng(0)
    prompts = task.prompts(rng, 1000, "train").repeat(100)
    walks = task.demonstrations(rng, prompts)
    start = time.process_time()
    task.reward(prompts, walks)
    assert time.process_time() - start < 1.0


def test_decode():
    assert Tour(eos=True).decode(np.array([3, 19, 21, 20, 77])) == "3 19 <eos> <77>"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degree": 20}, "degree 20 is impossible with num_nodes 20; use 1 to 19"),
        ({"num_goals": 0}, "num_goals 0"),
        ({"num_goals": 20}, "use 1 to 10"),
        ({"horizon": 0}, "horizon is 0"),
        ({"noise": 1.5}, "noise is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"goal_within": 0}, "goal_within is 0"),
        ({"token_cost": -1}, "token_cost is -1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Tour(**options)
