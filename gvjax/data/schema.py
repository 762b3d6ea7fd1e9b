"""The normal form of rows: four frozen dataclasses, what can be wrong with a row, and how many wrong rows to bear.

Every source ends here, whatever the upstream schema: a prompt to sample from, a demonstration, a preference pair, or a
single completion with a verdict. A text is a plain string or a conversation; a plain string is never given a chat
template, a conversation always is.

Nothing is dropped silently. A row keeps the names of its faults, `sift` drops those that the config names, refuses
rows that cannot be used at all unless their fault is named, and stops when too many rows are bad.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
      role: "system", "user" or "assistant" (a template may know more).
      content: what was said, without any template's marks.
    """

    role: str
    content: str


Text = str | tuple[Message, ...]
"""A plain string, or the turns of a conversation."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What all rows carry.

    Attributes:
      row_id: where the row comes from, as "file:number", counted from 1.
      faults: names from `FAULTS`.
    """

    row_id: str = dataclasses.field(default="", kw_only=True)
    faults: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)


@dataclasses.dataclass(frozen=True)
class PromptRow(Row):
    """A prompt to sample completions for.

    Attributes:
      prompt: the text before the completion.
      answer: the right answer where a verifier can check one, e.g. "1250"; None otherwise.
    """

    prompt: Text
    answer: str | None = None


@dataclasses.dataclass(frozen=True)
class DemonstrationRow(Row):
    """A prompt with a completion to imitate.

    Attributes:
      prompt, completion: the texts; a conversational completion is one assistant turn.
      answer: as in `PromptRow`.
      references: further completions that would have been as good (SciTLDR's test split has several).
    """

    prompt: Text
    completion: Text
    answer: str | None = None
    references: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PreferenceRow(Row):
    """Two completions of one prompt.

    Attributes:
      prompt, chosen, rejected: the texts; `chosen` is the better one.
      margin: by how much, in the units of the upstream scores; None where unknown.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    margin: float | None = None


@dataclasses.dataclass(frozen=True)
class UnpairedRow(Row):
    """One completion with a verdict.

    Attributes:
      prompt, completion: the texts.
      label: True for desirable.
    """

    prompt: Text
    completion: Text
    label: bool


FAULTS: Mapping[str, str] = {
    "missing_keys": "a field that the format needs is missing, null or of the wrong type",
    "early_divergence": "chosen and rejected differ before the last turn",
    "identical_pair": "chosen equals rejected, so the margin is exactly 0",
    "empty_prompt": "there is no text before the completion",
    "empty_completion": "a completion holds no text",
    "invalid_utf8": "the bytes are not UTF-8; what cannot be read becomes U+FFFD",
    "too_long": "more tokens than the length policy allows",
}
"""Every fault by name. `too_long` is known only once the row is tokenised."""


class UnusableRow(Exception):
    """A row that has no normal form.

    Attributes:
      fault: a name from `FAULTS`.
    """

    def __init__(self, fault: str, detail: str):
        super().__init__(f"{fault}: {detail}")
        self.fault = fault


def is_conversation(text: Text) -> bool:
    """Whether a text is a list of turns (True) or a plain string (False)."""
    return not isinstance(text, str)


def gist(text: Text) -> str:
    """What makes a prompt the same prompt: its words, whatever their case and spacing."""
    return " ".join(plain(text).lower().split())


def plain(text: Text) -> str:
    """str: the words of a text, turns separated by a blank line; for comparing and showing, not for training."""
    if isinstance(text, str):
        return text
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in text)


def as_prompt(row: Row) -> PromptRow:
    """PromptRow: the row without its completions, so that both roads sample from the same prompts."""
    prompt = row.prompt  # type: ignore[attr-defined]
    return PromptRow(
        prompt, getattr(row, "answer", None), row_id=row.row_id, faults=row.faults
    )


def as_demonstration(row: Row) -> DemonstrationRow:
    """DemonstrationRow: of a preference pair its chosen completion; a demonstration is returned as it is.

    Raises:
      ValueError: for rows that hold no completion to imitate.
    """
    if isinstance(row, DemonstrationRow):
        return row
    if isinstance(row, PreferenceRow):
        return DemonstrationRow(
            row.prompt, row.chosen, row_id=row.row_id, faults=row.faults
        )
    raise ValueError(
        f"row {row.row_id} is a {type(row).__name__}, which names no completion to imitate; use preference or "
        "prompt-completion rows"
    )


def as_conversation(row: Row) -> Row:
    """Row: plain strings wrapped as a user's turn and an assistant's, for models with a chat template."""

    def wrap(role: str, text: Text) -> Text:
        return (Message(role, text.strip()),) if isinstance(text, str) else text

    roles = {
        "prompt": "user",
        "completion": "assistant",
        "chosen": "assistant",
        "rejected": "assistant",
    }
    changes: dict[str, Any] = {
        name: wrap(role, getattr(row, name))
        for name, role in roles.items()
        if hasattr(row, name)
    }
    return dataclasses.replace(row, **changes)


def with_system(row: Row, system: str) -> Row:
    """Row: a conversation with `system` as its first turn, unless it brings a system turn of its own.

    An empty string is kept as an empty turn: many templates put in a text of their own when none is given.
    """
    prompt = row.prompt  # type: ignore[attr-defined]
    if not is_conversation(prompt):
        raise ValueError(
            f"row {row.row_id} is plain text and takes no system turn; turn it into a conversation first"
        )
    if prompt and prompt[0].role == "system":
        return row
    return dataclasses.replace(row, prompt=(Message("system", system), *prompt))  # type: ignore[call-arg]


# ---------------------------------------------------------------------------------------------------------------------
# From the formats that TRL documents
# ---------------------------------------------------------------------------------------------------------------------


_ROLE = re.compile(r"[A-Za-z0-9_-]+")


def parse_text(value: Any, field: str) -> Text:
    """Text: a string, or a list of {role, content} as a conversation.

    Raises:
      UnusableRow: `missing_keys` for anything else.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or not value:
        raise UnusableRow(
            "missing_keys", f"{field} is {value!r}, neither text nor messages"
        )
    turns = []
    for turn in value:
        role, content = (
            (turn.get("role"), turn.get("content"))
            if isinstance(turn, Mapping)
            else (None, None)
        )
        if not isinstance(role, str) or not isinstance(content, str):
            raise UnusableRow(
                "missing_keys", f"{field} holds {turn!r}, not {{role, content}}"
            )
        # Templates print the role among their control tokens: it must not be able to write one.
        if not _ROLE.fullmatch(role):
            raise UnusableRow("missing_keys", f"{field} has the role {role!r}")
        turns.append(Message(role, content))
    return tuple(turns)


def _take(record: Mapping[str, Any], field: str) -> Any:
    if record.get(field) is None:
        raise UnusableRow(
            "missing_keys", f"no {field!r} among {sorted(map(str, record))}"
        )
    return record[field]


def _reply(text: Text, field: str) -> Text:
    if is_conversation(text) and (len(text) != 1 or text[0].role != "assistant"):  # type: ignore[union-attr]
        raise UnusableRow(
            "early_divergence",
            f"{field} must be one assistant turn, but has {[turn.role for turn in text]}",  # type: ignore[union-attr]
        )
    return text


def _same_kind(prompt: Text, completion: Text) -> Text:
    """The prompt as a conversation where the completion is one: {prompt: str, chosen: [...]} is common upstream."""
    if isinstance(prompt, str) and is_conversation(completion):
        return (Message("user", prompt),)
    return prompt


def _answer(record: Mapping[str, Any]) -> str | None:
    for field in ("answer", "ground_truth"):
        value = record.get(field)
        if isinstance(value, str | int | float):
            return str(value)
    return None


def prompt_only(record: Mapping[str, Any]) -> PromptRow:
    """PromptRow: from {prompt}, with `answer` or `ground_truth` where there is one."""
    return PromptRow(parse_text(_take(record, "prompt"), "prompt"), _answer(record))


def prompt_completion(record: Mapping[str, Any]) -> DemonstrationRow:
    """DemonstrationRow: from {prompt, completion}."""
    completion = _reply(
        parse_text(_take(record, "completion"), "completion"), "completion"
    )
    prompt = _same_kind(parse_text(_take(record, "prompt"), "prompt"), completion)
    return DemonstrationRow(prompt, completion, _answer(record))


def language_modelling(record: Mapping[str, Any]) -> DemonstrationRow:
    """DemonstrationRow: from {text} (no prompt) or {messages} (all but the last turn are the prompt)."""
    if "messages" not in record:
        text = _take(record, "text")
        if not isinstance(text, str):
            raise UnusableRow("missing_keys", f"text is {text!r}, not a string")
        return DemonstrationRow("", text)
    turns = parse_text(_take(record, "messages"), "messages")
    if isinstance(turns, str):
        raise UnusableRow("missing_keys", "messages is a string, not a list of turns")
    return DemonstrationRow(turns[:-1], _reply(turns[-1:], "messages"), _answer(record))


def unpaired(record: Mapping[str, Any]) -> UnpairedRow:
    """UnpairedRow: from {prompt, completion, label}, the label a bool or 0/1."""
    row = prompt_completion(record)
    label = _take(record, "label")
    if label not in (0, 1):
        raise UnusableRow(
            "missing_keys", f"label is {label!r}, neither a bool nor 0 or 1"
        )
    return UnpairedRow(row.prompt, row.completion, bool(label))


def _shared_text(chosen: str, rejected: str) -> int:
    """Length of the common prefix of two strings, cut back so that no word is split between prompt and completion.

    The blank before the first differing word belongs to the completions.
    """
    limit = min(len(chosen), len(rejected))
    end = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    while end > 0 and not chosen[end - 1].isspace():
        end -= 1
    while end > 0 and chosen[end - 1].isspace():
        end -= 1
    return end


def _margin(record: Mapping[str, Any]) -> float | None:
    if record.get("margin") is not None:
        return float(record["margin"])
    metadata = record.get("metadata")
    for scores in (record, metadata if isinstance(metadata, Mapping) else {}):
        pair = scores.get("score_chosen"), scores.get("score_rejected")
        if None not in pair:
            return float(pair[0]) - float(pair[1])  # type: ignore[arg-type]
    return None


def preference(record: Mapping[str, Any]) -> PreferenceRow:
    """PreferenceRow: from {prompt, chosen, rejected}, or {chosen, rejected} whose common beginning is the prompt.

    The margin is `margin`, or `score_chosen` - `score_rejected` where upstream gives scores. Where TRL splits an implicit
    plain prompt at the first differing character, the split here falls between words.
    """
    chosen = parse_text(_take(record, "chosen"), "chosen")
    rejected = parse_text(_take(record, "rejected"), "rejected")
    if is_conversation(chosen) != is_conversation(rejected):
        raise UnusableRow(
            "missing_keys", "one of chosen and rejected is plain text, the other is not"
        )
    margin = _margin(record)
    prompt = (
        parse_text(record["prompt"], "prompt")
        if record.get("prompt") is not None
        else None
    )
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            shared = _shared_text(chosen, rejected)
            prompt, chosen, rejected = (
                chosen[:shared],
                chosen[shared:],
                rejected[shared:],
            )
        elif is_conversation(prompt):
            chosen, rejected = (
                (Message("assistant", chosen),),
                (Message("assistant", rejected),),
            )
        return PreferenceRow(prompt, chosen, rejected, margin)
    # Whole conversations may stand in chosen and rejected even where the prompt is given once more as a string.
    whole = len(chosen) > 1 and len(rejected) > 1
    if prompt is None or (
        whole and isinstance(prompt, str) and prompt == _first_user(chosen)
    ):
        shared = next(
            (i for i, (c, r) in enumerate(zip(chosen, rejected)) if c != r),
            min(len(chosen), len(rejected)),
        )
        # Equal pairs share their reply too; the prompt still ends where the reply begins.
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    prompt = _same_kind(prompt, chosen)
    return PreferenceRow(
        prompt, _reply(chosen, "chosen"), _reply(rejected, "rejected"), margin
    )


def _first_user(turns: Text) -> str | None:
    return next((turn.content for turn in turns if turn.role == "user"), None)  # type: ignore[union-attr]


Converter = Callable[[Mapping[str, Any]], Row]
"""`record -> row`; raises UnusableRow where there is no normal form."""

FORMATS: Sequence[tuple[frozenset[str], type[Row], Converter]] = (
    (frozenset({"chosen", "rejected"}), PreferenceRow, preference),
    (frozenset({"prompt", "completion", "label"}), UnpairedRow, unpaired),
    (frozenset({"prompt", "completion"}), DemonstrationRow, prompt_completion),
    (frozenset({"messages"}), DemonstrationRow, language_modelling),
    (frozenset({"text"}), DemonstrationRow, language_modelling),
    (frozenset({"prompt"}), PromptRow, prompt_only),
)
"""The formats by the fields they need; the first whose fields are all there is meant."""


def find_format(fields: Iterable[str]) -> tuple[type[Row], Converter]:
    """(row type, converter): the format that a record with these fields is in.

    Raises:
      ValueError: where no format matches.
    """
    present = set(fields)
    for needed, kind, converter in FORMATS:
        if needed <= present:
            return kind, converter
    raise ValueError(
        f"no format has the fields {sorted(present)}; need one of "
        + ", ".join("{" + ", ".join(sorted(needed)) + "}" for needed, _, _ in FORMATS)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------


_SURROGATE = re.compile("[\ud800-\udfff]")


def _repair(text: str) -> str:
    return _SURROGATE.sub("\ufffd", text)


def _texts(row: Row) -> dict[str, Text]:
    names = ("prompt", "completion", "chosen", "rejected")
    return {name: getattr(row, name) for name in names if hasattr(row, name)}


def _words(text: Text) -> str:
    return (
        text if isinstance(text, str) else "".join(turn.content for turn in text)
    ).strip()


def normalise(record: Mapping[str, Any], converter: Converter, row_id: str) -> Row:
    """Row: the record in normal form, with the names of its faults.

    Bytes that were not UTF-8 are expected as lone surrogates (`errors="surrogateescape"`); they become U+FFFD.

    Raises:
      UnusableRow: where the record has no normal form.
    """
    row = converter(record)
    texts = _texts(row)
    faults = list(row.faults)
    if "chosen" in texts and texts["chosen"] == texts["rejected"]:
        faults.append("identical_pair")
    if not _words(texts["prompt"]):
        faults.append("empty_prompt")
    if any(not _words(text) for name, text in texts.items() if name != "prompt"):
        faults.append("empty_completion")
    repaired: dict[str, Any] = {}
    for name, text in texts.items():
        if isinstance(text, str):
            clean: Text = _repair(text)
        else:
            clean = tuple(
                Message(_repair(turn.role), _repair(turn.content)) for turn in text
            )
        if clean != text:
            repaired[name] = clean
    if repaired:
        faults.append("invalid_utf8")
    if isinstance(row, DemonstrationRow):
        repaired["references"] = tuple(_repair(text) for text in row.references)
    return dataclasses.replace(row, row_id=row_id, faults=tuple(faults), **repaired)


@dataclasses.dataclass(frozen=True)
class FaultReport:
    """How many rows of each fault there were, which came first, and what became of them.

    Attributes:
      total: rows looked at.
      kept: rows left.
      counts: fault -> number of rows.
      first: fault -> the ids of the first few rows.
      dropped: the faults whose rows were dropped.
    """

    total: int
    kept: int
    counts: Mapping[str, int]
    first: Mapping[str, tuple[str, ...]]
    dropped: frozenset[str] = frozenset()

    def __str__(self) -> str:
        lines = [f"{self.kept} of {self.total} rows kept"]
        for fault, count in sorted(self.counts.items()):
            fate = "dropped" if fault in self.dropped else "kept"
            lines.append(
                f"  {fault}: {count} {fate} ({FAULTS[fault]}), e.g. {', '.join(self.first[fault])}"
            )
        return "\n".join(lines)


NUM_FIRST = 5
"""How many row ids a report names for each fault."""


def sift(
    total: int,
    faults: Mapping[str, Sequence[int]],
    unusable: Iterable[int],
    row_id: Callable[[int], str],
    *,
    drop: Iterable[str] = (),
    max_bad_share: float = 0.05,
) -> tuple[np.ndarray, FaultReport]:
    """Decides which rows stay.

    Args:
      total: number of rows.
      faults: fault -> positions of the rows that have it, ascending.
      unusable: positions of rows without a normal form; each has a fault in `faults`.
      row_id: position -> id, for messages.
      drop: faults whose rows are left out.
      max_bad_share: in [0, 1], the largest share of rows with any fault.

    Returns:
      (int64[kept], positions that stay, ascending; the report).

    Raises:
      ValueError: for unknown names in `drop`, too many bad rows, or unusable rows whose fault `drop` does not name.
    """
    drop = frozenset(drop)
    if unknown := drop - FAULTS.keys():
        raise ValueError(
            f"drop names {sorted(unknown)}; known faults are {sorted(FAULTS)}"
        )
    if not 0 <= max_bad_share <= 1:
        raise ValueError(f"max_bad_share {max_bad_share} must lie in [0, 1]")
    found = {fault: rows for fault, rows in faults.items() if len(rows)}
    removed: set[int] = set()
    for fault in drop & found.keys():
        removed.update(found[fault])
    report = FaultReport(
        total=total,
        kept=total - len(removed),
        counts={fault: len(rows) for fault, rows in found.items()},
        first={
            fault: tuple(row_id(i) for i in rows[:NUM_FIRST])
            for fault, rows in found.items()
        },
        dropped=drop,
    )
    bad = set().union(*found.values()) if found else set()
    if len(bad) > max_bad_share * total:
        raise ValueError(
            f"{len(bad)} of {total} rows are bad, more than max_bad_share {max_bad_share}; mend the data or raise the "
            f"share\n{report}"
        )
    if left := sorted(set(unusable) - removed):
        raise ValueError(
            f"{len(left)} rows cannot be used, the first being {row_id(left[0])}; name their fault in `drop` to leave "
            f"them out\n{report}"
        )
    kept = np.setdiff1d(
        np.arange(total, dtype=np.int64), np.fromiter(removed, np.int64, len(removed))
    )
    return kept, report
