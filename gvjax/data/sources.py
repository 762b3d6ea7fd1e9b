"""Where rows come from: upstream files, the user's own rows, and prepared TFDS datasets.

`upstream.SOURCES` says for each name how an upstream record becomes a row. `load` reads the files once, writes the rows in normal
form as an array_record TFDS dataset under `data_dir`, and reads them from there ever after, at random access. The
dataset's name holds a hash of the files' contents, so a changed file is another dataset and never a stale one.

This is the only module that touches tensorflow_datasets, and none of it needs TensorFlow. Three habits keep it so:
`file_format="array_record"` is passed every time (the default needs TensorFlow to write, and "parquet" loses rows),
compressed files are opened with `gzip`, in `files` (the download manager's extraction needs TensorFlow), and rows are read
with `as_data_source`.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, overload

import absl.logging
import numpy as np
import tensorflow_datasets as tfds

from gvjax.data import schema
from gvjax.data.files import Path, fields_of, find_files, hash_files, read_records
from gvjax.data.schema import Converter, FaultReport, Message, Row, Text, UnusableRow
from gvjax.data.upstream import SOURCES, Source


def _turns() -> tfds.features.FeatureConnector:
    # A plain string is a single turn without a role.
    return tfds.features.Sequence(
        {"role": tfds.features.Text(), "content": tfds.features.Text()}
    )


def _encode_text(text: Text) -> list[dict[str, str]]:
    turns = (Message("", text),) if isinstance(text, str) else text
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _decode_text(turns: Mapping[str, Iterable[bytes]]) -> Text:
    messages = tuple(
        Message(role.decode(), content.decode())
        for role, content in zip(turns["role"], turns["content"])
    )
    if len(messages) == 1 and not messages[0].role:
        return messages[0].content
    return messages


@dataclasses.dataclass(frozen=True)
class _Column:
    """How one field of a row is stored: its TFDS feature, and the way in and out."""

    feature: Callable[[], tfds.features.FeatureConnector]
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


_TEXT = _Column(_turns, _encode_text, _decode_text)
_STRINGS = _Column(
    lambda: tfds.features.Sequence(tfds.features.Text()),
    list,
    lambda values: tuple(value.decode() for value in values),
)
_COLUMNS: Mapping[str, _Column] = {
    "prompt": _TEXT,
    "completion": _TEXT,
    "chosen": _TEXT,
    "rejected": _TEXT,
    "references": _STRINGS,
    "faults": _STRINGS,
    "row_id": _Column(tfds.features.Text, str, bytes.decode),
    "answer": _Column(
        _STRINGS.feature,
        lambda answer: [] if answer is None else [answer],
        lambda values: values[0].decode() if len(values) else None,
    ),
    "margin": _Column(
        lambda: tfds.features.Scalar(np.float64),
        lambda margin: np.nan if margin is None else margin,
        lambda margin: None if np.isnan(margin) else float(margin),
    ),
    "label": _Column(lambda: tfds.features.Scalar(np.bool_), bool, bool),
}
_BLANK: Mapping[str, Any] = {
    "prompt": "",
    "completion": "",
    "chosen": "",
    "rejected": "",
    "label": False,
}


def _names(kind: type[Row]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _decode_row(kind: type[Row], example: Mapping[str, Any]) -> Row:
    return kind(**{name: _COLUMNS[name].decode(example[name]) for name in _names(kind)})


@dataclasses.dataclass(eq=False)
class _RowsConfig(tfds.core.BuilderConfig):
    """What one prepared dataset is made of."""

    kind: type[Row] = Row
    split: str = ""
    rows: Callable[[], Iterator[tuple[Row | None, str, str]]] = lambda: iter(())


class GvjaxRows(tfds.core.GeneratorBasedBuilder):
    """Rows in normal form, in the order of the files; a row without a normal form is a blank with `usable` False."""

    VERSION = tfds.core.Version("1.0.0")
    name = "gvjax_rows"

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {
            name: _COLUMNS[name].feature() for name in _names(self.builder_config.kind)
        }
        features["usable"] = tfds.features.Scalar(np.bool_)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.builder_config.description,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        return {self.builder_config.split: self._generate_examples()}

    def _generate_examples(self):
        kind = self.builder_config.kind
        self.faults: dict[str, list[int]] = {}
        self.unusable: list[int] = []
        for key, (row, row_id, fault) in enumerate(self.builder_config.rows()):
            stored = row or kind(
                **{name: _BLANK[name] for name in _names(kind) if name in _BLANK},
                row_id=row_id,
                faults=(fault,),
            )
            for each in stored.faults:
                self.faults.setdefault(each, []).append(key)
            if row is None:
                self.unusable.append(key)
            example = {
                name: _COLUMNS[name].encode(getattr(stored, name))
                for name in _names(kind)
            }
            yield key, {**example, "usable": row is not None}


def _normal_rows(
    files: Sequence[pathlib.Path], source: Source, convert: Converter, split: str
) -> Iterator[tuple[Row | None, str, str]]:
    """Yields (row or None, row id, the fault where there is no row)."""
    for file in files:
        for number, record in enumerate(read_records(file), start=1):
            row_id = f"{file.name}:{number}"
            try:
                if isinstance(record, UnusableRow):
                    raise record
                if source.split_field and record.get(source.split_field) != split:
                    continue
                yield schema.normalise(record, convert, row_id), row_id, ""
            except UnusableRow as error:
                yield None, row_id, error.fault


RowT = TypeVar("RowT", bound=Row)


class Rows(Sequence[RowT], Generic[RowT]):
    """Rows at random access.

    Attributes:
      kind: the row type.
      fingerprint: hex digest of what the rows are: contents, split, what was dropped, and views taken since.
      report: what was found wrong and dropped.
    """

    def __init__(
        self,
        source: Any,
        kept: np.ndarray,
        decode: Callable[[Any], Row],
        *,
        kind: type[Row],
        fingerprint: str,
        report: FaultReport,
    ):
        self._source, self._kept, self._decode = source, kept, decode
        self.kind, self.fingerprint, self.report = kind, fingerprint, report

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> RowT: ...
    @overload
    def __getitem__(self, index: slice) -> "list[RowT]": ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        # Sequence's own iteration relies on IndexError; the record reader raises ValueError.
        return self._decode(self._source[int(self._kept[index])])

    def map(self, view: Callable[[Row], Row]) -> "Rows":
        """Rows: the same rows seen through `view`, a named function such as `schema.as_prompt`, or a `functools.partial` of one."""
        decode, name = self._decode, _name(view)
        sample = view(self[0]) if len(self) else None
        return Rows(
            self._source,
            self._kept,
            lambda example: view(decode(example)),
            kind=type(sample) if sample is not None else self.kind,
            fingerprint=_extend(self.fingerprint, name),
            report=self.report,
        )

    def filter(self, keep: Callable[[Any], bool]) -> "Rows[RowT]":
        """Rows: those for which `keep`, a named function, is true."""
        chosen = [i for i in range(len(self)) if keep(self[i])]
        return Rows(
            self._source,
            self._kept[chosen],
            self._decode,
            kind=self.kind,
            fingerprint=_extend(self.fingerprint, f"{_name(keep)}{chosen}"),
            report=self.report,
        )


def _name(function: Callable[..., Any]) -> str:
    if isinstance(function, functools.partial):
        return f"{_name(function.func)}{function.args}{function.keywords}"
    name = getattr(function, "__qualname__", "<lambda>")
    if "<lambda>" in name:
        raise ValueError(
            "rows take a named function, not a lambda: its name is part of their fingerprint"
        )
    return f"{function.__module__}.{name}"


def _extend(fingerprint: str, change: str) -> str:
    return hashlib.sha256(f"{fingerprint}|{change}".encode()).hexdigest()


def from_rows(
    rows: Sequence[RowT], *, drop: Iterable[str] = (), max_bad_share: float = 0.05
) -> Rows[RowT]:
    """Rows: rows that a program made, all of one type, with the same care for faults as rows from files."""
    if not rows:
        raise ValueError("there are no rows")
    faults: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        for fault in row.faults:
            faults.setdefault(fault, []).append(i)
    kept, report = schema.sift(
        len(rows),
        faults,
        (),
        lambda i: rows[i].row_id or str(i),
        drop=drop,
        max_bad_share=max_bad_share,
    )
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode("utf-8", "surrogatepass"))
    digest.update(kept.tobytes())
    return Rows(
        rows,
        kept,
        lambda row: row,
        kind=type(rows[0]),
        fingerprint=digest.hexdigest(),
        report=report,
    )


def _base_split(split: str) -> str:
    found = re.fullmatch(r"(\w+)(\[[^\]]*\])?", split)
    if found is None:
        raise ValueError(
            f"split {split!r} must be a name with an optional slice, as 'train' or 'train[:10%]'"
        )
    return found.group(1)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from printing download banners and from warning of configs that it does not know."""
    tfds.disable_progress_bar()
    level = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl.logging.set_verbosity(level)


def _prepare(
    config: _RowsConfig, data_dir: pathlib.Path
) -> tuple[tfds.core.DatasetBuilder, dict[str, list[int]], list[int]]:
    """Writes the dataset unless it is there; returns its builder, and the positions of faults and unusable rows."""
    # Processes on one machine (or one file system) wait for the first of them instead of writing over each other.
    with _locked(data_dir / "gvjax_rows" / f".{config.name}.lock"), _quiet():
        builder = GvjaxRows(
            data_dir=os.fspath(data_dir), config=config, file_format="array_record"
        )
        index = pathlib.Path(os.fspath(builder.data_path)) / "faults.json"
        if not index.exists():
            if next(config.rows(), None) is None:
                raise ValueError(
                    f"dataset {config.name!r}: the files hold no rows for split {config.split!r}"
                )
            # Without its index the dataset was left half made.
            shutil.rmtree(builder.data_path, ignore_errors=True)
            builder = GvjaxRows(
                data_dir=os.fspath(data_dir), config=config, file_format="array_record"
            )
            builder.download_and_prepare()
            partial = index.with_suffix(".partial")
            partial.write_text(
                json.dumps({"faults": builder.faults, "unusable": builder.unusable})
            )
            partial.replace(index)
        stored = json.loads(index.read_text())
    return builder, stored["faults"], stored["unusable"]


def _ranges(builder: tfds.core.DatasetBuilder, split: str) -> np.ndarray:
    """int64[n]: the positions in the base split that a sliced split names."""
    parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(builder.info.splits)
    total = builder.info.splits[_base_split(split)].num_examples
    return np.concatenate(
        [
            np.arange(
                0 if part.from_ is None else part.from_,
                total if part.to is None else part.to,
                dtype=np.int64,
            )
            for part in parts
        ]
    )


def load(
    source: str,
    split: str = "train",
    *,
    path: Path | None = None,
    data_dir: Path,
    drop: Iterable[str] = (),
    max_bad_share: float = 0.05,
) -> Rows:
    """Loads rows in normal form, preparing them under `data_dir` the first time.

    Args:
      source: a name from `upstream.SOURCES`; or "tfds:NAME" for a dataset prepared before (as array_record), by its name under
        `data_dir` or with its directory as `path`, in a format of `schema.FORMATS`; or "tfds:NAME:SOURCE" where its
        records are in the schema of SOURCE.
      split: a split's name with an optional TFDS slice, as "train[:10%]" or "test[100:200]".
      path: the upstream file, or a folder with one file for each split.
      data_dir: where prepared datasets live; may be shared by processes on one file system.
      drop: faults (names from `schema.FAULTS`) whose rows are left out.
      max_bad_share: in [0, 1], the largest share of rows with any fault.

    Returns:
      Rows, in the order of the files.

    Raises:
      ValueError: for unknown sources, splits and files, too many bad rows, and unusable rows not named in `drop`.
    """
    drop = frozenset(drop)
    if source.startswith("tfds:"):
        return _load_prepared(source, split, path, data_dir, drop, max_bad_share)
    if source not in SOURCES:
        raise ValueError(
            f"source {source!r} is not known; use one of {', '.join(sorted(SOURCES))}, or tfds:NAME"
        )
    if path is None:
        raise ValueError(
            f"source {source!r} reads local files ({SOURCES[source].about}); give their `path`"
        )
    table, base = SOURCES[source], _base_split(split)
    files = find_files(path, base, table)
    kind, convert = table.kind, table.convert
    if kind is None or convert is None:
        kind, convert = schema.find_format(fields_of(files[0]))
    digest = hash_files(files)
    config = _RowsConfig(
        name=f"{source}-{base}-{digest[:16]}",
        description=f"{table.about}; from {', '.join(file.name for file in files[:3])}",
        kind=kind,
        split=base,
        rows=lambda: _normal_rows(files, table, convert, base),
    )
    builder, faults, unusable = _prepare(config, pathlib.Path(data_dir))
    whole = builder.as_data_source(split=base)
    positions = _ranges(builder, split)
    where = {int(position): i for i, position in enumerate(positions)}
    kept, report = schema.sift(
        len(positions),
        {
            fault: [where[i] for i in rows if i in where]
            for fault, rows in faults.items()
        },
        [where[i] for i in unusable if i in where],
        lambda i: whole[int(positions[i])]["row_id"].decode(),
        drop=drop,
        max_bad_share=max_bad_share,
    )
    return Rows(
        whole,
        positions[kept],
        lambda example: _decode_row(kind, example),
        kind=kind,
        fingerprint=_fingerprint(digest, source, split, kept),
        report=report,
    )


def _fingerprint(content: str, source: str, split: str, kept: np.ndarray) -> str:
    digest = hashlib.sha256(f"{content}|{source}|{split}|".encode())
    digest.update(kept.tobytes())
    return digest.hexdigest()


def _to_python(value: Any) -> Any:
    """What a TFDS example holds, as JSON would: bytes as str, dicts of lists (sequences of dicts) as lists of dicts."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, np.ndarray):
        return [_to_python(item) for item in value.tolist()]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        plain = {name: _to_python(item) for name, item in value.items()}
        if {"role", "content"} <= plain.keys() and isinstance(plain["role"], list):
            return [
                {"role": role, "content": content}
                for role, content in zip(plain["role"], plain["content"])
            ]
        return plain
    if isinstance(value, list | tuple):
        return [_to_python(item) for item in value]
    return value


def _load_prepared(
    source: str,
    split: str,
    path: Path | None,
    data_dir: Path,
    drop: frozenset[str],
    max_bad_share: float,
) -> Rows:
    _, name, *schemas = source.split(":")
    if len(schemas) > 1 or (schemas and schemas[0] not in SOURCES):
        raise ValueError(
            f"source {source!r} must be tfds:NAME or tfds:NAME:SOURCE, SOURCE one of {', '.join(sorted(SOURCES))}"
        )
    if path is None:
        try:
            builder = tfds.core.read_only_builder.builder_from_files(
                name, data_dir=os.fspath(data_dir)
            )
        except (
            tfds.core.registered.DatasetNotFoundError,
            FileNotFoundError,
        ) as error:
            raise ValueError(
                f"no prepared dataset {name!r} under {data_dir}; prepare it with file_format='array_record', or give "
                "its directory as `path`"
            ) from error
    else:
        builder = tfds.builder_from_directory(os.fspath(path))
    stored = builder.info.file_format
    if stored is None or stored.value != "array_record":
        raise ValueError(
            f"dataset {name!r} is stored as {stored.value if stored else 'nothing known'}, which cannot be read without "
            "TensorFlow; prepare it with file_format='array_record'"
        )
    examples = builder.as_data_source(split=split)
    if not len(examples):
        raise ValueError(f"dataset {name!r} has no rows for split {split!r}")
    kind: type[Row] | None
    convert: Converter | None
    if set(builder.info.features) >= {"usable", "faults", "row_id"}:
        raise ValueError(
            f"dataset {name!r} was prepared by gvjax; load its source instead"
        )
    kind, convert = (
        (SOURCES[schemas[0]].kind, SOURCES[schemas[0]].convert)
        if schemas
        else (None, None)
    )
    if kind is None or convert is None:
        kind, convert = schema.find_format(builder.info.features)

    def decode(example: Mapping[str, Any], row_id: str = "") -> Row:
        return schema.normalise(_to_python(example), convert, row_id)

    faults: dict[str, list[int]] = {}
    unusable = []
    for i in range(len(examples)):
        try:
            found: tuple[str, ...] = decode(examples[i]).faults
        except UnusableRow as error:
            found = (error.fault,)
            unusable.append(i)
        for fault in found:
            faults.setdefault(fault, []).append(i)

    def row_id(i: int) -> str:
        return f"{name}/{split}:{i + 1}"

    kept, report = schema.sift(
        len(examples),
        faults,
        unusable,
        row_id,
        drop=drop,
        max_bad_share=max_bad_share,
    )
    directory = pathlib.Path(os.fspath(builder.data_path))
    content = hashlib.sha256()
    for file in sorted(file for file in directory.iterdir() if file.is_file()):
        content.update(f"{file.name}\0{file.stat().st_size}\n".encode())
        if file.suffix == ".json":
            content.update(file.read_bytes())
    return Rows(
        _Numbered(examples),
        kept,
        lambda numbered: decode(numbered[1], row_id(numbered[0])),
        kind=kind,
        fingerprint=_fingerprint(content.hexdigest(), source, split, kept),
        report=report,
    )


class _Numbered:
    """A data source that says which element it gives."""

    def __init__(self, source: Any):
        self._source = source

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self._source[index]
