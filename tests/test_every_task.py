"""One battery over every task: a new task gets all of it for one line in TASKS."""

import numpy as np
import pytest

from gvjax import tasks
from gvjax.tasks.task import (
    Completions,
    split_of,
)

TASKS = {
    "tour": {},
    "tour without dwell": {"dwell": False},
    "tour with eos": {"eos": True},
    "tour H=1": {"horizon": 1, "goal_within": 1},
    "tour H=2": {"horizon": 2, "goal_within": 2},
    "hidden_goals": {},
    "lcs": {},
    "lcs with eos": {"eos": True},
    "plan": {},
    "plan H=1": {"write_content": False},
    "plan look-up": {"lookup": True},
    "lengths": {},
    "name": {},
    "name H=2": {"horizon": 2},
    "countdown": {"count": 1500},
    "sort": {"count": 1500},
    "reverse": {"count": 1500},
}
"""Short name (what follows it is for people), and options."""
SPLITS = ("train", "validation", "test")


def load(case, seed):
    return tasks.load(case.split()[0], seed=seed, **TASKS[case])


@pytest.fixture(params=TASKS, scope="module")
def make(request):
    return lambda seed: load(request.param, seed)


@pytest.fixture(scope="module")
def task(make):
    return make(3)


def draw(task, count=64, split="train", seed=0):
    """Prompts with one demonstration each."""
    rng = np.random.default_rng(seed)
    prompts = task.prompts(rng, count, split)
    return prompts, task.demonstrations(rng, prompts)


def random_completions(task, count, seed=0):
    """Uniform tokens over the whole vocabulary, of the full length."""
    rng = np.random.default_rng(seed)
    width = task.max_completion_length
    tokens = rng.integers(task.vocab_size, size=(count, width))
    return Completions(tokens, np.full(count, width))


def hostile_completions(task, count):
    """Completions that no sane policy writes, by name."""
    width = task.max_completion_length
    full = np.full(count, width)
    rng = np.random.default_rng(5)
    garbage = rng.integers(-(2**31), 2**31 - 1, size=(count, width))
    wide = rng.integers(task.vocab_size, size=(count, 20 * width))
    yield "no columns", Completions(np.zeros((count, 0), np.int32), 0 * full)
    yield "empty", Completions(np.full((count, width), task.pad_id), 0 * full)
    yield "all pad", Completions(np.full((count, width), task.pad_id), full)
    yield "garbage ids", Completions(garbage, full)
    yield "first id past the end", Completions(garbage * 0 + task.vocab_size, full)
    yield "minus one", Completions(garbage * 0 - 1, full)
    yield "very long", Completions(wide, 20 * full)
    yield "one token", Completions(wide[:, :1], np.minimum(full, 1))
    if task.eos_id is not None:
        yield "only eos", Completions(garbage * 0 + task.eos_id, full)


def test_shapes_types_and_ranges(task):
    prompts, demonstrations = draw(task)
    for rows, width in (
        (prompts, task.max_prompt_length),
        (demonstrations, task.max_completion_length),
    ):
        assert rows.tokens.dtype == rows.lengths.dtype == np.int32
        assert rows.tokens.shape == (64, width)
        assert rows.lengths.min() >= 1
        inside = np.arange(width) < rows.lengths[:, None]
        assert (rows.tokens[~inside] == task.pad_id).all()
        assert (rows.tokens[inside] != task.pad_id).all()
        assert 0 <= rows.tokens.min() <= rows.tokens.max() < task.vocab_size
    assert prompts.lengths.min() >= getattr(task, "min_prompt_length", 0)
    if task.eos_id is None:
        assert (demonstrations.lengths == task.max_completion_length).all()
    else:
        ends = demonstrations.tokens == task.eos_id
        assert (ends.sum(axis=1) == 1).all()
        assert (ends.argmax(axis=1) == demonstrations.lengths - 1).all()
    rewards = task.reward(prompts, demonstrations)
    assert rewards.dtype == np.float32
    assert rewards.shape == (64,)


def test_no_prompts_are_no_error(task):
    prompts, demonstrations = draw(task, count=0)
    assert task.reward(prompts, demonstrations).shape == (0,)


def test_same_seed_same_rows(make):
    one, other = make(3), make(3)
    first, second = draw(one), draw(other)
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(one.reward(*first), other.reward(*second))


def test_another_rng_other_prompts(task):
    assert (draw(task)[0].tokens != draw(task, seed=1)[0].tokens).any()


def test_splits_are_disjoint(task):
    seen = {}
    for number, split in enumerate(SPLITS):
        prompts = task.prompts(np.random.default_rng(number), 400, split)
        assert (split_of(prompts) == split).all()
        seen[split] = {tuple(row) for row in prompts.tokens.tolist()}
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]


def test_distinct_prompts_are_distinct_or_refused(task):
    rng = np.random.default_rng(0)
    prompts = task.prompts(rng, 50, "validation", distinct=True)
    assert len({tuple(row) for row in prompts.tokens.tolist()}) == 50


def test_unknown_split_is_refused(task):
    with pytest.raises(ValueError, match="'held-out' is unknown; use one of train"):
        task.prompts(np.random.default_rng(0), 1, "held-out")


def test_demonstrations_beat_random_tokens(task):
    prompts, demonstrations = draw(task, count=500)
    random = task.reward(prompts, random_completions(task, 500))
    assert task.reward(prompts, demonstrations).mean() > random.mean() + 0.02


def test_rewards_stay_in_range_and_below_the_optimum(task):
    prompts, demonstrations = draw(task, count=500)
    low, high = task.reward_range
    assert low < high
    best = task.optimum(prompts)
    if best is not None:
        assert best.dtype == np.float32
        assert best.shape == (500,)
        assert (best <= high + 1e-6).all()
    cases = [("demonstrations", demonstrations)]
    cases += [("random", random_completions(task, 500, seed)) for seed in range(5)]
    for name, completions in cases + list(hostile_completions(task, 500)):
        rewards = task.reward(prompts, completions)
        assert np.isfinite(rewards).all(), name
        assert low - 1e-6 <= rewards.min() <= rewards.max() <= high + 1e-6, name
        if best is not None:
            assert (rewards <= best + 1e-6).all(), name


def test_reward_is_blind_to_padding_and_to_other_rows(task):
    prompts, demonstrations = draw(task, count=12)
    rewards = task.reward(prompts, demonstrations)
    for row in range(12):
        alone = task.reward(prompts.take([row]), demonstrations.take([row]))
        np.testing.assert_array_equal(alone, rewards[row : row + 1])
    np.testing.assert_array_equal(
        task.reward(
            prompts.take(slice(None, None, -1)),
            demonstrations.take(slice(None, None, -1)),
        ),
        rewards[::-1],
    )
    # What stands behind the end of a row may be anything, and more columns of it change nothing.
    for filler in (task.pad_id, 0, -7):
        wider = [
            type(rows)(
                np.where(
                    np.arange(rows.tokens.shape[1] + 3) < rows.lengths[:, None],
                    np.pad(rows.tokens, ((0, 0), (0, 3))),
                    filler,
                ),
                rows.lengths,
            )
            for rows in (prompts, demonstrations)
        ]
        np.testing.assert_array_equal(task.reward(*wider), rewards)


def test_what_follows_the_end_changes_nothing(task):
    if task.eos_id is None:
        pytest.skip("no EOS: completions end by their length")
    prompts, demonstrations = draw(task, count=12)
    width = task.max_completion_length
    rest = random_completions(task, 12).tokens
    inside = np.arange(width) < demonstrations.lengths[:, None]
    going_on = Completions(
        np.where(inside, demonstrations.tokens, rest), np.full(12, width)
    )
    np.testing.assert_array_equal(
        task.reward(prompts, going_on), task.reward(prompts, demonstrations)
    )


def test_rows_that_do_not_match_are_refused(task):
    prompts, demonstrations = draw(task, count=4)
    with pytest.raises(ValueError, match=r"prompts\.repeat"):
        task.reward(prompts.take([0, 1]), demonstrations)


def test_repeat_pairs_prompts_with_groups(task):
    prompts, demonstrations = draw(task, count=4)
    np.testing.assert_array_equal(
        task.reward(prompts.repeat(2), demonstrations.repeat(2)),
        np.repeat(task.reward(prompts, demonstrations), 2),
    )


def test_decode_is_text_without_padding(task):
    prompts, demonstrations = draw(task, count=4)
    for rows in (prompts, demonstrations):
        for tokens, length in zip(rows.tokens, rows.lengths):
            text = task.decode(tokens)
            assert isinstance(text, str)
            assert text
            assert text == task.decode(tokens[:length])
    for _, completions in hostile_completions(task, 2):
        assert isinstance(task.decode(completions.tokens[0]), str)


def test_names_and_sizes(task):
    assert task.name
    assert 0 <= task.pad_id < task.vocab_size
    assert task.pad_id != task.eos_id
    assert task.eos_id is None or 0 <= task.eos_id < task.vocab_size


def test_paraphrases_change_tokens_and_keep_the_gold_reward(task):
    paraphrase = getattr(task, "paraphrase", None)
    if paraphrase is None:
        pytest.skip("this task defines none")
    rng = np.random.default_rng(0)
    prompts = task.prompts(rng, 300, "train")
    before = task.demonstrations(rng, prompts)
    # Unknown ids and early ends too.
    before.tokens[::7, -1] = task.pad_id
    before.lengths[::5] -= 1
    kept = before.tokens.copy()
    after = paraphrase(rng, prompts, before)
    np.testing.assert_array_equal(before.tokens, kept)
    np.testing.assert_array_equal(after.lengths, before.lengths)
    np.testing.assert_array_equal(
        task.reward(prompts, after), task.reward(prompts, before)
    )
    assert (after.tokens != before.tokens).any(axis=1).mean() > 0.05
