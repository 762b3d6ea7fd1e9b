"""Looking at data before training on it: what a step sees, in colour, and what is odd about the rows, in numbers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.table
import rich.text

from gvjax.data import schema
from gvjax.data.batches import Batches, PromptBatch
from gvjax.data.examples import Examples
from gvjax.data.schema import FaultReport, PreferenceRow, UnpairedRow
from gvjax.data.sources import Rows
from gvjax.data.tokenizer import TextTokenizer
from gvjax.types import PreferenceBatch, SequenceBatch

PROMPT_STYLE, COMPLETION_STYLE, END_STYLE = "dim", "green", "bold black on green"


def _sequences(batch: Any) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """name -> (tokens [B, T], completion mask [B, T], lengths [B])."""
    if isinstance(batch, PromptBatch):
        return {
            "prompt": (batch.tokens, np.zeros(batch.tokens.shape, bool), batch.lengths)
        }
    named: Mapping[str, SequenceBatch]
    if isinstance(batch, PreferenceBatch):
        named = {"chosen": batch.chosen, "rejected": batch.rejected}
    elif isinstance(batch, SequenceBatch):
        named = {"sequence": batch}
    else:
        named = {"sequence": batch.sequences}
    found = {}
    for name, each in named.items():
        mask = np.asarray(each.completion_mask)
        width = mask.shape[1]
        # The last True of the mask ends the row, in packed rows too.
        ends = np.where(mask.any(1), width - np.argmax(mask[:, ::-1], axis=1), 0)
        found[name] = (np.asarray(each.tokens), mask, ends)
    return found


def paint(
    tokens: np.ndarray, mask: np.ndarray, length: int, tokenizer: TextTokenizer
) -> rich.text.Text:
    """rich Text: the first `length` tokens of a row, prompt dim, completion green, each EOS that is trained on reversed."""
    styles = [
        PROMPT_STYLE
        if not mask[t]
        else END_STYLE
        if int(tokens[t]) in tokenizer.eos_ids
        else COMPLETION_STYLE
        for t in range(length)
    ]
    painted = rich.text.Text()
    start = 0
    for t in range(1, length + 1):
        # Tokens of one style are decoded together: a character may be spread over several.
        if t == length or styles[t] != styles[start]:
            words = tokenizer.decode(tokens[start:t], skip_special=False)
            painted.append(words, style=styles[start])
            start = t
    return painted


def show(
    batches: Batches,
    tokenizer: TextTokenizer,
    *,
    rows: Rows | None = None,
    step: int = 0,
    count: int = 4,
    console: rich.console.Console | None = None,
) -> None:
    """Prints the first rows of a step's batch with their masks: prompt dim, completion green, EOS reversed.

    Args:
      batches: as a run would use them.
      tokenizer: the one they were made with.
      rows: the rows that were encoded, for their ids and faults.
      step: >= 0, which batch.
      count: how many of its rows.
      console: where to print; standard output if None.
    """
    console = console or rich.console.Console()
    batch = batches.batch_at(step)
    where = batches.rows_at(step)
    console.print(
        rich.text.Text.assemble(
            "colours: ",
            ("prompt", PROMPT_STYLE),
            " ",
            ("completion, trained on", COMPLETION_STYLE),
            " ",
            ("end of sequence, trained on", END_STYLE),
        )
    )
    sequences = _sequences(batch)
    for b in range(min(count, batches.batch_size)):
        if not where[b]:
            console.print(rich.text.Text(f"row {b}: filler", style="bold"))
            continue
        title = f"row {b}: positions {', '.join(map(str, where[b]))}"
        if rows is not None:
            each = [rows[i] for i in where[b]]
            title = f"row {b}: {', '.join(row.row_id for row in each)}"
            faults = sorted({fault for row in each for fault in row.faults})
            title += f" [{', '.join(faults)}]" if faults else ""
        console.print(rich.text.Text(title, style="bold"))
        for name, (tokens, mask, lengths) in sequences.items():
            trained = int(mask[b].sum())
            console.print(
                rich.text.Text(
                    f"{name}: {int(lengths[b])} of {tokens.shape[1]} tokens, {trained} trained on",
                    style="cyan",
                )
            )
            console.print(paint(tokens[b], mask[b], int(lengths[b]), tokenizer))


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What there is to know about rows before training on them.

    Attributes:
      rows: number of rows.
      kind: name of the row type.
      prompt_lengths, completion_lengths: int64[n], int64[n * completions], tokens after cutting.
      truncated: rows that were cut.
      bucket_shares: bucket -> share of rows.
      padding_share: share of a padded batch that is padding, were every row in its own bucket.
      duplicate_rows: rows that equal an earlier one in all their texts.
      duplicate_prompts: rows whose prompt an earlier row has.
      ties: pairs with equal completions or margin 0; None unless they are pairs.
      longer_chosen: share of pairs (of unequal length) whose chosen completion is the longer; None unless they are pairs.
      desirable: share of rows labelled desirable; None unless they are unpaired.
      leaked: rows of the other split whose prompt is among these rows' prompts; None without another split.
      other_rows: rows of the other split.
      faults: what `load` found.
    """

    rows: int
    kind: str
    prompt_lengths: np.ndarray
    completion_lengths: np.ndarray
    truncated: int
    bucket_shares: Mapping[int, float]
    padding_share: float
    duplicate_rows: int
    duplicate_prompts: int
    ties: int | None
    longer_chosen: float | None
    desirable: float | None
    leaked: int | None
    other_rows: int
    faults: FaultReport


def _texts(row: schema.Row) -> tuple[str, ...]:
    names = ("prompt", "completion", "chosen", "rejected")
    return tuple(
        schema.gist(getattr(row, name)) for name in names if hasattr(row, name)
    )


def statistics(
    rows: Rows, examples: Examples, *, other: Rows | None = None
) -> Statistics:
    """Statistics of rows and of what encoding made of them.

    Args:
      rows: the rows that were encoded.
      examples: what `encode_rows` made of them.
      other: rows of another split (test), whose prompts should not be among these.
    """
    every: Sequence[Any] = [rows[int(i)] for i in examples.rows]
    texts = [_texts(row) for row in every]
    prompts = {each[0] for each in texts}
    ties = longer = None
    if examples.kind is PreferenceRow:
        ties = sum(
            row.margin == 0 or each[1] == each[2] for row, each in zip(every, texts)
        )
        difference = examples.completions[0].lengths - examples.completions[1].lengths
        unequal = int((difference != 0).sum())
        longer = float((difference > 0).sum() / unequal) if unequal else None
    totals = examples.totals
    buckets = np.asarray(examples.lengths.buckets)
    padded = buckets[np.searchsorted(buckets, totals)]
    return Statistics(
        rows=len(every),
        kind=examples.kind.__name__,
        prompt_lengths=examples.prompts.lengths,
        completion_lengths=np.concatenate(
            [np.zeros(0, np.int64), *(each.lengths for each in examples.completions)]
        ),
        truncated=int(examples.truncated.sum()),
        bucket_shares=examples.bucket_shares(),
        padding_share=float(1 - totals.sum() / padded.sum()),
        duplicate_rows=len(texts) - len(set(texts)),
        duplicate_prompts=len(texts) - len(prompts),
        ties=ties,
        longer_chosen=longer,
        desirable=float(np.mean([row.label for row in every]))
        if examples.kind is UnpairedRow
        else None,
        leaked=None
        if other is None
        else sum(_texts(row)[0] in prompts for row in other),
        other_rows=0 if other is None else len(other),
        faults=rows.report,
    )


def histogram(lengths: np.ndarray, *, bins: int = 8, width: int = 30) -> list[str]:
    """Lines of a bar chart of lengths, one for each of `bins` equal ranges."""
    if not len(lengths):
        return []
    edges = np.unique(np.linspace(0, lengths.max() + 1, bins + 1).round().astype(int))
    counts, _ = np.histogram(lengths, edges)
    tallest = max(int(counts.max()), 1)
    return [
        f"{low:>6} - {high - 1:<6} {'█' * round(width * count / tallest):<{width}} {count}"
        for low, high, count in zip(edges, edges[1:], counts)
    ]


def _quantiles(lengths: np.ndarray) -> str:
    median, high, top = np.quantile(lengths, [0.5, 0.95, 1.0])
    return f"median {median:.0f}, 95% {high:.0f}, longest {top:.0f}"


def stats(
    rows: Rows,
    examples: Examples,
    *,
    other: Rows | None = None,
    console: rich.console.Console | None = None,
) -> Statistics:
    """Prints `statistics(rows, examples, other=other)` and returns them."""
    console = console or rich.console.Console()
    found = statistics(rows, examples, other=other)
    table = rich.table.Table(title=f"{found.rows} rows ({found.kind})", min_width=60)
    table.add_column("what")
    table.add_column("how much", overflow="fold")

    def share(count: int, total: int) -> str:
        return f"{count} of {total} ({count / max(total, 1):.1%})"

    for name, lengths in (
        ("prompt tokens", found.prompt_lengths),
        ("completion tokens", found.completion_lengths),
    ):
        if len(lengths):
            table.add_row(name, _quantiles(lengths))
    table.add_row("truncated", share(found.truncated, found.rows))
    table.add_row(
        "buckets",
        ", ".join(f"{size}: {part:.1%}" for size, part in found.bucket_shares.items()),
    )
    table.add_row("padding", f"{found.padding_share:.1%} of a batch")
    table.add_row("duplicate rows", share(found.duplicate_rows, found.rows))
    table.add_row("duplicate prompts", share(found.duplicate_prompts, found.rows))
    if found.ties is not None:
        table.add_row("ties", share(found.ties, found.rows))
    if found.longer_chosen is not None:
        table.add_row("chosen is longer", f"{found.longer_chosen:.1%} of unequal pairs")
    if found.desirable is not None:
        table.add_row("desirable", f"{found.desirable:.1%}")
    if found.leaked is not None:
        table.add_row(
            "prompts of the other split seen here",
            share(found.leaked, found.other_rows),
        )
    for fault, count in sorted(found.faults.counts.items()):
        first = ", ".join(found.faults.first[fault])
        table.add_row(fault, f"{share(count, found.faults.total)}: {first}")
    console.print(table)
    for name, lengths in (
        ("prompt tokens", found.prompt_lengths),
        ("completion tokens", found.completion_lengths),
    ):
        if len(lengths):
            console.print(rich.text.Text(name, style="bold"))
            for line in histogram(lengths):
                console.print(rich.text.Text(line))
    return found
