"""From examples to batches: sort into a few shapes, shuffle, pack, slice per process.

A batch is a pure function of (seed, step): `Batches.batch_at(step)` can be asked in any order, by any number of processes.
So the position of a run is its step, resume is exact, and the number of processes may change between the two.

Examples are tokenised before (`examples`): which of them share a shape, and hence what a step sees, depends on all
their lengths.
"""

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from gvjax.data import packing as packer
from gvjax.data.examples import Examples, LengthPolicy
from gvjax.data.schema import (
    DemonstrationRow,
    PreferenceRow,
    PromptRow,
    Row,
    UnpairedRow,
)
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


def _sides(examples: Examples) -> list[np.ndarray]:
    """For each completion of a row, the tokens of all rows' sequences with it."""
    return [examples.prompts.lengths + each.lengths for each in examples.completions]


def _pack(sides: list[np.ndarray], length: int) -> tuple[Units, np.ndarray | None]:
    """(the examples of each row, which pairs stand the other way round)."""
    if len(sides) == 1:
        return packer.pack(sides[0], length), None
    return packer.pack_pairs(sides[0], sides[1], length)


def shortened(examples: Examples) -> Examples:
    """The same examples, whose packed rows are as short as the same number of them may be: see `packing.shortest`."""
    sides = _sides(examples)
    length = packer.shortest(
        lambda length: len(_pack(sides, length)[0]),
        examples.lengths.buckets[-1],
        longest=int(max(each.max() for each in sides)),
        total=int(sum(each.sum() for each in sides)) // len(sides),
    )
    return dataclasses.replace(examples, lengths=LengthPolicy((length,)))


class Batches:
    """Batches at random access by step.

    Every epoch visits the rows in a new order. Rows are grouped by the shortest bucket that holds them; rows left over in
    one bucket move on to the next longer one. At most `batch_size - 1` rows are left over in an epoch, whichever come last
    in its order, however long they are. With packing, which sequences share a row is fixed, and the order of the rows
    changes.

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
        if examples.kind is UnpairedRow and min(batch_size, len(examples)) < 2:
            raise ValueError(
                "unpaired rows need a batch_size of at least 2, and there must be two: each row's prompt is also paired with"
                " another row's completion"
            )
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.shuffle, self.drop_remainder = shuffle, drop_remainder
        self.packing = packing
        buckets = examples.lengths.buckets
        self.swapped: np.ndarray | None = None
        self._units: Units = [(i,) for i in range(len(examples))]
        used = examples.totals
        if packing:
            sides = _sides(examples)
            self._units, self.swapped = _pack(sides, buckets[-1])
            if self.swapped is None:
                used = np.array([used[list(unit)].sum() for unit in self._units])
            else:
                used = packer.filled(self._units, sides[0], sides[1], self.swapped)
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
        if self.drop_remainder:
            # Before they are told apart by length, or a few longest rows would be left over in every epoch.
            order = order[: len(order) // self.batch_size * self.batch_size]
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
    if len(real) == 1:
        # What is left of an epoch: its own completion would make the KL that of the row itself.
        partner = {real[0]: (real[0] + 1) % len(examples)}
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
