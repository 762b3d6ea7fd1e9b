"""Files of records: JSON lines, lists of JSON, Parquet and tldr pages, found by split and known by their contents."""

import gzip
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow.parquet

from gvjax.data.schema import UnusableRow
from gvjax.data.upstream import Record, Source

Path = str | os.PathLike[str]

_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


def _suffix(path: pathlib.Path) -> str | None:
    return next(
        (suffix for suffix in reversed(_SUFFIXES) if path.name.endswith(suffix)), None
    )


def _parse_json(text: str) -> Record | UnusableRow:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        return UnusableRow("missing_keys", f"not JSON ({error})")
    if not isinstance(record, Mapping):
        return UnusableRow("missing_keys", f"{record!r} is not an object")
    return record


def _read_json(path: pathlib.Path) -> Iterator[Record | UnusableRow]:
    opener = gzip.open if path.name.endswith(".gz") else open
    # Lone surrogates carry undecodable bytes through JSON, so that one bad byte costs one row and not the file.
    with opener(
        path, "rt", encoding="utf-8", errors="surrogateescape", newline="\n"
    ) as file:
        for line in file:
            line = line.lstrip("\ufeff")
            if line.lstrip().startswith("["):
                yield from _items(json.loads(line + file.read()))
            elif line.strip():
                yield _parse_json(line)


def _items(values: Sequence[Any]) -> Iterator[Record | UnusableRow]:
    for value in values:
        if isinstance(value, Mapping):
            yield value
        else:
            yield UnusableRow("missing_keys", f"{value!r} is not an object")


def _read_parquet(path: pathlib.Path) -> Iterator[Record | UnusableRow]:
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield UnusableRow("invalid_utf8", str(error))


def _read_page(path: pathlib.Path) -> Iterator[Record | UnusableRow]:
    """One record an example: `- what it does:` followed by the command between back-ticks."""
    summary, description = [], None
    for line in path.read_text("utf-8", errors="surrogateescape").splitlines():
        if line.startswith(">"):
            summary.append(line[1:].strip())
        elif line.startswith("- "):
            description = line[2:].rstrip().removesuffix(":")
        elif line.startswith("`") and line.rstrip().endswith("`") and description:
            yield {
                "page": path.stem,
                "platform": path.parent.name,
                "summary": " ".join(summary[:1]),
                "description": description,
                "command": line.strip()[1:-1],
            }
            description = None


def read_records(path: Path) -> Iterator[Record | UnusableRow]:
    """Yields the records of one file: JSON lines, a JSON list, Parquet, or a tldr page (.md); gzip by suffix."""
    path = pathlib.Path(path)
    suffix = _suffix(path)
    if path.suffix == ".md":
        return _read_page(path)
    if suffix is None:
        raise ValueError(
            f"{path} is of no known kind; use one of {', '.join(_SUFFIXES)}"
        )
    return _read_parquet(path) if suffix == ".parquet" else _read_json(path)


def find_files(path: Path, split: str, source: Source) -> list[pathlib.Path]:
    """The files of a split: `path` itself, or those in the folder `path` whose name says so.

    In a folder, `train.jsonl`, `x.train.jsonl.gz` and `x-train.parquet` belong to "train"; where records name their split
    (`split_field`) all files are read; a folder of tldr pages is one split.

    Raises:
      ValueError: where there is no such file, or more than one.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; give a file or a folder of files")
    files = sorted(file for file in path.iterdir() if file.is_file() and _suffix(file))
    if not files and (pages := sorted(path.rglob("*.md"))):
        return pages
    if source.split_field and files:
        return files
    matching = [
        file
        for file in files
        if re.split(r"[.\-_]", file.name.removesuffix(_suffix(file) or ""))[-1] == split
    ]
    if len(matching) != 1:
        names = ", ".join(file.name for file in matching or files) or "none"
        raise ValueError(
            f"{path} has {len(matching)} files for split {split!r} (files: {names}); give the file itself"
        )
    return matching


def fields_of(file: pathlib.Path) -> set[str]:
    """The fields of the first records: of many, since the very first may be the one that lacks a field."""
    records = itertools.islice(read_records(file), 1000)
    return {
        field for record in records if isinstance(record, Mapping) for field in record
    }


def hash_files(files: Sequence[pathlib.Path]) -> str:
    """Hex digest of the files' names and contents."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{file.name}\0{content}\n".encode())
    return digest.hexdigest()
