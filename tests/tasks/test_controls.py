"""LCS, Plan and Name: hand values and what makes each a control."""

import itertools

import numpy as np
import pytest

from gvjax.tasks.lcs import Lcs, _longest_common_subsequence
from gvjax.tasks.name import Name
from gvjax.tasks.plan import Plan
from gvjax.tasks.task import Completions, Prompts
from gvjax.tasks.tour import Tour


def one(cls, tokens):
    return cls(np.array([tokens], int).reshape(1, -1), np.array([len(tokens)]))


def reward_of(task, prompt, tokens) -> float:
    return float(task.reward(one(Prompts, prompt), one(Completions, tokens))[0])


@pytest.mark.parametrize(
    ("a", "b", "length"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 4),
        ([1, 2, 3, 4], [4, 3, 2, 1], 1),
        ([1, 9, 2, 9], [1, 2, 5, 6], 2),
        ([1, 1, 1, 1], [1, 2, 1, 2], 2),
        ([-1, -1, -1, -1], [1, 2, 1, 2], 0),
    ],
)
def test_longest_common_subsequence_by_hand(a, b, length):
    assert _longest_common_subsequence(np.array([a]), np.array([b])) == [length]


def test_longest_common_subsequence_against_enumeration():
    rng = np.random.default_rng(0)
    a, b = rng.integers(3, size=(2, 40, 5))

    def subsequences(row):
        picks = (itertools.combinations(row, n) for n in range(6))
        return set(itertools.chain(*picks))

    expected = [
        max(map(len, subsequences(x) & subsequences(y)))
        for x, y in zip(a.tolist(), b.tolist())
    ]
    np.testing.assert_array_equal(_longest_common_subsequence(a, b), expected)


def test_lcs_references_are_walks_that_the_prompt_and_seed_decide():
    task = Lcs(seed=1)
    prompts = task.prompts(np.random.default_rng(0), 2000, "train")
    walks = task.reference(prompts)
    assert Tour(seed=1, dwell=False).valid_moves(prompts, walks).all()
    swapped = Prompts(prompts.tokens[:, [0, 2, 1, 3]], prompts.lengths)
    assert (task.reference(swapped) == walks).all(axis=1).mean() < 0.01
    other = Lcs(seed=2)
    other.__dict__["successors"] = task.successors
    assert (other.reference(prompts) == walks).all(axis=1).mean() < 0.01
    # All of a node's edges are taken equally often.
    first = task.successors[prompts.tokens[:, 0]] == walks[:, :1]
    np.testing.assert_allclose(first.mean(axis=0), 1 / 3, atol=0.04)


def test_lcs_gold_by_hand():
    task = Lcs()
    prompts = one(Prompts, [0, 1, 2, 3])
    walk = task.reference(prompts)[0].tolist()
    assert reward_of(task, [0, 1, 2, 3], walk) == 1.0
    assert reward_of(task, [0, 1, 2, 3], [*walk, 1, 1]) == 1.0
    assert reward_of(task, [0, 1, 2, 3], walk[:4]) == pytest.approx(2 * 4 / (4 + 10))
    assert reward_of(task, [0, 1, 2, 3], [-5, *walk[:9]]) == pytest.approx(9 / 10)
    assert reward_of(task, [0, 1, 2, 3], []) == 0.0
    costly = Lcs(eos=True, token_cost=0.01)
    assert reward_of(costly, [0, 1, 2, 3], [*walk[:4], 21]) == pytest.approx(
        2 * 4 / 14 - 0.04
    )


@pytest.mark.parametrize("token_cost", [0.0, 0.04, 0.07, 1.0])
def test_lcs_optimum_with_eos_is_the_best_beginning_of_the_reference(token_cost):
    task = Lcs(eos=True, token_cost=token_cost)
    prompts = task.prompts(np.random.default_rng(0), 5, "train")
    walks = task.reference(prompts)
    rewards = [
        task.reward(prompts, Completions(walks, np.full(5, length)))
        for length in range(11)
    ]
    np.testing.assert_allclose(task.optimum(prompts), np.max(rewards, axis=0))


def test_plan_has_1024_prompts_and_the_ids_of_its_docstring():
    task = Plan()
    assert task.num_classes * task.num_symbols**2 == 1024
    assert (task.first_plan, task.first_content, task.pad_id) == (20, 148, 180)
    prompts = task.prompts(np.random.default_rng(0), 20000, "train")
    low, high = prompts.tokens.min(axis=0), prompts.tokens.max(axis=0)
    assert low.tolist() == [0, 4, 4]
    assert high.tolist() == [3, 19, 19]


def test_plan_content_follows_from_the_plan():
    task = Plan(seed=2)
    prompts = task.prompts(np.random.default_rng(0), 2000, "train")
    tokens = task.demonstrations(np.random.default_rng(1), prompts).tokens
    plans = tokens[:, 0] - task.first_plan
    assert set(plans.tolist()) == set(range(128))
    np.testing.assert_array_equal(
        tokens[:, 1:] - task.first_content, task.content[plans]
    )


def test_plan_gold_by_hand():
    task = Plan(seed=1)
    w, content = task.weights[2], task.content
    row = [task.first_plan + 5, *(task.first_content + content[5])]
    assert reward_of(task, [2, 7, 8], row) == pytest.approx(
        sum(w[c] for c in content[5]), abs=1e-6
    )
    # The plan token itself is worth nothing, and what is not content counts as the worst.
    assert reward_of(task, [2, 7, 8], [0, *row[1:]]) == reward_of(task, [2, 7, 8], row)
    first = task.first_content
    assert reward_of(task, [2, 7, 8], [0, first + 3, -(2**31), 0]) == pytest.approx(
        w[3] + 5 * w.min(), abs=1e-6
    )
    best = [0, *[first + int(w.argmax())] * 6]
    assert reward_of(task, [2, 7, 8], best) == task.optimum(one(Prompts, [2, 7, 8]))[0]


def test_plan_short_form_is_worth_its_content():
    task, short = Plan(seed=3), Plan(seed=3, write_content=False)
    prompts = task.prompts(np.random.default_rng(0), 300, "train")
    rows = task.demonstrations(np.random.default_rng(1), prompts)
    plans = Completions(rows.tokens[:, :1], np.ones(300, int))
    np.testing.assert_allclose(
        task.reward(prompts, rows), short.reward(prompts, plans), atol=1e-6
    )
    np.testing.assert_array_equal(
        short.demonstrations(np.random.default_rng(1), prompts).tokens, plans.tokens
    )
    assert (short.optimum(prompts) < task.optimum(prompts)).all()


def test_plan_look_up_reads_the_plan_only():
    task = Plan(seed=3, lookup=True)
    table = task.plan_values
    assert table.shape == (4, 128)
    assert reward_of(task, [1, 4, 4], [task.first_plan + 9]) == np.float32(table[1, 9])
    assert reward_of(task, [1, 4, 4], []) == np.float32(table[1].min())
    assert reward_of(task, [1, 4, 4], [task.first_content]) == np.float32(
        table[1].min()
    )
    assert task.optimum(one(Prompts, [1, 4, 4]))[0] == np.float32(table[1].max())
    # No content explains it: as many unigram weights as there are tokens leave most of it.
    counts = (task.content[:, :, None] == np.arange(32)).sum(axis=1)
    residual = table[1] - counts @ np.linalg.lstsq(counts, table[1])[0]
    assert residual.var() > 0.5 * table[1].var()


@pytest.mark.parametrize("seed", range(3))
def test_plans_are_worth_0_on_average_and_spread_by_about_1(seed):
    values = Plan(seed=seed).plan_values
    np.testing.assert_allclose(values.mean(axis=1), 0, atol=1e-12)
    assert 0.8 < values.std() < 1.2


@pytest.mark.parametrize(
    ("horizon", "tokens", "gold"),
    [
        (1, [4], 1.0),
        (1, [5], 0.0),
        (1, [20], 0.0),
        (1, [5, 4], 0.0),
        (1, [], 0.0),
        (2, [4, 9], 1.0),
        (2, [4, 4], 0.5),
        (2, [4], 0.5),
        (2, [0, 9], 0.5),
        (5, [4, 9, 11, 4, 4], 1.0),
        (5, [4, 9, 9, 9, 9], 2 / 3),
    ],
)
def test_name_gold_by_hand(horizon, tokens, gold):
    assert reward_of(Name(horizon=horizon), [4, 9, 11], tokens) == pytest.approx(gold)


@pytest.mark.parametrize("skill", [0.0, 0.23, 1.0])
def test_name_demonstrations_are_as_skilled_as_they_say(skill):
    task = Name(skill=skill)
    prompts = task.prompts(np.random.default_rng(0), 20000, "train")
    rewards = task.reward(
        prompts, task.demonstrations(np.random.default_rng(1), prompts)
    )
    assert rewards.mean() == pytest.approx(skill + (1 - skill) * 3 / 20, abs=0.01)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Name, {"num_goals": 20}, "num_goals 20 is impossible with num_names 20"),
        (Name, {"horizon": 0}, "horizon is 0"),
        (Name, {"skill": -0.1}, "skill is -0.1"),
        (Plan, {"seed": -1}, "seed is -1"),
        (Plan, {"num_plans": 0}, "num_plans is 0"),
        (Plan, {"content_length": 0}, "content_length is 0"),
    ],
)
def test_impossible_options_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_decode():
    assert Plan().decode(np.array([2, 5, 20, 148, 180, 999])) == (
        "class2 symbol1 plan0 c0 <999>"
    )
    assert Name().decode(np.array([3, 20, -1])) == "3 <-1>"
