"""A task made of rows: prompts, demonstrations, pairs and answers that stand in files, tokenised once.

It is a `tasks.task.Task`, so that recipes need not know; `labelled_pairs` and `demonstrations_at` alone ask whether a
task brings its own pairs and demonstrations. A dataset need not have a gold reward: then `reward_range` is None.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np

from gvjax.tasks.task import Completions, Prompts, Split, check_split
from gvjax.types import EosId

TEST_ORDER = 0
"""Seed of the order of test rows, the same for all seeds of a study."""

Judge = Callable[["RowPrompts", Completions, "Dataset"], np.ndarray]
"""`(prompts, completions, dataset) -> f32[N]`: a gold reward."""


@dataclasses.dataclass(frozen=True)
class RowPrompts(Prompts):
    """Prompts that know the row they come from, as several rows may have the same prompt.

    Attributes:
      rows: int64[N], positions in `Dataset.table`.
    """

    rows: np.ndarray

    def take(self, rows) -> Self:
        return type(self)(self.tokens[rows], self.lengths[rows], self.rows[rows])

    def repeat(self, times: int) -> Self:
        return type(self)(
            np.repeat(self.tokens, times, axis=0),
            np.repeat(self.lengths, times),
            np.repeat(self.rows, times),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Tokenised rows.

    Attributes:
      prompts: of all rows.
      completions: chosen and rejected of preference rows, the one completion of demonstrations, or nothing.
      answers: what a verifier compares with; None where a row has none.
    """

    prompts: Prompts
    completions: tuple[Completions, ...]
    answers: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: np.ndarray) -> "Table":
        return Table(
            self.prompts.take(rows),
            tuple(each.take(rows) for each in self.completions),
            tuple(self.answers[row] for row in rows),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Rows as a task.

    Attributes:
      name: short, for reports.
      tokenizer: `gvjax.data.tokenizer.TextTokenizer`.
      table: the rows of all splits.
      splits: split -> positions in the table.
      demonstrated: the rows that SFT imitates.
      max_prompt_length, max_completion_length: in tokens, EOS counted.
      judge: the gold reward, or None.
      reward_range: its bounds, or None.
      fingerprint: hex digest of all that decides prompts, completions and rewards.
      reference_logps: where the pairs' log-probabilities under the policy they are learned from are kept, or None.
    """

    name: str
    tokenizer: Any
    table: Table
    splits: Mapping[str, np.ndarray]
    demonstrated: Table
    max_prompt_length: int
    max_completion_length: int
    judge: Judge | None
    reward_range: tuple[float, float] | None
    fingerprint: str
    reference_logps: str | None = None

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id

    @property
    def eos_id(self) -> EosId:
        """Every token at which generation stops: a chat template may end a turn with another one than `eos_token`."""
        several = tuple(sorted(self.tokenizer.eos_ids))
        return several if len(several) > 1 else several[0]

    @property
    def has_pairs(self) -> bool:
        """Whether the rows are preferences."""
        return len(self.table.completions) == 2

    def size(self, split: Split) -> int:
        """Rows in a split."""
        check_split(split)
        return len(self.splits[split])

    def prompts(
        self,
        rng: np.random.Generator,
        count: int,
        split: Split,
        *,
        distinct: bool = False,
    ) -> RowPrompts:
        """Prompts of rows of one split in random order, no row twice (though several may have one prompt).

        Of the test split they are the first of one order, whatever `rng` is: all seeds of a study are then tested on the
        same prompts, and a statistic can tell what those contribute from what the seeds do.

        Raises:
          ValueError: the split is unknown or has fewer rows.
        """
        if split == "test":
            rng = np.random.default_rng(TEST_ORDER)
        rows = self.splits[split][rng.permutation(self.size(split))]
        if distinct:
            rows = rows[
                np.sort(np.unique(self._prompt_ids[rows], return_index=True)[1])
            ]
        if count > len(rows):
            raise ValueError(
                f"{count} prompts are asked for, but the {split} split of dataset {self.name} has {len(rows)}; ask for"
                " no more, or widen the split"
            )
        prompts, rows = self.table.prompts, rows[:count]
        return RowPrompts(prompts.tokens[rows], prompts.lengths[rows], rows)

    @functools.cached_property
    def _prompt_ids(self) -> np.ndarray:
        prompts = self.table.prompts
        keys = np.column_stack([prompts.tokens, prompts.lengths])
        return np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)

    def pairs(self, prompts: Prompts) -> tuple[Completions, Completions]:
        """(chosen, rejected) of the prompts' rows."""
        chosen, rejected = self.table.completions
        rows = _rows(prompts)
        return chosen.take(rows), rejected.take(rows)

    def demonstrations(self, rng: np.random.Generator, prompts: Prompts) -> Completions:
        """The rows' own completions, of pairs the chosen ones."""
        del rng
        return self.table.completions[0].take(_rows(prompts))

    def demonstrations_of(self, rows: np.ndarray) -> tuple[Prompts, Completions]:
        """Prompts and completions of some of the rows that SFT imitates."""
        table = self.demonstrated
        return table.prompts.take(rows), table.completions[0].take(rows)

    def reward(self, prompts: Prompts, completions: Completions) -> np.ndarray:
        """float32[N]: the gold reward.

        Raises:
          ValueError: there is none.
        """
        if self.judge is None:
            raise ValueError(
                f"dataset {self.name} has no gold reward; give task.gold in the config"
            )
        _rows(prompts)
        return self.judge(prompts, completions, self)  # type: ignore[arg-type]

    def optimum(self, prompts: Prompts) -> np.ndarray | None:
        """float32[N]: the upper bound of the gold reward where there is one."""
        if self.reward_range is None or not np.isfinite(self.reward_range[1]):
            return None
        return np.full(len(prompts), self.reward_range[1], np.float32)

    def decode(self, tokens: np.ndarray) -> str:
        """The text, without control tokens."""
        return self.tokenizer.decode(np.asarray(tokens).tolist())


def _rows(prompts: Prompts) -> np.ndarray:
    if not isinstance(prompts, RowPrompts):
        raise ValueError(
            "these prompts do not say which rows of the dataset they are; take them from its `prompts`"
        )
    return prompts.rows
