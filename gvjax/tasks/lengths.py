"""Lengths: tokens without a meaning, of given numbers. For benchmarks and plans, before there is data.

    prompt      prompt_length random tokens
    completion  completion_length tokens, whatever they are

The reward is the share of even tokens, so that a run on a new machine can be seen to learn something.
"""

import dataclasses

import numpy as np

from gvjax.tasks.task import (
    Completions,
    Prompts,
    Split,
    check_rows_match,
    draw_prompts,
    read_completions,
)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The task.

    Attributes:
      vocab_size: V, >= 3; token 0 is kept for padding and stands in no prompt or demonstration.
      prompt_length, completion_length: tokens of every prompt and every completion, >= 1.
    """

    vocab_size: int = 256
    prompt_length: int = 32
    completion_length: int = 32

    def __post_init__(self):
        for name, least in (
            ("vocab_size", 3),
            ("prompt_length", 1),
            ("completion_length", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be at least {least}"
                )

    name = "lengths"
    pad_id = 0
    eos_id = None
    reward_range = (0.0, 1.0)

    @property
    def max_prompt_length(self) -> int:
        return self.prompt_length

    @property
    def max_completion_length(self) -> int:
        return self.completion_length

    def prompts(
        self,
        rng: np.random.Generator,
        count: int,
        split: Split,
        *,
        distinct: bool = False,
    ) -> Prompts:
        """See `Task.prompts`."""

        def draw(rng: np.random.Generator, rows: int) -> Prompts:
            return Prompts(*self._random(rng, rows, self.prompt_length))

        return draw_prompts(draw, rng, count, split, distinct=distinct)

    def demonstrations(self, rng: np.random.Generator, prompts: Prompts) -> Completions:
        """Random tokens, and even ones in every second place on average."""
        tokens, lengths = self._random(rng, len(prompts), self.completion_length)
        even = 2 * rng.integers(1, (self.vocab_size + 1) // 2, size=tokens.shape)
        return Completions(
            np.where(rng.random(tokens.shape) < 0.5, even, tokens), lengths
        )

    def reward(self, prompts: Prompts, completions: Completions) -> np.ndarray:
        """float32[N] in [0, 1]: even tokens among the completion's first `completion_length`."""
        check_rows_match(prompts, completions)
        tokens, _ = read_completions(completions, self.completion_length, None)
        even = (tokens >= 0) & (tokens % 2 == 0)
        return even.mean(axis=1, dtype=np.float32)

    def optimum(self, prompts: Prompts) -> np.ndarray:
        """1: nothing but even tokens."""
        return np.ones(len(prompts), np.float32)

    def decode(self, tokens: np.ndarray) -> str:
        """The numbers, padding left out."""
        return " ".join(str(token) for token in tokens if token != self.pad_id)

    def _random(
        self, rng: np.random.Generator, rows: int, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        tokens = rng.integers(1, self.vocab_size, size=(rows, length), dtype=np.int32)
        return tokens, np.full(rows, length, np.int32)
