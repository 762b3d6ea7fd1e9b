"""From rows to examples: rows of text become lists of token ids, cut to length, once and up front."""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import grain
import numpy as np

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

logger = logging.getLogger(__name__)

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
    if 0 < (bare := margins.count(None)) < len(margins):
        logger.warning(
            "%d of %d rows have no margin, so none is used; drop these rows to keep the others'",
            bare,
            len(margins),
        )
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
