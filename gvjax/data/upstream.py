"""Upstream's records as rows: for each name a function, and a line in `SOURCES`."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gvjax.data import schema
from gvjax.data.answers import canonical_number
from gvjax.data.schema import (
    Converter,
    DemonstrationRow,
    Message,
    PreferenceRow,
    Row,
    UnusableRow,
)

Record = Mapping[str, Any]


def _field(record: Record, name: str, kind: type = str) -> Any:
    value = record.get(name)
    if not isinstance(value, kind):
        raise UnusableRow("missing_keys", f"{name!r} is {value!r}, not {kind.__name__}")
    return value


def gsm8k(record: Record) -> DemonstrationRow:
    """DemonstrationRow: the worked solution as upstream wrote it, calculator marks and `#### N` included."""
    solution = _field(record, "answer")
    _, mark, last = solution.rpartition("####")
    number = canonical_number(last) if mark else None
    if number is None:
        raise UnusableRow("missing_keys", "the answer has no '#### N'")
    return DemonstrationRow(
        f"Question: {_field(record, 'question')}\nAnswer:", f" {solution}", number
    )


def svamp(record: Record) -> DemonstrationRow:
    """DemonstrationRow: body and question, then the number."""
    number = canonical_number(_field(record, "Answer", (int, float)))  # type: ignore[arg-type]
    if number is None:
        raise UnusableRow("missing_keys", f"Answer {record['Answer']!r} is no number")
    story = f"{_field(record, 'Body').strip()} {_field(record, 'Question').strip()}"
    return DemonstrationRow(f"Question: {story}\nAnswer:", f" {number}", number)


def scitldr(record: Record) -> DemonstrationRow:
    """DemonstrationRow: the abstract, then its first one-line summary; further summaries are `references`."""
    sentences, targets = _field(record, "source", list), _field(record, "target", list)
    if not targets:
        raise UnusableRow("missing_keys", "target is an empty list")
    abstract = " ".join(sentence.strip() for sentence in sentences)
    first, *others = (target.strip() for target in targets)
    return DemonstrationRow(
        f"{abstract}\n\nTL;DR:", f" {first}", references=tuple(others)
    )


def tldr_pages(record: Record) -> DemonstrationRow:
    """DemonstrationRow: what a command does, then the command with its `{{placeholders}}`."""
    return DemonstrationRow(
        f"# {_field(record, 'description')}\n$", f" {_field(record, 'command')}"
    )


def _tldr_prompt(post: Record) -> str:
    """The query of Stiennon et al., 2020, https://arxiv.org/abs/2009.01325; completions start with a blank."""
    subreddit, title, body = (
        _field(post, name) for name in ("subreddit", "title", "post")
    )
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {body}\n\nTL;DR:"


def tldr_sft(record: Record) -> DemonstrationRow:
    """DemonstrationRow: a Reddit post and its author's summary."""
    summary = _field(record, "summary")
    return DemonstrationRow(
        _tldr_prompt(record), f" {summary.strip()}" if summary.strip() else ""
    )


def tldr_preference(record: Record) -> PreferenceRow:
    """PreferenceRow: a Reddit post and two summaries, `choice` naming the better one."""
    summaries = _field(record, "summaries", list)
    choice = record.get("choice")
    if len(summaries) != 2 or choice not in (0, 1):
        raise UnusableRow(
            "missing_keys",
            f"need two summaries and choice 0 or 1, got {len(summaries)} and {choice!r}",
        )
    texts = [_field(summary, "text").strip() for summary in summaries]
    chosen, rejected = (
        f" {text}" if text else "" for text in (texts[choice], texts[1 - choice])
    )
    return PreferenceRow(
        _tldr_prompt(_field(record, "info", dict)), chosen, rejected, None
    )


_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def _hh_turns(dialogue: str) -> list[Message]:
    head, *rest = _HH_TURN.split(dialogue)
    if head.strip() or not rest:
        raise UnusableRow("missing_keys", "the dialogue does not start with a turn")
    return [
        Message(_HH_ROLES[who], words.strip())
        for who, words in zip(rest[::2], rest[1::2])
    ]


def _hh_reply(turns: Sequence[Message]) -> tuple[Message]:
    """One assistant turn; where more turns follow they stay in it, marked as upstream marks them."""
    names = {role: name for name, role in _HH_ROLES.items()}
    first, *rest = turns
    words = first.content + "".join(
        f"\n\n{names[turn.role]}: {turn.content}" for turn in rest
    )
    return (Message("assistant", words),)


def hh_rlhf(record: Record) -> PreferenceRow:
    r"""PreferenceRow: two dialogues with `\n\nHuman:` and `\n\nAssistant:` marks, cut after their common turns.

    Nearly all pairs differ in the last assistant turn alone. Where they part earlier (`early_divergence`) the prompt is
    what they share up to a user's turn, and all that follows is the completion.
    """
    chosen, rejected = (
        _hh_turns(_field(record, name)) for name in ("chosen", "rejected")
    )
    last = min(len(chosen), len(rejected)) - 1
    shared = next((i for i in range(last) if chosen[i] != rejected[i]), last)
    while shared and not (
        chosen[shared - 1].role == "user"
        and chosen[shared].role == rejected[shared].role == "assistant"
    ):
        shared -= 1
    if not shared:
        raise UnusableRow(
            "early_divergence", "the dialogues share no prompt that ends with a user"
        )
    early = max(len(chosen), len(rejected)) - shared > 1
    return PreferenceRow(
        tuple(chosen[:shared]),
        _hh_reply(chosen[shared:]),
        _hh_reply(rejected[shared:]),
        None,
        faults=("early_divergence",) if early else (),
    )


@dataclasses.dataclass(frozen=True)
class Source:
    """How upstream records become rows.

    Attributes:
      about: what it is and where it comes from.
      kind: the row type, or None where the first record's fields tell.
      convert: record -> row, or None likewise.
      split_field: the record's field that names its split, where upstream mixes splits in its files.
    """

    about: str
    kind: type[Row] | None = None
    convert: Converter | None = None
    split_field: str | None = None


SOURCES: Mapping[str, Source] = {
    "tldr_preference": Source(
        "TL;DR comparisons, openai/summarize-from-feedback (comparisons/batch*.json; splits train, valid1, valid2)",
        PreferenceRow,
        tldr_preference,
        split_field="split",
    ),
    "tldr_sft": Source(
        "TL;DR posts with summaries, openai/summarize-from-feedback (tldr_3_filtered/{train,valid,test}.jsonl)",
        DemonstrationRow,
        tldr_sft,
    ),
    "hh_rlhf": Source(
        "helpful and harmless dialogues, anthropics/hh-rlhf (MIT); holds upsetting text by design",
        PreferenceRow,
        hh_rlhf,
    ),
    "ultrafeedback_binarized": Source(
        "GPT-4-scored answers, OpenBMB/UltraFeedback (MIT), as pairs",
        PreferenceRow,
        schema.preference,
    ),
    "gsm8k": Source(
        "grade-school word problems, openai/grade-school-math (MIT)",
        DemonstrationRow,
        gsm8k,
    ),
    "svamp": Source(
        "one-step word problems, arkilpatel/SVAMP (MIT)", DemonstrationRow, svamp
    ),
    "scitldr": Source(
        "abstracts with one-line summaries, allenai/scitldr (Apache-2.0)",
        DemonstrationRow,
        scitldr,
    ),
    "tldr_pages": Source(
        "what a shell command does, and the command, tldr-pages/tldr (CC BY 4.0); records or the repository's pages",
        DemonstrationRow,
        tldr_pages,
    ),
    "jsonl": Source("the user's rows in any format of gvjax.data.schema.FORMATS"),
}
"""The local sources by name. A new one is a function and a line."""
