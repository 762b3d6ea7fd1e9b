"""Batches made ahead: the same ones in any order, made before they are asked for, errors where they belong."""

import threading

import pytest

from gvjax.data.ahead import Ahead


def test_whatever_is_asked_for_is_what_comes():
    feed = Ahead(lambda step: step * step, ahead=2)
    asked = [0, 1, 2, 3, 7, 8, 2, 3, 3, 100]
    assert [feed(step) for step in asked] == [step * step for step in asked]


def test_the_next_ones_are_made_while_this_one_is_used():
    made = {step: threading.Event() for step in range(6)}

    def make(step):
        made[step].set()
        return step

    feed = Ahead(make, stop=5, ahead=2)
    assert feed(0) == 0
    # Nobody has asked for these.
    assert made[1].wait(60) and made[2].wait(60)
    assert not made[3].is_set()
    assert [feed(step) for step in range(1, 5)] == [1, 2, 3, 4]
    # Nor will anybody ask for the one behind the last.
    assert not made[5].is_set()


def test_every_batch_is_made_once():
    calls = []
    feed = Ahead(lambda step: calls.append(step), stop=20, ahead=3)
    for step in range(20):
        feed(step)
    assert calls == list(range(20))


def test_an_error_comes_out_at_its_own_step():
    def make(step):
        if step == 2:
            raise ValueError("row 2 is broken")
        return step

    feed = Ahead(make, ahead=2)
    assert feed(0) == 0
    assert feed(1) == 1
    with pytest.raises(ValueError, match="row 2 is broken"):
        feed(2)
    assert feed(3) == 3


def test_none_ahead_makes_each_in_the_callers_thread():
    threads = set()
    feed = Ahead(lambda step: threads.add(threading.current_thread()), ahead=0)
    feed(0)
    assert threads == {threading.current_thread()}
    with pytest.raises(ValueError, match="ahead is -1"):
        Ahead(lambda step: step, ahead=-1)
