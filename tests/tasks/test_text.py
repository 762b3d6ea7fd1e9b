"""The byte tokenizer, the text adapter, and the three verifiable text tasks."""

import types
from fractions import Fraction

import numpy as np
import pytest

from gvjax.tasks import bytes as byte_tokenizer
from gvjax.tasks import countdown, reverse, sort
from gvjax.tasks.task import Completions, Prompts
from gvjax.tasks.text import TextTask, in_split


@pytest.mark.parametrize("text", ["", "abc", "Grüße, 世界 🙂\n\0", "�"])
def test_bytes_go_there_and_back(text):
    ids = byte_tokenizer.encode(text)
    assert byte_tokenizer.decode(ids) == text
    assert all(0 <= token < 256 for token in ids)


def test_decode_is_total():
    ids = [97, 257, 98, 256, 258, 0xC3, 99, -1, 259, 10**9]
    assert byte_tokenizer.decode(ids) == "ab<eos>�c���"


def doubles(split):
    """Yields records of doubling."""
    records = (
        {"prompt": f"double {n}: ", "completion": str(2 * n)} for n in range(300)
    )
    return in_split(records, split)


def right(record, completion):
    return float(completion.strip() == record["completion"])


def make(**functions) -> TextTask:
    file = types.SimpleNamespace(examples=doubles, reward=right)
    return TextTask(types.SimpleNamespace(**{**vars(file), **functions}), "double")


def test_a_file_of_two_functions_is_a_task():
    task = make()
    prompts = task.prompts(np.random.default_rng(0), 5, "train")
    assert (prompts.tokens[:, 0] == byte_tokenizer.BOS_ID).all()
    assert task.decode(prompts.tokens[0]).startswith("double ")
    rows = task.demonstrations(np.random.default_rng(0), prompts)
    assert task.decode(rows.tokens[0]).endswith("<eos>")
    np.testing.assert_array_equal(task.reward(prompts, rows), np.ones(5))
    assert task.reward(prompts, rows).dtype == np.float32
    assert task.max_completion_length == 2 * 3 + 1
    assert task.max_prompt_length == 1 + len("double 299: ")


def test_reward_sees_the_text_before_the_first_eos():
    task = make(reward=lambda record, completion: len(completion))
    prompts = task.prompts(np.random.default_rng(0), 3, "train")
    tokens = np.array([[65, 66, 258, 67, 68], [65, 66, 67, 68, 69], [258] * 5])
    completions = Completions(tokens, np.array([5, 4, 5]))
    assert task.reward(prompts, completions).tolist() == [2, 4, 0]


def test_demonstration_function_replaces_the_completion():
    task = make(demonstration=lambda rng, record: "no")
    prompts = task.prompts(np.random.default_rng(0), 3, "train")
    rows = task.demonstrations(np.random.default_rng(0), prompts)
    assert task.decode(rows.tokens[0]) == "no<eos>"


def test_every_record_is_in_exactly_one_split():
    task = make()
    rows = [record["prompt"] for rows in task.records.values() for record in rows]
    assert sorted(rows) == sorted(f"double {n}: " for n in range(300))


def test_too_many_distinct_prompts_are_refused():
    task = make()
    size = len(task.records["test"])
    rng = np.random.default_rng(0)
    assert len(task.prompts(rng, size, "test", distinct=True)) == size
    with pytest.raises(ValueError, match=f"has only {size} distinct prompts"):
        task.prompts(rng, size + 1, "test", distinct=True)


def test_a_demonstration_that_does_not_fit_is_refused():
    task = make(demonstration=lambda rng, record: "x" * 50)
    prompts = task.prompts(np.random.default_rng(0), 3, "train")
    with pytest.raises(ValueError, match="51 tokens with EOS; raise completion_limit"):
        task.demonstrations(np.random.default_rng(0), prompts)


@pytest.mark.parametrize("token", [65, 258, -1])
def test_a_prompt_of_another_task_is_refused(token):
    prompts = Prompts(np.array([[257, token]]), np.array([2]))
    completions = Completions(np.array([[65]]), np.array([1]))
    with pytest.raises(ValueError, match="is no prompt of task double"):
        make().reward(prompts, completions)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (lambda split: [{"prompt": "a", "completion": "b"}], "in both train and"),
        (lambda split: [{"prompt": split, "completion": "b"}] * 2, "repeats prompts"),
        (lambda split: [], "has no train records"),
    ],
)
def test_records_that_would_leak_or_lack_are_refused(examples, message):
    with pytest.raises(ValueError, match=message):
        make(examples=examples).prompts(np.random.default_rng(0), 1, "train")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("8-3-2", 3),
        ("8/4/2", 1),
        ("8/(4/2)", 4),
        ("1/3*3", 1),
        ("7/2", Fraction(7, 2)),
        (" 10 - ( 2 + 3 ) ", 5),
        ("((5))", 5),
    ],
)
def test_expressions_by_hand(text, value):
    assert countdown.evaluate(text)[0] == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "+",
        "1+",
        "-1",
        "1 2",
        "(1",
        "1)",
        "()",
        "2**3",
        "7//2",
        "1/0",
        "1/(2-2)",
        "01",
        "0",
        "1.5",
        "1e3",
        "0x10",
        "1_0",
        "a",
        "__import__('os')",
        "3\n",
        "٣",
        "3*5+7=22",
        "(" * 64,
        "1" + "+1" * 32,
    ],
)
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ValueError, match=r"characters|lacks|open|goes on|zero"):
        countdown.evaluate(text)


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("3*5+7", 1.0),
        ("7 + (5*3)", 1.0),
        ("3*5", 0.1),
        ("7", 0.1),
        ("22", 0.0),
        ("3*5+3+4", 0.0),
        ("5+5+5+7", 0.0),
        ("3*5+7=22", 0.0),
        ("", 0.0),
    ],
)
def test_countdown_gold_by_hand(completion, gold):
    record = {"numbers": [3, 5, 7], "target": 22}
    assert countdown.reward(record, completion) == gold


@pytest.mark.parametrize("num_numbers", [2, 3, 4])
def test_countdown_records_are_solvable_and_not_given_away(num_numbers):
    for record in countdown.examples("train", count=200, num_numbers=num_numbers):
        assert countdown.reward(record, record["completion"]) == 1.0
        assert len(set(record["numbers"])) == num_numbers
        assert 0 < record["target"] <= 99
        assert record["target"] not in record["numbers"]


def test_no_countdown_puzzle_stands_in_two_splits():
    """Nor the same one with its numbers in another order."""
    splits = [
        {
            (tuple(sorted(record["numbers"])), record["target"])
            for record in countdown.examples(split, count=1000)
        }
        for split in ("train", "validation", "test")
    ]
    assert sum(map(len, splits)) == 1000 == len(set().union(*splits))


def test_countdown_refuses_too_many_numbers():
    with pytest.raises(ValueError, match="num_numbers is 7; use 2 to 6"):
        list(countdown.examples("train", num_numbers=7))


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("4 15 31", 1.0),
        ("  4  15\n31 ", 1.0),
        ("4 31 15", 1 / 3),
        ("4 15", 2 / 3),
        ("4 15 31 31", 3 / 4),
        ("04 15 31", 2 / 3),
        ("", 0.0),
    ],
)
def test_sort_gold_by_hand(completion, gold):
    record = {"prompt": "sort 31 4 15: ", "completion": "4 15 31"}
    assert sort.reward(record, completion) == pytest.approx(gold)


def test_sort_answers_are_sorted():
    for record in sort.examples("test", count=200):
        numbers = [int(word) for word in record["prompt"][5:-2].split()]
        assert record["completion"] == " ".join(map(str, sorted(numbers)))


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("hbag", 1.0),
        (" hbag ", 1.0),
        ("hbaa", 3 / 4),
        ("hba", 3 / 4),
        ("hbagg", 4 / 5),
        ("gabh", 0.0),
        ("", 0.0),
    ],
)
def test_reverse_gold_by_hand(completion, gold):
    record = {"prompt": "reverse gabh: ", "completion": "hbag"}
    assert reverse.reward(record, completion) == pytest.approx(gold)


def test_reverse_answers_are_backwards():
    for record in reverse.examples("test", count=200):
        word = record["prompt"].removeprefix("reverse ").removesuffix(": ")
        assert record["completion"] == "".join(reversed(word))


@pytest.mark.parametrize("file", [countdown, sort, reverse])
def test_about_half_of_the_demonstrations_are_right(file):
    rng = np.random.default_rng(0)
    records = list(file.examples("train", count=1000))
    right = [file.reward(record, file.demonstration(rng, record)) for record in records]
    assert 0.45 < np.mean(np.array(right) == 1.0) < 0.65
