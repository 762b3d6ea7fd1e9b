"""The input pipeline off the critical path: the next steps' batches are made while the device works on this one's."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Ahead(Generic[Made]):
    """`make(step)`, made by a thread a few steps before it is asked for.

    Whatever is asked for is what `make` gives, in any order, so a resumed run needs nothing from here. An error in `make`
    comes out where its step is asked for.

    Args:
      make: a pure function of the step. It runs in another thread: host work only, no devices.
      stop: the first step that will not be asked for; None where there is no end.
      ahead: >= 0, how many steps are made before they are asked for; 0 makes each when it is asked for.
    """

    def __init__(
        self, make: Callable[[int], Made], *, stop: int | None = None, ahead: int = 2
    ):
        if ahead < 0:
            raise ValueError(f"ahead is {ahead}; it must be at least 0")
        self._make, self._stop, self._ahead = make, stop, ahead
        self._pending: dict[int, Future[Made]] = {}
        # One thread: batches come in order, and a second one would only take the interpreter from the loop.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gvjax-ahead")

    def __call__(self, step: int) -> Made:
        if not self._ahead:
            return self._make(step)
        wanted = range(step, step + self._ahead + 1)
        # After a jump, what was made for other steps is let go of.
        for other in [other for other in self._pending if other not in wanted]:
            self._pending.pop(other).cancel()
        for each in wanted:
            beyond = self._stop is not None and each >= self._stop and each != step
            if each not in self._pending and not beyond:
                self._pending[each] = self._thread.submit(self._make, each)
        return self._pending.pop(step).result()
