"""Lanes: like work on different data, each program run once for all of it."""

import functools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvjax import lanes


def counted(function):
    """A program over lanes, and a list that grows by the number of lanes each time it runs."""
    runs = []

    @jax.jit
    def jitted(calls):
        return lanes.over(function)(calls)

    def together(calls):
        runs.append(len(calls))
        return jitted(calls)

    return together, runs


def walk(x, key):
    """Something that rounds: a few products, a draw, a loop."""
    noise = jax.random.normal(key, x.shape)
    return jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ y.T + noise), x)


def arguments(seed):
    return (
        np.random.default_rng(seed).normal(size=(7, 7)).astype(np.float32),
        jax.random.key(seed),
    )


def test_a_program_runs_once_for_all_lanes_and_gives_each_its_own_result():
    together, runs = counted(walk)

    def work(seed):
        first = lanes.current().meet(together, arguments(seed))
        return lanes.current().meet(together, (first, jax.random.key(seed + 10)))

    found = lanes.Lanes(3).run([functools.partial(work, seed) for seed in range(3)])
    assert runs == [3, 3]
    for seed in range(3):
        expected = walk(walk(*arguments(seed)), jax.random.key(seed + 10))
        np.testing.assert_allclose(found[seed], expected, rtol=1e-5, atol=1e-6)


def test_a_seed_has_the_same_bits_whoever_is_beside_it():
    program = lanes.jit(walk)

    def done(*seeds):
        works = [functools.partial(program, *arguments(seed)) for seed in seeds]
        return dict(zip(seeds, lanes.Lanes(3).run(works)))

    together = done(0, 1, 2)
    for seeds in ((2, 0, 1), (1, 0), (2,)):
        for seed, found in done(*seeds).items():
            np.testing.assert_array_equal(found, together[seed])


def test_lanes_that_have_ended_are_not_waited_for():
    together, runs = counted(lambda x: x + 1)

    def work(steps):
        x = jnp.zeros(())
        for _ in range(steps):
            x = lanes.current().meet(together, (x,))
        return float(x)

    works = [functools.partial(work, steps) for steps in (1, 3, 0)]
    assert lanes.Lanes(3).run(works) == [1.0, 3.0, 0.0]
    assert len(runs) == 3


def test_lanes_may_come_to_different_programs_and_to_different_shapes():
    add, adds = counted(lambda x: x + 1)
    double, doubles = counted(lambda x: 2 * x)
    works = [
        lambda: lanes.current().meet(add, (jnp.ones(2),)),
        lambda: lanes.current().meet(add, (jnp.ones(3),)),
        lambda: lanes.current().meet(double, (jnp.ones(2),)),
    ]
    two, three, doubled = lanes.Lanes(3).run(works)
    assert (two.shape, three.shape) == ((2,), (3,))
    np.testing.assert_array_equal(doubled, [2, 2])
    assert len(adds) == 2 and len(doubles) == 1


def test_what_is_donated_may_be_missing_lanes_filling():
    donating = jax.jit(lanes.over(lambda x: x + 1), donate_argnums=0)
    found = lanes.Lanes(4).run(
        [lambda: lanes.current().meet(donating, (jnp.arange(3.0),))]
    )
    np.testing.assert_array_equal(found[0], [1, 2, 3])


def test_a_program_that_fails_fails_in_every_lane_that_called_it():
    def broken(calls):
        raise FloatingPointError("not today")

    def work():
        with pytest.raises(FloatingPointError, match="not today"):
            lanes.current().meet(broken, (1.0,))
        return "went on"

    assert lanes.Lanes(2).run([work, work]) == ["went on"] * 2


def fails_everywhere(error, message, works):
    """Runs works that call programs in a thread that may be waited for in vain."""
    found = []

    def go():
        with pytest.raises(error, match=message):
            lanes.Lanes(3).run(works)
        found.append("ended")

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    thread.join(60)
    assert found == ["ended"]


def test_lanes_that_cannot_be_filled_are_told_so(monkeypatch):
    """What fills absent lanes is a copy of a whole state, and may not fit."""

    def no_room(leaf):
        raise RuntimeError("RESOURCE_EXHAUSTED: 12 GiB for a copy")

    monkeypatch.setattr(lanes, "_copy", no_room)
    program = lanes.jit(lambda x: x + 1)
    works = [lambda: program(jnp.ones(2)), lambda: program(jnp.ones(2))]
    fails_everywhere(MemoryError, "3 lanes of this program.*12 GiB", works)


def test_arguments_that_cannot_be_told_apart_fail_in_every_lane():
    program, told = lanes.jit(lambda x: x), []

    def work(argument):
        try:
            program(argument)
        except TypeError as error:
            told.append(error)
            raise

    works = [lambda: work(jnp.ones(2)), lambda: work("no array")]
    fails_everywhere(TypeError, "no array", works)
    assert len(told) == 2


def test_what_does_not_fit_says_so():
    def broken(calls):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory, 12 GiB")

    works = [lambda: lanes.current().meet(broken, (1.0,))] * 2
    with pytest.raises(
        MemoryError, match=r"4 lanes of this program.*use fewer.*12 GiB"
    ):
        lanes.Lanes(4).run(works)


def test_a_lane_that_fails_leaves_the_others_to_end():
    program, ended = lanes.jit(lambda x: x + 1), []

    def fails():
        program(jnp.zeros(()))
        raise LookupError("seed 1")

    def goes_on():
        x = jnp.zeros(())
        for _ in range(3):
            x = program(x)
        ended.append(float(x))

    with pytest.raises(LookupError, match="seed 1"):
        lanes.Lanes(2).run([fails, goes_on])
    assert ended == [3.0]


def test_ctrl_c_ends_every_lane(monkeypatch):
    program = lanes.jit(lambda x: x + 1)
    ends = []

    def for_ever():
        try:
            while True:
                program(jnp.zeros(()))
        except lanes.AbandonedError:
            ends.append(threading.current_thread().name)
            raise

    join, interrupted = threading.Thread.join, []

    def joined(thread, timeout=None):
        if not interrupted:
            interrupted.append(thread)
            time.sleep(0.2)
            raise KeyboardInterrupt
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", joined)
    with pytest.raises(KeyboardInterrupt):
        lanes.Lanes(2).run([for_ever, for_ever])
    assert sorted(ends) == ["lane 0", "lane 1"]


def test_outside_of_lanes_a_program_is_a_jitted_function():
    program = lanes.jit(walk)
    found = program(*arguments(0))
    np.testing.assert_array_equal(found, jax.jit(walk)(*arguments(0)))
    assert "stablehlo" in program.lower(*arguments(0)).as_text()


def test_a_program_may_call_another_while_it_is_traced():
    inner = lanes.jit(lambda x: x + 1)
    outer = lanes.jit(lambda x: 2 * inner(x))
    works = [functools.partial(outer, jnp.full((), float(x))) for x in range(2)]
    assert [float(each) for each in lanes.Lanes(2).run(works)] == [2.0, 4.0]


def test_impossible_numbers_of_lanes_are_refused():
    with pytest.raises(ValueError, match="one lane at least"):
        lanes.Lanes(0)
    with pytest.raises(ValueError, match="3 works do not fit into 2 lanes"):
        lanes.Lanes(2).run([int] * 3)
