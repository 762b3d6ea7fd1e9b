"""Several seeds in one program: each is a lane, a thread of its own, and lanes meet wherever they call the same program.

A recipe is written for one seed and stays so. What it compiles with `jit` of this module runs, in lanes, once for all that
have come to it: `jax.vmap` over their arguments. A small network leaves an accelerator waiting for its next kernel, and
lanes share that wait.

    lanes = Lanes(4)
    results = lanes.run([functools.partial(train, seed) for seed in range(4)])

Every program is one over `count` lanes, whoever is there: where fewer have come to it, as after an interruption, the last
one's arguments fill it up. So the numbers of a seed do not depend on which others are done beside it.
"""

import dataclasses
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Result = TypeVar("Result")

Calls = tuple[tuple[Any, ...], ...]
"""The arguments of one program in each lane."""

Together = Callable[[Calls], Sequence[Any]]
"""Makes the results of several lanes at once."""

_here = threading.local()


class AbandonedError(RuntimeError):
    """The lanes are given up: another one, or whoever waits for them, was interrupted."""


@dataclasses.dataclass(eq=False)
class _Call:
    lane: int
    together: Together
    arguments: tuple[Any, ...]
    result: Any = None
    error: BaseException | None = None
    made: bool = False

    def program(self) -> Hashable:
        """Calls with the same value can be made at once."""
        leaves, treedef = jax.tree.flatten(self.arguments)
        kinds = tuple((jnp.shape(leaf), jax.dtypes.result_type(leaf)) for leaf in leaves)  # fmt: skip
        return self.together, treedef, kinds


class Lanes:
    """Threads that do like work on different data, and run their programs together.

    Args:
      count: lanes of every program, >= 1.
    """

    def __init__(self, count: int):
        if count < 1:
            raise ValueError(f"count is {count}; work needs one lane at least")
        self.count = count
        self._change = threading.Condition()
        self._working = 0
        self._waiting: list[_Call] = []
        self._abandoned = False

    def run(self, works: Sequence[Callable[[], Result]]) -> list[Result]:
        """What each work returns; each is called in a lane of its own.

        Args:
          works: at most `count`. One that raises leaves the others to end.

        Raises:
          ValueError: there are more than lanes.
          BaseException: what the first of those that raised has raised.
        """
        if len(works) > self.count:
            raise ValueError(f"{len(works)} works do not fit into {self.count} lanes")
        results: list[Any] = [None] * len(works)
        errors: list[BaseException | None] = [None] * len(works)

        def lane(number: int) -> None:
            _here.lanes, _here.number = self, number
            try:
                results[number] = works[number]()
            except BaseException as error:
                errors[number] = error
            finally:
                with self._change:
                    self._working -= 1
                    self._go_on()

        self._working = len(works)
        threads = [
            threading.Thread(target=lane, args=(number,), name=f"lane {number}", daemon=True)
            for number in range(len(works))
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            with self._change:
                self._abandoned = True
                self._change.notify_all()
            for thread in threads:
                thread.join()
            raise
        for error in errors:
            if error is not None:
                raise error
        return results

    def meet(self, together: Together, arguments: tuple[Any, ...]) -> Any:
        """This lane's result of a program, as soon as every lane that still works has come to one."""
        call = _Call(_here.number, together, arguments)
        with self._change:
            self._waiting.append(call)
            self._go_on()
            while not (call.made or self._abandoned):
                self._change.wait()
            if self._abandoned:
                raise AbandonedError("these lanes were given up")
        if call.error is not None:
            raise call.error
        return call.result

    def _go_on(self) -> None:
        """Makes the calls that are waited for, if nobody else is to come; the caller holds the lock."""
        if not self._waiting or len(self._waiting) < self._working:
            return
        calls, self._waiting = self._waiting, []
        before = getattr(_here, "lanes", None)
        # What is traced now is no lane's own.
        _here.lanes = None
        try:
            groups: dict[Hashable, list[_Call]] = {}
            for call in sorted(calls, key=lambda call: call.lane):
                groups.setdefault(call.program(), []).append(call)
            for group in groups.values():
                self._make(group)
        except BaseException as error:
            # Whoever called is waiting, in this lane or in another, and is told.
            for call in calls:
                if not call.made:
                    call.error, call.made = error, True
        finally:
            _here.lanes = before
            self._change.notify_all()

    def _make(self, group: list[_Call]) -> None:
        absent = self.count - len(group)
        try:
            # Copies, since a program may take over the memory of what it is given.
            filled = [jax.tree.map(_copy, group[-1].arguments) for _ in range(absent)]
            made = group[0].together((*(call.arguments for call in group), *filled))
            for call, result in zip(group, made):
                call.result = result
        except Exception as error:
            for call in group:
                call.error = self._explained(error)
        for call in group:
            call.made = True

    def _explained(self, error: Exception) -> Exception:
        if "RESOURCE_EXHAUSTED" not in str(error):
            return error
        return MemoryError(
            f"{self.count} lanes of this program do not fit into the device's memory; use fewer, as `seeds_together` of a"
            f" study: {str(error).splitlines()[0]}"
        )


def current() -> Lanes | None:
    """The lanes that the calling thread is one of."""
    return getattr(_here, "lanes", None)


def over(function: Callable[..., Any]) -> Together:
    """A pure function over lanes, to be traced: `((a, b), (c, d)) -> (function(a, b), function(c, d))`, by one vmap."""

    def together(calls: Calls) -> tuple[Any, ...]:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *calls)
        leaves, tree = jax.tree.flatten(jax.vmap(lambda call: function(*call))(stacked))
        return tuple(
            jax.tree.unflatten(tree, [leaf[lane] for leaf in leaves])
            for lane in range(len(calls))
        )

    return together


class Program:
    """A compiled function, which lanes run together; made by `jit`."""

    def __init__(self, function: Callable[..., Any]):
        self._alone = jax.jit(function)
        self._together = jax.jit(over(function))

    def __call__(self, *arguments: Any) -> Any:
        lanes = current()
        if lanes is None:
            return self._alone(*arguments)
        return lanes.meet(self._together, arguments)

    def lower(self, *arguments: Any, count: int = 1) -> jax.stages.Lowered:
        """What one seed runs, or `count` lanes of them do, lowered for arrays or jax.ShapeDtypeStructs."""
        if count == 1:
            return self._alone.lower(*arguments)
        return self._together.lower((arguments,) * count)


def jit(function: Callable[..., Any]) -> Program:
    """`jax.jit` of a pure function of positional arguments; in lanes, of all of them at once."""
    return Program(function)


def _copy(leaf: Any) -> Any:
    return leaf.copy() if hasattr(leaf, "copy") else leaf
