"""Rewards from a Python function that nobody has to trust: it may raise, return nonsense, hang or kill its process.

The function runs in a process of its own, one call after the other. Every call gets a reward; what went wrong is counted
by kind, and a batch in which too much went wrong is refused instead of being learned from.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import select
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Self

import numpy as np

START_LIMIT = 120.0
"""Seconds the function's module may take to be imported."""

_LARGEST = float(np.finfo(np.float32).max)
_SCRIPT = pathlib.Path(__file__).with_name("verifier_process.py")


class VerifierError(RuntimeError):
    """Too many calls of the verifier in one batch went wrong to go on."""


@dataclasses.dataclass
class Errors:
    """What went wrong in one way.

    Attributes:
      count: calls.
      first: what the first of them said, with its prompt and completion.
    """

    count: int
    first: str


class Verifier:
    """A reward function in a process of its own.

        verifier = Verifier("my_package.rewards:exact_match", time_limit=5.0)
        rewards = verifier(["2+2="], ["4"])              # f32[1]

    The process lives until `close`, the end of a `with` block, or the end of this object; after a call that ran out of
    time or took the process down with it, the next call starts a new one. What the function prints goes to standard
    error. JAX, if the function uses it, sees the CPU only there: the accelerator is taken.

    Attributes:
      calls: calls made.
      error_share: share of the latest batch that went wrong.
      errors: kind -> Errors; the kinds are `raised`, `not a number`, `not finite`, `timed out` and `died`.
    """

    def __init__(
        self,
        path: str,
        *,
        time_limit: float = 5.0,
        error_reward: float = 0.0,
        max_error_share: float = 0.1,
    ):
        """Starts the process and imports the function there.

        Args:
          path: `package.module:function`, called as `function(prompt: str, completion: str) -> float`.
          time_limit: > 0, seconds one call may take.
          error_reward: finite, reward of a completion whose call went wrong.
          max_error_share: in [0, 1]; a batch of which more than this went wrong raises.

        Raises:
          ValueError: an argument is impossible, or the function cannot be imported.
        """
        if not (0 < time_limit < math.inf):
            raise ValueError(
                f"time_limit is {time_limit}; it must be a positive number of seconds, e.g. 5.0"
            )
        if not abs(error_reward) <= _LARGEST:
            raise ValueError(
                f"error_reward is {error_reward}; it must be finite, e.g. 0.0"
            )
        if not 0 <= max_error_share <= 1:
            raise ValueError(
                f"max_error_share is {max_error_share}; it must lie in [0, 1], and 1 never stops"
            )
        module, _, name = path.partition(":")
        if not module or not name:
            raise ValueError(
                f"verifier {path!r} is not an import path; write package.module:function"
            )
        self._path = path
        self._time_limit = time_limit
        self._error_reward = error_reward
        self._max_error_share = max_error_share
        self._child: _Child | None = None
        self._end_child: weakref.finalize | None = None
        self.calls = 0
        self.error_share = 0.0
        self.errors: dict[str, Errors] = {}
        problem = self._start()
        if problem is not None:
            raise ValueError(
                f"cannot import the verifier {path!r}: {problem}. It is looked up as Python would from"
                f" {os.getcwd()}; install its package or set PYTHONPATH"
            )

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str]
    ) -> np.ndarray:
        """Rewards of completions, in their order.

        Args:
          prompts, completions: N texts each.

        Returns:
          f32[N]; `error_reward` where the call went wrong.

        Raises:
          VerifierError: more than `max_error_share` of these calls went wrong; raised as soon as that is certain.
        """
        if len(prompts) != len(completions):
            raise ValueError(
                f"{len(prompts)} prompts and {len(completions)} completions; give as many of each"
            )
        rewards = np.full(len(prompts), self._error_reward, np.float32)
        kinds: Counter[str] = Counter()
        self.error_share = 0.0
        allowed = self._max_error_share * len(prompts)
        for row, (prompt, completion) in enumerate(zip(prompts, completions)):
            value, kind, message = self._call(prompt, completion)
            self.calls += 1
            if kind is None:
                rewards[row] = value
                continue
            example = (
                f"{message} (prompt {_short(prompt)}, completion {_short(completion)})"
            )
            self.errors.setdefault(kind, Errors(0, example)).count += 1
            kinds[kind] += 1
            self.error_share = kinds.total() / len(prompts)
            if kinds.total() > allowed:
                named = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
                raise VerifierError(
                    f"the verifier {self._path} went wrong on {kinds.total()} of the first {row + 1} completions of a"
                    f" batch of {len(prompts)}, {kinds.total() / len(prompts):.1%} of it (allowed:"
                    f" {self._max_error_share:.1%}): {named}. The last one: {kind}: {example}. Mend the function, or"
                    " raise max_error_share or time_limit"
                )
        return rewards

    def close(self) -> None:
        """Ends the process; a later call starts a new one."""
        if self._end_child is not None:
            self._end_child()
        self._child = self._end_child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> str | None:
        """Starts a process; what is wrong with the function, or None."""
        self.close()
        child = _Child()
        end_child = weakref.finalize(self, child.kill)
        answer = child.ask({"path": self._path, "sys_path": sys.path}, START_LIMIT)
        if isinstance(answer, str):
            end_child()
            return f"importing it {answer}"
        if "problem" in answer:
            end_child()
            return answer["problem"]
        self._child, self._end_child = child, end_child
        return None

    def _call(self, prompt: str, completion: str) -> tuple[float, str | None, str]:
        """(value, kind of error or None, message)."""
        if self._child is None:
            problem = self._start()
            if problem is not None:
                raise VerifierError(
                    f"the verifier {self._path} could be imported before and now cannot: {problem}"
                )
        assert self._child is not None
        answer = self._child.ask(
            {"prompt": prompt, "completion": completion}, self._time_limit
        )
        if isinstance(answer, str):
            self.close()
            kind = "timed out" if answer.startswith("took longer") else "died"
            return math.nan, kind, f"the call {answer}"
        if "kind" in answer:
            return math.nan, answer["kind"], answer["message"]
        value = answer["value"]
        if not abs(value) <= _LARGEST:
            return math.nan, "not finite", f"returned {value}"
        return value, None, ""


class _Child:
    """A process of `verifier_process.py`, and its pipes."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            # -P keeps the script's folder off the path, so that nothing there hides a module of the user's.
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            # Its own process group: Ctrl-C is for us, and killing it takes along what the function started.
            start_new_session=True,
        )
        self._read = b""
        self._killed = False

    def ask(self, message: dict, limit: float) -> dict | str:
        """The answer, or what happened instead: `took longer than ...` or `ended its process ...`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._ended()
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        end = time.monotonic() + limit
        while b"\n" not in self._read:
            left = end - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return f"took longer than {limit:g} s"
            read = os.read(pipe, 65536)
            if not read:
                return self._ended()
            self._read += read
        line, self._read = self._read.split(b"\n", 1)
        return json.loads(line)

    def kill(self) -> None:
        """Ends the process and all it started."""
        if self._killed:
            # Its number may be somebody else's by now.
            return
        self._killed = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()

    def _ended(self) -> str:
        try:
            code = self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            return "ended its process without a word"
        if code < 0:
            return f"ended its process by {signal.Signals(-code).name}"
        return f"ended its process with exit code {code}"


def _short(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[:most] + "...")
