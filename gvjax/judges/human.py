"""People as the judge of pairs: a CSV sheet out, the same sheet with one column filled in back.

The sheet shows neither which completion is whose nor the order of the study: both are drawn at random, and what undoes
the drawing lies in a key file that the people who label are not given.
"""

import csv
import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Sequence

import numpy as np

KEY_VERSION = 1
"""Version of the key file's layout; a file of another version is refused."""

COLUMNS = ("id", "prompt", "first", "second", "preferred")
"""The sheet's columns; `preferred` is what people fill in."""

_SCORES = {"first": 1.0, "second": 0.0, "tie": 0.5}
_LONGEST_FIELD = 2**27
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


class OtherPairsError(ValueError):
    """A sheet is of other pairs than those it is read for; filling it in again changes nothing."""


@dataclasses.dataclass(frozen=True)
class HumanLabels:
    """Labels of one sheet, in the order of the pairs exported.

    Attributes:
      scores: f64[N], 1 where completion a was preferred, 0 where b was, ½ for a tie, NaN where no label is given.
      a_was_first: bool[N], whether a was shown first; a preference for that place is a bias worth looking at.
    """

    scores: np.ndarray
    a_was_first: np.ndarray


def export_pairs(
    sheet: str | os.PathLike[str],
    key: str | os.PathLike[str],
    pairs: Sequence[tuple[str, str, str]],
    *,
    seed: int,
) -> None:
    """Writes a sheet to be labelled and the key to read it with.

    Rows come in random order and each shows a or b first at random, half of them (up to one) each way. Texts that a
    spreadsheet program would run as a formula get an apostrophe in front.

    Args:
      sheet: CSV to write, with the columns `COLUMNS`; `preferred` is to be filled with first, second or tie.
      key: JSON to write; keep it from those who label.
      pairs: (prompt, completion a, completion b), N > 0 of them.
      seed: of the drawing.

    Raises:
      ValueError: there are no pairs, or a file exists already and may hold somebody's work.
    """
    sheet, key = pathlib.Path(sheet), pathlib.Path(key)
    if not pairs:
        raise ValueError("no pairs to label; give at least one")
    for path in (sheet, key):
        if path.exists():
            raise ValueError(
                f"{path} exists and may hold labels; move it away or choose another name"
            )
    generator = np.random.default_rng(seed)
    swapped = generator.permutation(np.arange(len(pairs)) % 2 == 1)
    if len(pairs) % 2:
        # The odd one out must not always be shown a first.
        swapped ^= bool(generator.integers(2))
    ids = [_row_id(seed, index, pair) for index, pair in enumerate(pairs)]
    rows = []
    for index in generator.permutation(len(pairs)):
        prompt, a, b = pairs[index]
        first, second = (b, a) if swapped[index] else (a, b)
        rows.append((ids[index], *map(_as_text, (prompt, first, second)), ""))
    entries = {
        name: {"pair": index, "swapped": bool(swapped[index])}
        for index, name in enumerate(ids)
    }
    # The key first: a sheet without its key is work for nothing.
    _write(
        key, [json.dumps({"version": KEY_VERSION, "rows": entries}, indent=1) + "\n"]
    )
    lines: list[str] = []
    csv.writer(_Lines(lines)).writerows([COLUMNS, *rows])
    # With its byte-order mark, or a spreadsheet program takes UTF-8 for something else.
    _write(sheet, lines, encoding="utf-8-sig")


def import_labels(
    sheet: str | os.PathLike[str],
    key: str | os.PathLike[str],
    pairs: Sequence[tuple[str, str, str]],
    *,
    seed: int,
    allow_ties: bool = True,
    allow_missing: bool = False,
) -> HumanLabels:
    """Reads a filled-in sheet, strictly. Only `id` and `preferred` are looked at; other columns may have changed.

    Args:
      sheet: the CSV; labels are first, second and tie, in any case, blanks around them ignored.
      key: what `export_pairs` wrote beside it.
      pairs, seed: what it was given. Labels of other texts are refused, however many there are.
      allow_ties: whether tie is a label.
      allow_missing: whether rows may be gone or left empty; their scores are then NaN.

    Returns:
      HumanLabels.

    Raises:
      OtherPairsError: the key is not one of these pairs.
      ValueError: a column is missing, an id is unknown or occurs twice, a label is no label, or a row has none; the
        message names the rows.
    """
    sheet, key = pathlib.Path(sheet), pathlib.Path(key)
    entries = _read_key(key)
    asked = [_row_id(seed, index, pair) for index, pair in enumerate(pairs)]
    if asked != sorted(entries, key=lambda name: entries[name][0]):
        raise OtherPairsError(
            f"{sheet} is of other pairs than these {len(asked)}: its {len(entries)} labels say nothing of them; move it and"
            f" {key} away, and label a new sheet"
        )
    names = ("first", "second", "tie") if allow_ties else ("first", "second")
    scores = np.full(len(entries), np.nan)
    seen: set[str] = set()
    empty: list[str] = []
    problems: dict[str, list[str]] = {}
    for line, name, label in _read_sheet(sheet):
        if name not in entries:
            problems.setdefault("id is not in the key file", []).append(
                f"line {line}: {name!r}"
            )
            continue
        if name in seen:
            problems.setdefault("id occurs twice", []).append(f"line {line}: {name!r}")
            continue
        seen.add(name)
        said = label.strip().lower()
        if not said:
            empty.append(name)
            continue
        if said not in names:
            problems.setdefault(f"label is none of {', '.join(names)}", []).append(
                f"line {line}: {label!r}"
            )
            continue
        pair, swapped = entries[name]
        score = _SCORES[said]
        scores[pair] = 1 - score if swapped else score
    if not allow_missing:
        missing = [name for name in entries if name not in seen]
        for what, names_of in (
            ("row is missing", missing),
            ("row has no label", empty),
        ):
            if names_of:
                problems[what] = [repr(name) for name in names_of]
    if problems:
        told = "; ".join(
            f"{what} ({', '.join(rows[:5])}{f' and {len(rows) - 5} more' if len(rows) > 5 else ''})"
            for what, rows in problems.items()
        )
        raise ValueError(
            f"{sheet} cannot be read with {key}: {told}. Mend these rows"
            + ("" if allow_missing else ", or set allow_missing for a part of the rows")
        )
    a_was_first = np.empty(len(entries), bool)
    for pair, swapped in entries.values():
        a_was_first[pair] = not swapped
    return HumanLabels(scores, a_was_first)


def _read_sheet(path: pathlib.Path) -> Iterable[tuple[int, str, str]]:
    """(line, id, label) of each row that is not empty."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            for name in ("id", "preferred"):
                if columns.count(name) != 1:
                    raise ValueError(
                        f"{path} has the columns {list(columns)}; it needs exactly one {name!r}. Save it as"
                        " comma-separated UTF-8"
                    )
            rows = []
            for row in reader:
                if any(
                    value for value in row.values() if isinstance(value, str | list)
                ):
                    rows.append(
                        (reader.line_num, row["id"] or "", row["preferred"] or "")
                    )
            return rows
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error}); save it as comma-separated UTF-8"
        ) from error
    finally:
        csv.field_size_limit(before)


def _read_key(path: pathlib.Path) -> dict[str, tuple[int, bool]]:
    """id -> (pair, swapped)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        version = value["version"]
        entries = {
            name: (row["pair"], row["swapped"]) for name, row in value["rows"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no key file ({type(error).__name__}: {error}); give the one written with the sheet"
        ) from error
    if version != KEY_VERSION:
        raise ValueError(
            f"key file {path} has version {version!r}, this gvjax reads {KEY_VERSION}; read it with the one that wrote it"
        )
    if sorted(pair for pair, _ in entries.values()) != list(range(len(entries))):
        raise ValueError(
            f"{path} does not name each pair once; give the one written with the sheet"
        )
    return entries


def _row_id(seed: int, index: int, pair: tuple[str, str, str]) -> str:
    """Says nothing of the order, and differs between sheets."""
    text = json.dumps([seed, index, *pair])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_text(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


class _Lines:
    """A list that csv can write into."""

    def __init__(self, lines: list[str]) -> None:
        self.write = lines.append


def _write(path: pathlib.Path, texts: list[str], *, encoding: str = "utf-8") -> None:
    """Writes a new file in one piece."""
    number, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(number, "w", encoding=encoding, newline="") as file:
            file.writelines(texts)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
