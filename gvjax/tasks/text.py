"""Text tasks: a file with `examples` and `reward`, made into a task by one class and a byte tokenizer.

The whole of such a file is

    def examples(split):
        "Yields records of one split: {"prompt": str, "completion": str}."
        return in_split(({"prompt": f"double {n}: ", "completion": str(2 * n)} for n in range(999)), split)

    def reward(record, completion):
        return float(completion.strip() == record["completion"])

and, where wanted, `demonstration(rng, record) -> str` (else a record's completion is its demonstration),
`optimum(record) -> float`, and `REWARD_RANGE = (low, high)`. Keyword arguments of `examples` are options of the task.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

import numpy as np

from gvjax.tasks import bytes as byte_tokenizer
from gvjax.tasks import task as task_lib
from gvjax.tasks.task import Completions, Prompts, Split

Record = Mapping[str, Any]


def in_split(records: Iterable[Record], split: Split) -> Iterator[Record]:
    """The records whose prompt belongs to `split` by its hash (`task.split_of`)."""
    task_lib.check_split(split)
    remaining = iter(records)
    # Hashing many rows at once is a hundred times faster than one by one.
    while chunk := list(itertools.islice(remaining, 4096)):
        prompts = _encode_prompts([record["prompt"] for record in chunk])
        splits = task_lib.split_of(prompts).tolist()
        yield from (record for record, name in zip(chunk, splits) if name == split)


@dataclasses.dataclass(frozen=True, eq=False)
class TextTask:
    """A file of text examples as a `task.Task`.

    Prompts are BOS and the prompt's bytes; completions are bytes and EOS. A reward sees the text before the first EOS,
    or all of it where a completion was cut off. Gold rewards are computed row by row in Python.

    Attributes:
      file: a module, or any object with its functions.
      name: short, for reports.
      options: keyword arguments for `file.examples`.
      completion_limit: the longest completion in tokens, EOS counted; None takes twice the longest of the records'.
    """

    file: Any
    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    completion_limit: int | None = None

    vocab_size = byte_tokenizer.VOCAB_SIZE
    pad_id = byte_tokenizer.PAD_ID
    eos_id = byte_tokenizer.EOS_ID

    @functools.cached_property
    def records(self) -> Mapping[str, list[Record]]:
        """The records of each split.

        Raises:
          ValueError: a prompt comes in two splits, or twice in one, or a split is empty.
        """
        records = {
            split: list(self.file.examples(split, **self.options))
            for split in get_args(Split)
        }
        where: dict[str, str] = {}
        for split, rows in records.items():
            if not rows:
                raise ValueError(f"task {self.name} has no {split} records; yield more")
            for record in rows:
                other = where.setdefault(record["prompt"], split)
                if other != split:
                    raise ValueError(
                        f"task {self.name} has the prompt {record['prompt']!r} in both "
                        f"{other} and {split}; split by gvjax.tasks.text.in_split"
                    )
            if len({record["prompt"] for record in rows}) < len(rows):
                raise ValueError(
                    f"task {self.name} repeats prompts in {split}; yield each once"
                )
        return records

    @functools.cached_property
    def _by_prompt(self) -> Mapping[bytes, Record]:
        return {
            bytes(byte_tokenizer.encode(record["prompt"])): record
            for rows in self.records.values()
            for record in rows
        }

    @functools.cached_property
    def max_prompt_length(self) -> int:
        return 1 + max(map(len, self._by_prompt))

    @functools.cached_property
    def max_completion_length(self) -> int:
        if self.completion_limit is not None:
            return self.completion_limit
        lengths = [
            len(byte_tokenizer.encode(record["completion"]))
            for record in self._by_prompt.values()
        ]
        return 2 * max(lengths) + 1

    @property
    def reward_range(self) -> tuple[float, float]:
        return getattr(self.file, "REWARD_RANGE", (-np.inf, np.inf))

    def prompts(
        self,
        rng: np.random.Generator,
        count: int,
        split: Split,
        *,
        distinct: bool = False,
    ) -> Prompts:
        """Prompts of records drawn uniformly from one split; see `task.Task`."""
        task_lib.check_split(split)
        rows = self.records[split]
        if distinct and count > len(rows):
            raise ValueError(
                f"the {split} split has only {len(rows)} distinct prompts and count asks "
                f"for {count}; ask for fewer, pass distinct=False or make the task larger"
            )
        picks = rng.choice(len(rows), size=count, replace=not distinct)
        return _encode_prompts(
            [rows[pick]["prompt"] for pick in picks], self.max_prompt_length
        )

    def _records_of(self, prompts: Prompts) -> list[Record]:
        found = []
        for tokens, length in zip(prompts.tokens, prompts.lengths):
            row = tokens[1:length].tolist()
            key = bytes(row) if all(0 <= token < 256 for token in row) else b""
            if key not in self._by_prompt:
                raise ValueError(
                    f"{self.decode(tokens[:length])!r} is no prompt of task {self.name}; "
                    "take prompts from its `prompts`"
                )
            found.append(self._by_prompt[key])
        return found

    def demonstrations(self, rng: np.random.Generator, prompts: Prompts) -> Completions:
        """What `file.demonstration` writes, or the records' completions.

        Raises:
          ValueError: a demonstration is longer than `max_completion_length`.
        """
        demonstration = getattr(self.file, "demonstration", None)
        width = self.max_completion_length
        tokens = np.full((len(prompts), width), self.pad_id, np.int32)
        lengths = np.zeros(len(prompts), np.int32)
        for row, record in enumerate(self._records_of(prompts)):
            text = demonstration(rng, record) if demonstration else record["completion"]
            ids = [*byte_tokenizer.encode(text), self.eos_id]
            if len(ids) > width:
                raise ValueError(
                    f"the demonstration {text!r} has {len(ids)} tokens with EOS; raise "
                    f"completion_limit, which is {width}"
                )
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids)
        return Completions(tokens, lengths)

    def reward(self, prompts: Prompts, completions: Completions) -> np.ndarray:
        """float32[N]: `file.reward` of each row; what that raises is not caught here."""
        task_lib.check_rows_match(prompts, completions)
        tokens, lengths = task_lib.read_completions(
            completions, self.max_completion_length, self.eos_id
        )
        rewards = [
            self.file.reward(record, byte_tokenizer.decode(row[:length].tolist()))
            for record, row, length in zip(self._records_of(prompts), tokens, lengths)
        ]
        return np.array(rewards, np.float32)

    def optimum(self, prompts: Prompts) -> np.ndarray | None:
        """float32[N]: `file.optimum` of each prompt's record; None without that function."""
        optimum = getattr(self.file, "optimum", None)
        if optimum is None:
            return None
        best = [optimum(record) for record in self._records_of(prompts)]
        return np.array(best, np.float32)

    def decode(self, tokens: np.ndarray) -> str:
        """The text; `<eos>` where it ends."""
        return byte_tokenizer.decode(np.asarray(tokens).tolist())


def _encode_prompts(texts: list[str], width: int | None = None) -> Prompts:
    """BOS and bytes, padded to `width` or to the longest."""
    rows = [[byte_tokenizer.BOS_ID, *byte_tokenizer.encode(text)] for text in texts]
    width = max(map(len, rows)) if width is None else width
    tokens = np.full((len(rows), width), byte_tokenizer.PAD_ID, np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    return Prompts(tokens, np.array([len(ids) for ids in rows], np.int32))
