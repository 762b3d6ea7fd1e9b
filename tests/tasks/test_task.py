"""The parts that all tasks share: splits, hashes, drawing, labels, and loading by name."""

import subprocess
import sys
import types

import numpy as np
import pytest

from gvjax import tasks
from gvjax.tasks import task as task_lib
from gvjax.tasks.plan import Plan
from gvjax.tasks.task import Completions, Prompts
from gvjax.tasks.tour import Tour


def prompts_of(rows) -> Prompts:
    return Prompts(np.array(rows), np.full(len(rows), len(rows[0])))


def test_rows_follow_rows():
    first, second = prompts_of([[0, 1], [2, 3]]), prompts_of([[4, 5]])
    both = first.followed_by(second)
    assert isinstance(both, Prompts)
    assert both.tokens.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert both.lengths.tolist() == [2, 2, 2]


def test_hash_is_the_same_in_every_process_and_release():
    # A change here moves prompts between splits and makes old results incomparable.
    hashes = task_lib.content_hash(prompts_of([[0, 1, 2, 3], [3, 2, 1, 0]]))
    assert hashes.tolist() == [1047763715168547757, 8492430976155817854]


def test_hash_tells_order_length_salt_and_negative_ids_apart():
    rows = [[1, 2, 3], [2, 1, 3], [1, 2, 0], [1, 2, -1], [1, 2, 2**31 - 1], [0, 0, 0]]
    hashes = [*task_lib.content_hash(prompts_of(rows))]
    hashes += [*task_lib.content_hash(prompts_of(rows), salt=1)]
    hashes += [*task_lib.content_hash(Prompts(np.zeros((3, 3), int), np.arange(3)))]
    assert len(set(hashes)) == 2 * len(rows) + 3


def test_hash_is_blind_to_padding():
    short = Prompts(np.array([[1, 2]]), np.array([2]))
    padded = Prompts(np.array([[1, 2, 9, 9]]), np.array([2]))
    assert task_lib.content_hash(short) == task_lib.content_hash(padded)


def test_split_shares():
    rng = np.random.default_rng(0)
    splits = task_lib.split_of(prompts_of(rng.integers(1000, size=(20000, 4))))
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert (splits == split).mean() == pytest.approx(share, abs=0.01)


def test_few_prompts_are_shared_out_without_loss_or_overlap():
    task = Plan()
    everything = []
    for split, expected in (("train", 819), ("validation", 102), ("test", 102)):
        rng = np.random.default_rng(0)
        with pytest.raises(ValueError, match=f"the {split} split has only") as error:
            task.prompts(rng, 1024, split, distinct=True)
        available = int(str(error.value).split("only ")[1].split()[0])
        assert available == pytest.approx(expected, rel=0.2)
        prompts = task.prompts(rng, available, split, distinct=True)
        everything += [tuple(row) for row in prompts.tokens.tolist()]
        assert len(task.prompts(rng, 1024, split)) == 1024
    assert len(everything) == len(set(everything)) == 1024


def test_drawing_is_uniform_over_the_split():
    task = Plan(num_symbols=4)
    prompts = task.prompts(np.random.default_rng(0), 20000, "train")
    _, counts = np.unique(prompts.tokens, axis=0, return_counts=True)
    assert counts.min() > 0.8 * counts.mean()
    assert counts.max() < 1.2 * counts.mean()


def test_an_empty_split_is_refused():
    only = prompts_of([[0, 1, 2, 3]] * 8)
    (split,) = set(task_lib.split_of(only).tolist())
    other = next(s for s in ("train", "validation", "test") if s != split)
    with pytest.raises(ValueError, match="has only 0 distinct"):
        task_lib.draw_prompts(lambda rng, n: only, np.random.default_rng(0), 1, other)


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="count is -1"):
        Tour().prompts(np.random.default_rng(0), -1, "train")


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        (np.zeros(3, int), np.zeros(3, int), "do not fit"),
        (np.zeros((3, 2), int), np.zeros(2, int), "do not fit"),
        (np.zeros((3, 2)), np.zeros(3, int), "pass integers"),
        (
            np.zeros((3, 2), int),
            np.array([0, 1, 3]),
            r"\[0, 3\] but must lie in \[0, 2\]",
        ),
        (np.zeros((3, 2), int), np.array([-1, 1, 1]), r"\[-1, 1\]"),
    ],
)
def test_rows_that_make_no_sense_are_refused(tokens, lengths, message):
    with pytest.raises(ValueError, match=message):
        Completions(tokens, lengths)


def test_read_completions_as_a_picture():
    completions = Completions(
        np.array([[1, 2, 7, 4], [1, 2, 3, 4], [7, 7, 7, 7], [1, 2, 7, 4]]),
        np.array([4, 3, 4, 2]),
    )
    tokens, lengths = task_lib.read_completions(completions, 3, 7)
    assert tokens.tolist() == [[1, 2, -1], [1, 2, 3], [-1, -1, -1], [1, 2, -1]]
    assert lengths.tolist() == [2, 3, 0, 2]
    tokens, lengths = task_lib.read_completions(completions, 5, None)
    assert tokens[0].tolist() == [1, 2, 7, 4, -1]
    assert lengths.tolist() == [4, 3, 4, 2]


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_labels_follow_bradley_terry(tau):
    rewards = np.linspace(-1, 1, 5).repeat(20000)
    labels = task_lib.preference_labels(
        np.random.default_rng(0), rewards, np.zeros_like(rewards), tau
    )
    assert labels.dtype == bool
    expected = 1 / (1 + np.exp(-np.linspace(-1, 1, 5) / tau))
    np.testing.assert_allclose(labels.reshape(5, -1).mean(axis=1), expected, atol=0.015)


def test_labels_do_not_overflow():
    labels = task_lib.preference_labels(
        np.random.default_rng(0), np.array([1e30, -1e30]), np.zeros(2), 1e-30
    )
    assert labels.tolist() == [True, False]


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_labels_refuse_tau(tau):
    with pytest.raises(ValueError, match="must be > 0"):
        task_lib.preference_labels(
            np.random.default_rng(0), np.ones(1), np.ones(1), tau
        )


def test_tour_agrees_with_labels_as_often_as_the_study_says():
    task = Tour()
    rng = np.random.default_rng(0)
    prompts = task.prompts(rng, 4000, "train")
    a, b = (task.reward(prompts, task.demonstrations(rng, prompts)) for _ in range(2))
    labels = task_lib.preference_labels(rng, a, b, 0.2)
    differ = a != b
    assert 0.2 < 1 - differ.mean() < 0.28
    assert 0.79 < (labels == (a > b))[differ].mean() < 0.84


def test_everything_is_the_same_in_another_process():
    code = """
import sys, zlib
import numpy as np
from gvjax import tasks
for name in tasks.names():
    few = {"count": 500} if name in ("countdown", "sort", "reverse") else {}
    task = tasks.load(name, seed=2, **few)
    rng = np.random.default_rng(0)
    prompts = task.prompts(rng, 20, "test")
    rows = task.demonstrations(rng, prompts)
    rewards = task.reward(prompts, rows)
    data = prompts.tokens.tobytes() + rows.tokens.tobytes() + rewards.tobytes()
    print(name, zlib.crc32(data))
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("0", "1")
    }
    assert len(outputs) == 1
    assert len(outputs.pop().splitlines()) == len(tasks.names())


def test_names_are_the_files():
    assert tasks.names() == [
        "countdown",
        "hidden_goals",
        "lcs",
        "lengths",
        "name",
        "plan",
        "reverse",
        "sort",
        "tour",
    ]


def test_load_by_short_name_module_and_attribute():
    for path in ("tour", "gvjax.tasks.tour", "gvjax.tasks.tour:Tour"):
        assert tasks.load(path, seed=7, horizon=6) == Tour(seed=7, horizon=6)


def test_load_gives_no_seed_to_a_task_without_one():
    assert tasks.load("name", seed=7) == tasks.load("name")


def test_load_keeps_the_default_seed():
    assert tasks.load("tour") == Tour()


def test_load_passes_seed_and_options_to_examples():
    first, second = tasks.load("sort", seed=1, count=50), tasks.load("sort", count=50)
    assert sum(map(len, first.records.values())) == 50
    assert first.records != second.records
    assert tasks.load("sort", completion_limit=40).max_completion_length == 40


def test_load_finds_an_object_with_examples_and_reward(monkeypatch):
    module = types.ModuleType("somebodys_tasks")

    def examples(split):
        rows = [{"prompt": f"{n}", "completion": "x"} for n in range(100)]
        return tasks.text.in_split(rows, split)

    module.mine = types.SimpleNamespace(
        examples=examples, reward=lambda record, completion: 1.0
    )
    monkeypatch.setitem(sys.modules, "somebodys.tasks", module)
    task = tasks.load("somebodys.tasks:mine", seed=3)
    assert task.name == "mine"
    prompts = task.prompts(np.random.default_rng(0), 4, "train")
    assert task.optimum(prompts) is None
    assert task.reward_range == (-np.inf, np.inf)


@pytest.mark.parametrize(
    "path", ["my_task", "my_task:MyTask", "my_text", "my_class:MyText"]
)
def test_load_finds_a_file_that_is_in_no_package(path, tmp_path, monkeypatch):
    (tmp_path / "my_task.py").write_text("from gvjax.tasks.name import Name as MyTask")
    (tmp_path / "my_text.py").write_text("from gvjax.tasks.sort import *")
    (tmp_path / "my_class.py").write_text(
        "from gvjax.tasks import sort\n"
        "class MyText:\n"
        "    REWARD_RANGE = sort.REWARD_RANGE\n"
        "    def examples(self, split, *, seed=0):\n"
        "        return sort.examples(split, seed=seed)\n"
        "    def reward(self, record, completion):\n"
        "        return sort.reward(record, completion)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, path.partition(":")[0], raising=False)
    names = {"my_text": "my_text", "my_class:MyText": "MyText"}
    task = tasks.load(path, seed=1)
    assert task.name == names.get(path, "name")
    assert len(task.prompts(np.random.default_rng(0), 2, "train")) == 2


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("tuor", {}, "there is no task 'tuor', did you mean 'tour'"),
        ("zzz", {}, "there is no task 'zzz'; use one of countdown, hidden_goals"),
        ("bytes", {}, "there is no task 'bytes'"),
        ("gvjax.tasks.tuor", {}, "'gvjax.tasks.tuor' cannot be found"),
        ("no_such.thing:Task", {}, "'no_such.thing' cannot be found"),
        ("gvjax.tasks.tour:Tuor", {}, "has no 'Tuor', did you mean 'Tour'"),
        ("tour", {"horizont": 3}, "no option 'horizont', did you mean 'horizon'"),
        ("sort", {"cuont": 3}, "no option 'cuont', did you mean 'count'"),
        ("sort", {"split": "test"}, "no option 'split'"),
        ("gvjax.tasks.task:Prompts", {"tokens": 1, "lengths": 1}, "do not fit"),
        (
            "fractions",
            {},
            "module fractions has no 'Fractions', did you mean 'Fraction'",
        ),
        ("tour:Tour", {}, "module 'tour' cannot be found"),
        ("", {}, "is no import path"),
        ("./tour.py", {}, "is no import path"),
        ("xml.dom:Node", {}, "lacks name, vocab_size"),
    ],
)
def test_load_refuses(path, options, message):
    with pytest.raises(ValueError, match=message):
        tasks.load(path, **options)


def test_load_shows_the_fault_of_a_module_that_cannot_import(tmp_path, monkeypatch):
    (tmp_path / "broken_tasks").mkdir()
    (tmp_path / "broken_tasks" / "one.py").write_text("import not_installed_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        tasks.load("broken_tasks.one")
