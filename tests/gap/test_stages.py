"""Stages: keys follow everything a result depends on, work is shared out and kept, and what dies is noticed."""

import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import signal
import time

import pytest

from gvjax import lanes
from gvjax.gap import stages
from gvjax.gap.stages import BusyError, Stage, StageError, Store, run_stages


def stage(kind="add", parents=(), code="code", label="a stage", **inputs) -> Stage:
    return Stage(
        kind=kind,
        place=(0, 0, "", 0),
        label=label,
        inputs=inputs,
        parents=tuple(parents),
        cost=1.0,
        code=code,
    )


def work(marks: pathlib.Path, stage: Stage, store: Store, report) -> dict:
    """Adds its parents' results to its own input, and notes that it did; by kind, it fails, dies, talks on or waits for another one."""
    total = stage.inputs["value"]
    for parent in stage.parents:
        total += store.result(parent)["total"]
    if stage.kind == "fail" and not (marks / "mended").exists():
        raise ValueError("nothing to add")
    if stage.kind == "die" and not (marks / "mended").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    if stage.kind == "talk":
        # Says something more often than the leader would time out.
        for round_ in range(1000):
            report(round_, 1000, {"loss": 1.0})
            time.sleep(0.25)
            if (marks / "mended").exists():
                break
    if stage.kind == "meet":
        # Both processes are up, and at work on something.
        (marks.parent / f"begun-{time.time_ns()}-{stage.inputs['value']}").touch()
        while len(list(marks.parent.glob("begun-*"))) < 2:
            time.sleep(0.05)
    report(1, 1, {})
    (marks / f"{stage.inputs['value']}-{time.time_ns()}").touch()
    return {"total": total}


class Watch:
    """Remembers what it was told."""

    def __init__(self):
        self.told = []

    def __call__(self, stage, what, share, shown):
        self.told.append((stage.inputs["value"], what))

    def of(self, what):
        return [value for value, each in self.told if each == what]


@pytest.fixture
def marks(tmp_path):
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "stages")


def test_a_key_follows_all_that_the_result_depends_on_and_nothing_else():
    plain = stage(value=1)
    parent = stage(value=2)
    assert stage(value=1, label="another name").key == plain.key
    assert dataclasses.replace(plain, place=(1, 2, "x", 3), cost=9.0).key == plain.key
    others = [
        stage("other", value=1),
        stage(value=2),
        stage(value=1, code="changed"),
        stage(value=1, parents=[parent]),
        stage(value=1, parents=[stage(value=3)]),
        stage(value=1, parents=[stage(value=2, parents=[parent])]),
    ]
    keys = {plain.key, *(each.key for each in others)}
    assert len(keys) == 1 + len(others)


def test_a_stage_is_done_in_one_piece(store):
    each = stage(value=1)
    assert not store.is_done(each)
    partial = store.directory(each) / "result.json.partial"
    partial.parent.mkdir(parents=True)
    partial.write_text('{"tot')
    assert not store.is_done(each)
    store.finish(each, {"total": 1})
    assert store.is_done(each)
    assert store.result(each) == {"label": "a stage", "total": 1}
    assert not partial.exists()


def family():
    """Two roots and a child of both, the child's value being all three."""
    first, second = stage(value=1), stage(value=2)
    return [first, second, stage(value=4, parents=[first, second])]


@pytest.mark.parametrize("workers", [1, 2])
def test_parents_come_first_and_what_is_done_is_kept(workers, store, marks):
    perform = functools.partial(work, marks)
    few = family()
    watch = Watch()
    run_stages(few, store, perform, workers=workers, watch=watch)
    assert store.result(few[2])["total"] == 7
    assert store.result(few[2])["seconds"] >= 0
    assert sorted(watch.of("done")) == [1, 2, 4]
    assert watch.of("done")[-1] == 4

    more = [*few, stage(value=8, parents=[few[2]]), stage(value=16)]
    watch = Watch()
    run_stages(more, store, perform, workers=workers, watch=watch)
    assert sorted(watch.of("kept")) == [1, 2, 4]
    assert sorted(watch.of("done")) == [8, 16]
    assert store.result(more[3])["total"] == 15
    # Each was worked on once.
    assert len(list(marks.iterdir())) == 5


def test_the_seconds_of_an_attempt_that_ended_early_count(store, marks, monkeypatch):
    monkeypatch.setattr(stages, "NOTED_EVERY", 0.1)
    each = stage(value=1)

    def perform(stage, store, report):
        if not (marks / "mended").exists():
            time.sleep(0.3)
            report(1, 2, {})
            raise ValueError("killed")
        return {}

    for _ in range(2):
        with pytest.raises(StageError, match="killed"):
            run_stages([each], store, perform, workers=1, watch=Watch())
    (marks / "mended").touch()
    run_stages([each], store, perform, workers=1, watch=Watch())
    assert 0.6 <= store.result(each)["seconds"] < 60


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_names_the_stage_and_keeps_what_was_done(workers, store, marks):
    perform = functools.partial(work, marks)
    first = stage(value=1)
    broken = stage("fail", value=2, parents=[first], label="tour seed 1: RLOO")
    other = stage(value=3, parents=[broken])
    all_ = [first, broken, other]
    with pytest.raises(StageError, match=r"(?s)seed 1: RLOO failed.*nothing to add"):
        run_stages(all_, store, perform, workers=workers, watch=Watch())
    assert store.is_done(first)
    assert not store.is_done(other)
    (marks / "mended").touch()
    watch = Watch()
    run_stages(all_, store, perform, workers=workers, watch=watch)
    assert watch.of("kept") == [1]
    assert store.result(other)["total"] == 6
    assert not multiprocessing.active_children()


def test_a_killed_process_is_noticed_while_others_talk_on(store, marks):
    perform = functools.partial(work, marks)
    talker = stage("talk", value=1)
    victim = stage("die", value=2, label="tour seed 1: PPO")
    begun = time.monotonic()
    with pytest.raises(StageError, match=r"seed 1: PPO: its process died .* -9"):
        run_stages([talker, victim], store, perform, workers=2, watch=Watch())
    assert time.monotonic() - begun < 200
    assert not multiprocessing.active_children()
    (marks / "mended").touch()
    run_stages([talker, victim], store, perform, workers=2, watch=Watch())
    assert store.result(victim)["total"] == 2


def test_two_processes_do_not_compile_the_same_programs_at_once(store, marks):
    perform = functools.partial(work, marks)
    one, twin, other = (
        dataclasses.replace(stage("meet", value=value), place=(value, 0, arm, 0))
        for value, arm in ((1, "DPO"), (2, "DPO"), (3, "RLOO"))
    )
    run_stages([one, twin, other], store, perform, workers=2, watch=Watch())
    begun = sorted(path.name for path in marks.parent.glob("begun-*"))
    assert [name[-1] for name in begun][2] == "2"


UNLUCKY = 13


def meeting(stage: Stage, store: Store, report) -> dict:
    """The sum of its own value and those of the stages it was done with, of which one may fail."""
    total = lanes.current().meet(add_up, (float(stage.inputs["value"]),))
    if stage.inputs["value"] == UNLUCKY:
        raise ValueError("nothing to add")
    report(1, 1, {})
    return {"total": total}


def add_up(calls):
    return [sum(value for (value,) in calls)] * len(calls)


@pytest.mark.parametrize("workers", [1, 2])
def test_seeds_of_a_stage_are_done_together(workers, store):
    seeds = [
        dataclasses.replace(stage(value=seed), place=(seed, task, "DPO", 0))
        for task in (0, 1)
        for seed in range(10 * task, 10 * task + 3)
    ]
    watch = Watch()
    run_stages(seeds, store, meeting, workers=workers, watch=watch, together=2)
    # Of three seeds two, then one and a copy that fills its lanes.
    totals = [store.result(each)["total"] for each in seeds]
    assert totals == [0 + 1, 0 + 1, 2 + 2, 10 + 11, 10 + 11, 12 + 12]
    assert sorted(watch.of("done")) == [0, 1, 2, 10, 11, 12]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_seed_that_fails_leaves_the_others_to_end(workers, store):
    seeds = [
        dataclasses.replace(
            stage(value=value, label=f"seed {value}"), place=(value, 0, "DPO", 0)
        )
        for value in (UNLUCKY, 1)
    ]
    with pytest.raises(StageError, match=r"seed 13 failed:\n(?s:.*)nothing to add"):
        run_stages(seeds, store, meeting, workers=workers, watch=Watch(), together=2)
    assert [store.is_done(each) for each in seeds] == [False, True]


def test_what_most_hangs_on_comes_first():
    def costing(cost, value, *parents):
        return dataclasses.replace(stage(value=value, parents=parents), cost=cost)

    cheap, dear = costing(1.0, 1), costing(3.0, 2)
    child = costing(4.0, 3, cheap)
    other = costing(3.0, 4)
    ordered = stages._most_to_follow_first([dear, cheap, child, other])
    assert [each.inputs["value"] for each in ordered] == [1, 3, 2, 4]


def test_results_say_what_computed_them(store, marks, monkeypatch):
    few = [stage(value=1), stage(value=2)]
    for each, version in zip(few, ("0.10", "0.11")):
        made_by = {"jax": version, "device": "cpu"}
        monkeypatch.setattr(stages, "versions", lambda made_by=made_by: made_by)
        perform = functools.partial(work, marks)
        run_stages([each], store, perform, workers=1, watch=Watch())
    monkeypatch.undo()
    assert set(stages.versions()) >= {"gvjax", "jax", "device"}
    found = stages.versions_behind(few, store)
    assert found == {"jax": "0.10, 0.11", "device": "cpu"}


def mark_time(path: pathlib.Path) -> int:
    return int(path.name.split("-")[1])


def test_one_process_at_a_time_works_in_a_directory(store):
    with (
        store.held(),
        pytest.raises(BusyError, match="another process works in"),
        store.held(),
    ):
        pass
    with store.held():
        pass


def test_the_start_is_noted_once(store):
    first = store.started()
    time.sleep(1.1)
    assert store.started() == first


def fingerprint(root, monkeypatch, **files):
    root.mkdir(exist_ok=True)
    for name, text in files.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(stages.gvjax, "__file__", str(root / "__init__.py"))
    return stages.code_fingerprint.__wrapped__()


def test_the_fingerprint_follows_code_and_not_words_about_it(tmp_path, monkeypatch):
    def of(**files):
        return fingerprint(tmp_path / "package", monkeypatch, **files)

    plain = of(
        a="def f(x):\n    '''Adds.'''\n    return x + 1\n", gap__report="x = 1\n"
    )
    same = of(a="# Why.\ndef f(x):\n    '''Adds one.'''\n\n    return x + 1\n")
    assert same == plain
    assert of(gap__report="x = 2\n") == plain
    assert of(a="def f(x):\n    return x + 2\n") != plain
    assert of(a="def f(x):\n    return x + 1\n") == plain
    assert of(b="") != plain


def test_results_are_json(store):
    each = stage(value=1)
    store.finish(each, {"gold": [0.5]})
    path = store.directory(each) / "result.json"
    assert json.loads(path.read_text())["gold"] == [0.5]
