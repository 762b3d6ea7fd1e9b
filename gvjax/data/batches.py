"""From rows to batches: tokenise, cut to length, sort into a few shapes, shuffle, pack, slice per process.

A batch is a pure function of (seed, step): `Batches.batch_at(step)` can be asked in any order, by any number of processes.
So the position of a run is its step, resume is exact, and the number of processes may change between the two.

Rows are tokenised once, up front: which rows share a shape, and hence what a step sees, depends on all their lengths.
"""

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import grain
import jax
import numpy as np

from gvjax.data import packing as packer
from gvjax.data import schema
from gvjax.data import tokenizer as tokenizers
from gvjax.data.schema import (
    DemonstrationRow,
    FaultReport,
    PreferenceRow,
    PromptRow,
    Row,
    Text,
    UnpairedRow,
)
from gvjax.data.sources import Rows
from gvjax.data.templates import ChatTemplate
from gvjax.data.tokenizer import TextTokenizer
from gvjax.types import PreferenceBatch, SequenceBatch, UnpairedBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts to sample from.

    Attributes:
      tokens: int32[B, P], prompt then padding.
      lengths: int32[B], tokens in each prompt; 0 on filler rows.
      rows: int32[B], positions in the rows that were encoded, for looking up answers; -1 on filler rows.
    """

    tokens: Any
    lengths: Any
    rows: Any


Truncation = Literal["left", "right", "newline"]


@dataclasses.dataclass(frozen=True)
class LengthPolicy:
    """How long sequences may be, and what is cut where they are longer.

    Attributes:
      buckets: the total lengths T that batches come in, ascending; each is one compiled shape.
      max_prompt: > 0, longest prompt in tokens, BOS included; None for what the completion leaves free. Give it where
        prompts must be the same for sampling and for training.
      max_completion: > 0, longest completion in tokens, EOS included; None for all but one token. A longer one is cut at its
        right end and has no EOS, since it does not end there.
      prompt_truncation: "left" drops the beginning (BOS stays; of a conversation the template's opening goes too), "right" the end, "newline" whole lines before the last
        one (plain text only): the last line, such as "TL;DR:", stays, as in Stiennon et al., 2020,
        https://arxiv.org/abs/2009.01325.
    """

    buckets: tuple[int, ...]
    max_prompt: int | None = None
    max_completion: int | None = None
    prompt_truncation: Truncation = "left"

    def __post_init__(self):
        buckets = self.buckets
        if not buckets or buckets[0] < 2 or list(buckets) != sorted(set(buckets)):
            raise ValueError(
                f"buckets {buckets} must be ascending lengths of at least 2, as (128, 256, 512)"
            )
        for name in ("max_prompt", "max_completion"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= buckets[-1]:
                raise ValueError(
                    f"{name} {value} must lie in [1, {buckets[-1]}], the longest bucket; widen the buckets or lower it"
                )
        if (self.max_prompt or 0) + (self.max_completion or 0) > buckets[-1]:
            raise ValueError(
                f"max_prompt {self.max_prompt} and max_completion {self.max_completion} together exceed the longest "
                f"bucket {buckets[-1]}; add a longer bucket"
            )
        if self.prompt_truncation not in ("left", "right", "newline"):
            raise ValueError(
                f"prompt_truncation {self.prompt_truncation!r} must be 'left', 'right' or 'newline'"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Tokenising
# ---------------------------------------------------------------------------------------------------------------------

_COMPLETIONS: Mapping[type[Row], tuple[str, ...]] = {
    PromptRow: (),
    DemonstrationRow: ("completion",),
    PreferenceRow: ("chosen", "rejected"),
    UnpairedRow: ("completion",),
}


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenised row.

    Attributes:
      prompt: int32[P], ids.
      completions: int32[C] each, ids, EOS included unless it was cut.
      truncated: whether anything was cut.
    """

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    truncated: bool


def encode_row(
    row: Row,
    tokenizer: TextTokenizer,
    lengths: LengthPolicy,
    template: ChatTemplate | None = None,
) -> Example:
    """Example: the row's ids, cut to length.

    Plain text becomes BOS (where the tokenizer wants one), prompt, completion, EOS; a conversation is what the template
    makes of it. Prompt and completions are encoded apart and concatenated.

    Raises:
      ValueError: for a conversation without a template, or a template that cannot be encoded in parts.
    """
    prompt_text: Text = row.prompt  # type: ignore[attr-defined]
    texts = [getattr(row, name) for name in _COMPLETIONS[type(row)]]
    if isinstance(prompt_text, str):
        prompt = tokenizers.begin(tokenizer, tokenizer.encode(prompt_text))
        completions = [
            tokenizers.end(tokenizer, tokenizer.encode(text)) for text in texts
        ]
    else:
        if template is None:
            raise ValueError(
                f"row {row.row_id} is a conversation, and there is no chat template; give one, such as "
                "templates.CHATML_TEMPLATE"
            )
        try:
            prompt = template.encode_prompt(tokenizer, prompt_text)
            completions = [
                template.encode_completion(tokenizer, prompt_text, text)
                for text in texts
            ]
        except ValueError as error:
            raise ValueError(f"row {row.row_id}: {error}") from error
    return _cut(prompt, completions, prompt_text, tokenizer, lengths)


def _cut(
    prompt: list[int],
    completions: list[list[int]],
    prompt_text: Text,
    tokenizer: TextTokenizer,
    lengths: LengthPolicy,
) -> Example:
    longest = lengths.buckets[-1]
    limit = lengths.max_completion or longest - 1
    cut = tuple(completion[:limit] for completion in completions)
    room = longest - max(map(len, cut), default=0)
    room = min(room, lengths.max_prompt or room)
    truncated = cut != tuple(completions)
    if len(prompt) > room:
        truncated = True
        prompt = _cut_prompt(prompt, prompt_text, room, tokenizer, lengths)
    return Example(
        np.array(prompt, np.int32),
        tuple(np.array(ids, np.int32) for ids in cut),
        truncated,
    )


def _cut_prompt(
    prompt: list[int],
    text: Text,
    room: int,
    tokenizer: TextTokenizer,
    lengths: LengthPolicy,
) -> list[int]:
    if lengths.prompt_truncation == "right":
        return prompt[:room]
    if lengths.prompt_truncation == "newline":
        if not isinstance(text, str):
            raise ValueError(
                "prompt_truncation 'newline' is for plain text, and this prompt is a conversation; use 'left'"
            )
        found = _cut_lines(text, room, tokenizer)
        if found is not None:
            return found
    if prompt[0] == tokenizer.bos_id and room > 1:
        return [prompt[0], *prompt[len(prompt) - room + 1 :]]
    return prompt[len(prompt) - room :]


def _cut_lines(text: str, room: int, tokenizer: TextTokenizer) -> list[int] | None:
    """The prompt with as few lines dropped before its last one as fit into `room`; None where none is short enough."""
    tail_at = len(text[: text.rfind("\n") + 1].rstrip("\n"))
    body, tail = text[:tail_at], text[tail_at:]
    while (end := body.rfind("\n")) >= 0:
        body = body[:end]
        ids = tokenizers.begin(tokenizer, tokenizer.encode(body + tail))
        if len(ids) <= room:
            return ids
    return None


@dataclasses.dataclass(frozen=True)
class _Ragged:
    """Lists of ids in one array."""

    flat: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, lists: Sequence[np.ndarray]) -> "_Ragged":
        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(ids) for ids in lists], out=offsets[1:])
        return cls(np.concatenate(lists), offsets)

    @classmethod
    def rows(cls, tokens: np.ndarray, lengths: np.ndarray) -> "_Ragged":
        """Of padded rows."""
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        inside = np.arange(tokens.shape[1]) < lengths[:, None]
        return cls(tokens[inside], offsets)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclasses.dataclass(frozen=True)
class Examples:
    """All rows, tokenised.

    Attributes:
      kind: the row type, which decides what kind of batch they make.
      rows: int64[n], positions in the rows that were encoded.
      prompts: ids of the prompts.
      completions: for each completion of a row, ids of all rows' completions.
      margins: f32[n], or None unless every row has one.
      labels: bool[n], or None.
      ref_logps: (chosen f32[n], rejected f32[n]), nats, summed, under the reference policy; None where not computed.
      truncated: bool[n], whether anything was cut.
      lengths: the policy they were cut by.
      pad_id: what batches are filled up with.
      report: how many rows were too long, and their fate.
      fingerprint: hex digest of rows, tokenizer, template and policy.
    """

    kind: type[Row]
    rows: np.ndarray
    prompts: _Ragged
    completions: tuple[_Ragged, ...]
    margins: np.ndarray | None
    labels: np.ndarray | None
    truncated: np.ndarray
    lengths: LengthPolicy
    pad_id: int
    report: FaultReport
    fingerprint: str
    ref_logps: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def totals(self) -> np.ndarray:
        """int64[n]: tokens of the prompt with the longer completion."""
        totals = self.prompts.lengths
        if self.completions:
            totals = totals + np.max([each.lengths for each in self.completions], 0)
        return totals

    def bucket_shares(self) -> dict[int, float]:
        """Bucket -> share of rows in it."""
        which = np.searchsorted(self.lengths.buckets, self.totals)
        counts = np.bincount(which, minlength=len(self.lengths.buckets))
        return {
            bucket: count / max(len(self), 1)
            for bucket, count in zip(self.lengths.buckets, counts.tolist())
        }


def encode_rows(
    rows: Rows,
    tokenizer: TextTokenizer,
    lengths: LengthPolicy,
    *,
    template: ChatTemplate | None = None,
    drop: Iterable[str] = (),
    max_bad_share: float = 0.05,
    num_threads: int = 4,
) -> Examples:
    """Examples: all rows, tokenised.

    Args:
      rows: of one kind.
      tokenizer: text to ids.
      lengths: what is cut.
      template: for conversations.
      drop: where it names "too_long", rows that would be cut are left out instead; other faults are dropped by `load`.
      max_bad_share: in [0, 1], the largest share of rows that may be left out so. Cutting is no fault: its count is
        reported, and has no bound.
      num_threads: >= 0, threads that tokenise; the result does not depend on it.

    Raises:
      ValueError: where no row is left, or too many would be left out.
    """
    encode = functools.partial(
        encode_row, tokenizer=tokenizer, lengths=lengths, template=template
    )
    pipeline = grain.MapDataset.source(rows).map(lambda row: (row, encode(row)))
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=128)
    pairs = list(pipeline.to_iter_dataset(options)) if len(rows) else []
    too_long = [i for i, (_, example) in enumerate(pairs) if example.truncated]
    dropping = "too_long" in frozenset(drop)
    kept, report = schema.sift(
        len(pairs),
        {"too_long": too_long},
        (),
        lambda i: pairs[i][0].row_id or str(i),
        drop=drop,
        max_bad_share=max_bad_share if dropping else 1.0,
    )
    if not len(kept):
        raise ValueError(
            f"no row is left of {len(pairs)}; lengthen the buckets {lengths.buckets} or do not drop 'too_long'"
        )
    pairs = [pairs[i] for i in kept]
    examples = [example for _, example in pairs]
    margins = [getattr(row, "margin", None) for row, _ in pairs]
    labels = [getattr(row, "label", None) for row, _ in pairs]
    identity = [
        rows.fingerprint,
        tokenizer.fingerprint,
        template.fingerprint if template else None,
        dataclasses.astuple(lengths),
        sorted(drop),
    ]
    return Examples(
        kind=type(pairs[0][0]),
        rows=kept,
        prompts=_Ragged.of([example.prompt for example in examples]),
        completions=tuple(
            _Ragged.of([example.completions[slot] for example in examples])
            for slot in range(len(examples[0].completions))
        ),
        # A batch either has margins or not: a pytree whose structure changed between steps would compile again.
        margins=None if None in margins else np.array(margins, np.float32),
        labels=None if None in labels else np.array(labels, bool),
        truncated=np.array([example.truncated for example in examples]),
        lengths=lengths,
        pad_id=tokenizer.pad_id,
        report=report,
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
    )


def examples_of(
    kind: type[Row],
    prompts: tuple[np.ndarray, np.ndarray],
    completions: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    lengths: LengthPolicy,
    pad_id: int,
    ref_logps: tuple[np.ndarray, np.ndarray] | None = None,
) -> Examples:
    """Examples of rows that are tokenised already.

    Args:
      kind: what they are: DemonstrationRow has one completion, PreferenceRow two.
      prompts: (tokens int32[n, P], lengths int32[n]).
      completions: the same for every completion.
      lengths: the rows they are put into; nothing is cut.
      pad_id: what rows are filled up with.
      ref_logps: see `Examples`.

    Raises:
      ValueError: a row is longer than the longest bucket.
    """
    sides = [_Ragged.rows(*each) for each in (prompts, *completions)]
    count, digest = len(prompts[0]), hashlib.sha256()
    for side in sides:
        digest.update(side.flat.tobytes() + side.offsets.tobytes())
    made = Examples(
        kind=kind,
        rows=np.arange(count),
        prompts=sides[0],
        completions=tuple(sides[1:]),
        margins=None,
        labels=None,
        truncated=np.zeros(count, bool),
        lengths=lengths,
        pad_id=pad_id,
        report=FaultReport(count, count, {}, {}),
        fingerprint=digest.hexdigest(),
        ref_logps=ref_logps,
    )
    longest = made.totals.max(initial=0)
    if longest > lengths.buckets[-1]:
        raise ValueError(
            f"a row has {longest} tokens, more than the longest bucket {lengths.buckets[-1]}; add a longer one"
        )
    return made


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------

Units = Sequence[tuple[int, ...]]
"""For each row of a batch the examples in it: one; several where they are packed; none on a filler row."""


def _sequences(
    examples: Examples,
    units: Units,
    length: int,
    slot: int = 0,
    *,
    segments: bool = False,
    swapped: np.ndarray | None = None,
    completion_of: Callable[[int], int] = lambda i: i,
) -> SequenceBatch:
    """SequenceBatch of `[len(units), length]`, cut on the right where a foreign completion makes it longer."""
    shape = (len(units), length)
    tokens = np.full(shape, examples.pad_id, np.int32)
    mask = np.zeros(shape, bool)
    numbers = np.zeros(shape, np.int32)
    for b, unit in enumerate(units):
        start = 0
        for number, example in enumerate(unit, start=1):
            prompt = examples.prompts[example]
            other = swapped is not None and swapped[example]
            completion = examples.completions[slot ^ other][completion_of(example)]
            middle = min(start + len(prompt), length)
            stop = min(middle + len(completion), length)
            tokens[b, start:middle] = prompt[: middle - start]
            tokens[b, middle:stop] = completion[: stop - middle]
            # A sequence's first token has nothing before it that could predict it.
            mask[b, max(middle, start + 1) : stop] = True
            numbers[b, start:stop] = number
            start = stop
    # NumPy's on the host; the first jit that sees them makes them jax's.
    arrays: Any = (tokens, mask, numbers if segments else None)
    return SequenceBatch(*arrays)


def _values(
    values: np.ndarray | None, units: Units, filler: Any, width: int | None = None
) -> np.ndarray | None:
    """[B] of the first example of every unit; with a width, [B, width] of all of them."""
    if values is None:
        return None
    if width is None:
        return np.array([values[unit[0]] if unit else filler for unit in units])
    made = np.full((len(units), width), filler, values.dtype)
    for row, unit in zip(made, units):
        row[: len(unit)] = values[list(unit)]
    return made


def _weights(units: Units, filled: bool) -> np.ndarray | None:
    return np.array([bool(unit) for unit in units], np.float32) if filled else None


class Batches:
    """Batches at random access by step.

    Every epoch visits the rows in a new order. Rows are grouped by the shortest bucket that holds them; rows left over in
    one bucket move on to the next longer one, so that at most `batch_size - 1` rows (of the longest) are left over in an
    epoch. With packing, which sequences share a row is fixed, and the order of the rows changes.

    Args:
      examples: tokenised rows; their kind decides the batch: PromptBatch, SequenceBatch, PreferenceBatch or
        UnpairedBatch, of numpy arrays.
      batch_size: > 0, rows of the global batch.
      seed: in [0, 2**63), decides the order.
      shuffle: False keeps the order of the rows within each bucket, shortest bucket first.
      drop_remainder: False fills the last batch of an epoch with empty rows: masks all False, weight 0.
      packing: True puts several demonstrations into one row, or several pairs into a row of `chosen` and the same row of
        `rejected`, told apart by `segments`. Rows are filled up to the longest bucket; one that stays emptier goes into
        the shortest bucket that holds it.

    Attributes:
      batches_per_epoch: number of batches in an epoch, the same for all epochs.
      fingerprint: hex digest of everything that decides what a step sees.
      swapped: bool[n], which pairs stand the other way round; None unless pairs are packed.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        drop_remainder: bool = True,
        packing: bool = False,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {seed} must lie in [0, 2**63)")
        if packing and examples.kind not in (DemonstrationRow, PreferenceRow):
            raise ValueError(
                f"packing is for demonstrations and pairs, and these are {examples.kind.__name__}; set packing to False"
            )
        if examples.kind is UnpairedRow and batch_size < 2:
            raise ValueError(
                "unpaired rows need a batch_size of at least 2: each row's prompt is also paired with another row's completion"
            )
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.shuffle, self.drop_remainder = shuffle, drop_remainder
        self.packing = packing
        buckets = examples.lengths.buckets
        self.swapped: np.ndarray | None = None
        self._units: Units = [(i,) for i in range(len(examples))]
        used = examples.totals
        if packing and examples.kind is DemonstrationRow:
            self._units = packer.pack(examples.totals, buckets[-1])
            used = np.array([used[list(unit)].sum() for unit in self._units])
        elif packing:
            first, second = (
                examples.prompts.lengths + each.lengths for each in examples.completions
            )
            self._units, self.swapped = packer.pack_pairs(first, second, buckets[-1])
            used = packer.filled(self._units, first, second, self.swapped)
        # The same for every batch, so that packing adds no shapes.
        self._widest = max(map(len, self._units), default=1)
        self._bucket_of = np.searchsorted(buckets, used)
        self.batches_per_epoch = len(self._plan(0))
        if not self.batches_per_epoch:
            raise ValueError(
                f"{len(self._units)} rows do not make one batch of batch_size {batch_size}; lower it, or set "
                "drop_remainder to False"
            )
        identity = [
            examples.fingerprint,
            batch_size,
            seed,
            shuffle,
            drop_remainder,
            packing,
        ]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self._plan_of_epoch = functools.lru_cache(maxsize=2)(self._plan)

    def _order(self, epoch: int, role: int, count: int) -> np.ndarray:
        """int64[count]: a permutation; raw Philox output, which numpy keeps the same across its versions."""
        if not self.shuffle:
            return np.arange(count)
        raw = np.random.Philox(key=[self.seed, 2 * epoch + role]).random_raw(count)
        return np.argsort(raw, kind="stable")

    def _plan(self, epoch: int) -> list[tuple[np.ndarray, int]]:
        """(units, length) of each batch of an epoch; -1 stands for a filler row."""
        order = self._order(epoch, 0, len(self._units))
        batches = []
        carried = np.zeros(0, np.int64)
        for bucket, length in enumerate(self.examples.lengths.buckets):
            here = np.concatenate([carried, order[self._bucket_of[order] == bucket]])
            full = len(here) // self.batch_size * self.batch_size
            batches += [
                (units, length) for units in here[:full].reshape(-1, self.batch_size)
            ]
            carried, last = here[full:], length
            if len(carried) and not (self._bucket_of > bucket).any():
                break
        if len(carried) and not self.drop_remainder:
            filler = np.full(self.batch_size - len(carried), -1)
            batches.append((np.concatenate([carried, filler]), last))
        return [batches[i] for i in self._order(epoch, 1, len(batches))]

    def _units_at(
        self, step: int, rows: slice | Sequence[int] | np.ndarray | None
    ) -> tuple[Units, Units, int]:
        """(units of the asked rows, units of all rows, length)."""
        if step < 0:
            raise ValueError(f"step {step} must not be negative")
        epoch, position = divmod(int(step), self.batches_per_epoch)
        chosen, length = self._plan_of_epoch(epoch)[position]
        every = [self._units[i] if i >= 0 else () for i in chosen.tolist()]
        if rows is None:
            return every, every, length
        return (
            [every[i] for i in np.arange(self.batch_size)[rows].tolist()],
            every,
            length,
        )

    def batch_at(
        self, step: int, rows: slice | Sequence[int] | np.ndarray | None = None
    ) -> Any:
        """The batch of a step, as numpy arrays.

        Args:
          step: >= 0; steps go on over epochs without end.
          rows: which rows of the global batch to make, as a slice or positions; None for all. Each process asks for the rows
            that its devices hold (`process_rows`).
        """
        units, every, length = self._units_at(step, rows)
        return _MAKERS[self.examples.kind](self, units, every, length)

    @property
    def pairs_per_row(self) -> int:
        """S: the most examples that share a row."""
        return self._widest

    def padding(self, epoch: int = 0) -> float:
        """Share of an epoch's positions that hold no token."""
        examples = self.examples
        sides = max(len(examples.completions), 1)
        positions = tokens = 0
        for units, length in self._plan(epoch):
            positions += sides * self.batch_size * length
            for unit in units[units >= 0].tolist():
                some = list(self._units[unit])
                tokens += sides * int(examples.prompts.lengths[some].sum())
                tokens += sum(int(c.lengths[some].sum()) for c in examples.completions)
        return 1 - tokens / positions

    def rows_at(
        self, step: int, rows: slice | Sequence[int] | np.ndarray | None = None
    ) -> list[tuple[int, ...]]:
        """For each row of the batch, the positions (in the rows that were encoded) of what is in it."""
        units, _, _ = self._units_at(step, rows)
        return [
            tuple(int(self.examples.rows[example]) for example in unit)
            for unit in units
        ]

    def iterate(
        self,
        start_step: int = 0,
        stop_step: int | None = None,
        *,
        rows: slice | Sequence[int] | np.ndarray | None = None,
        prefetch: int = 2,
    ) -> Iterator[Any]:
        """Yields `batch_at(step, rows)` for the steps from `start_step` on, made ahead of time by `prefetch` threads."""
        stop = sys.maxsize if stop_step is None else stop_step
        if not 0 <= start_step <= stop:
            raise ValueError(
                f"start_step {start_step} must lie in [0, stop_step {stop_step}]"
            )
        if start_step == stop:
            return iter(())
        dataset = grain.MapDataset.source(range(start_step, stop)).map(
            lambda step: self.batch_at(step, rows)
        )
        return iter(
            dataset.to_iter_dataset(
                grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
            )
        )

    def check_resume(self, fingerprint: str) -> None:
        """Raises ValueError where a run that saw the data of `fingerprint` would go on with other data."""
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the data changed since the checkpoint (fingerprint {self.fingerprint[:12]}, was {fingerprint[:12]}): "
                "files, tokenizer, template, lengths, batch_size, seed and packing must be the same; start a new run, or "
                "bring them back"
            )


def _make_prompts(batches: Batches, units: Units, every: Units, length: int):
    del every
    examples = batches.examples
    tokens = np.full((len(units), length), examples.pad_id, np.int32)
    for b, unit in enumerate(units):
        for example in unit:
            prompt = examples.prompts[example]
            tokens[b, : len(prompt)] = prompt
    return PromptBatch(
        tokens=tokens,
        lengths=np.array(
            [len(examples.prompts[unit[0]]) if unit else 0 for unit in units], np.int32
        ),
        rows=np.array(
            [examples.rows[unit[0]] if unit else -1 for unit in units], np.int32
        ),
    )


def _make_sequences(batches: Batches, units: Units, every: Units, length: int):
    del every
    return _sequences(batches.examples, units, length, segments=batches.packing)


def _make_preferences(batches: Batches, units: Units, every: Units, length: int):
    del every
    examples = batches.examples
    width = batches.pairs_per_row if batches.packing else None
    some = functools.partial(
        _sequences,
        examples,
        units,
        length,
        segments=batches.packing,
        swapped=batches.swapped,
    )
    values = functools.partial(_values, units=units, filler=np.float32(0), width=width)
    weight: Any = _weights(units, not batches.drop_remainder)
    if batches.packing:
        weight = values(np.ones(len(examples), np.float32))
    reference: tuple[Any, Any] = examples.ref_logps or (None, None)
    fields: dict[str, Any] = {
        "ref_chosen_logps": values(reference[0]),
        "ref_rejected_logps": values(reference[1]),
        "margin": values(examples.margins),
        "weight": weight,
        "swapped": _values(batches.swapped, units, np.bool_(False), width),
    }
    return PreferenceBatch(chosen=some(0), rejected=some(1), **fields)


def _make_unpaired(batches: Batches, units: Units, every: Units, length: int):
    examples = batches.examples
    # Each prompt with the next row's completion, over the global batch: no process's share changes anybody's partner.
    real = [unit[0] for unit in every if unit]
    partner = dict(zip(real, real[1:] + real[:1]))
    return UnpairedBatch(  # type: ignore[call-arg,unused-ignore]
        sequences=_sequences(examples, units, length),
        desirable=_values(examples.labels, units, np.bool_(False)),  # type: ignore[arg-type]
        kl_sequences=_sequences(
            examples, units, length, completion_of=partner.__getitem__
        ),
        weight=_weights(units, not batches.drop_remainder),  # type: ignore[arg-type]
    )


_MAKERS: Mapping[type[Row], Callable[[Batches, Units, Units, int], Any]] = {
    PromptRow: _make_prompts,
    DemonstrationRow: _make_sequences,
    PreferenceRow: _make_preferences,
    UnpairedRow: _make_unpaired,
}


def process_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that one of `process_count` processes makes, contiguous and of equal number.

    Raises:
      ValueError: where they cannot be equal.
    """
    if batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} is not divisible by the {process_count} processes; use "
            f"{batch_size // process_count * process_count or process_count}"
        )
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)
