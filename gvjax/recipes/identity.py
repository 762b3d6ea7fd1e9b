"""What makes a run the run it is, so that nobody goes on from another one's checkpoints without knowing.

A run is what its config says and what stands behind the names in it: data files, code given by import path, the runs
it starts from. All of it is kept beside the run, and in every checkpoint, and compared field by field before anything
is computed; stages of studies have the same in their keys. Where it is kept, how it is shown and when it counts as stuck
is nobody's business.
"""

import errno
import hashlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from gvjax import checkpoint, config

NOT_COMPARED = ("run_dir", "logging", "checkpoints", "timeouts")

ROWS = "data"
"""What checkpoints call the rows that a dataset was read into, which only reading it can tell."""

EARLIER_RUNS = ("start", "reward_model")
"""Fields that name another run; what counts is the parameters it made."""

Content = Callable[[pathlib.Path], str | None]
"""The hash of a file or folder."""


def identity_of(settings: config.RunConfig) -> dict[str, Any]:
    """JSON: the config's fields that matter, their hash, and under `files` the hash of what each name stands for."""
    fields = config.resolved(settings)
    for name in NOT_COMPARED:
        del fields[name]
    return {**fields, "files": _files(settings)}


def compare(
    settings: config.RunConfig,
    identity: Mapping[str, Any],
    force: Collection[str] = (),
) -> None:
    """Refuses to go on with a run that was begun as another.

    Args:
      settings: of the run that would go on.
      identity: of the same.
      force: fields that may differ, such as `settings.optimizer.learning_rate` or `files.start`.

    Raises:
      ConfigError: fields differ that `force` does not name, or it names none.
    """
    fields = _flat(identity)
    for name in force:
        config.known(name, [*fields, ROWS], "--force")
    directory = pathlib.Path(settings.run_dir)
    if not (directory / "config.json").exists():
        return
    kept = config.reread((directory / "config.json").read_text(encoding="utf-8"))
    files = directory / "files.json"
    before = _flat(
        {
            **{k: v for k, v in config.resolved(kept).items() if k not in NOT_COMPARED},
            "files": json.loads(files.read_text()) if files.exists() else {},
        }
    )
    changed = {
        name: f"{name} was {before.get(name)!r} and is {fields.get(name)!r}"
        for name in sorted({*before, *fields})
        if before.get(name) != fields.get(name)
    }
    finished = (directory / "result.json").exists()
    if finished:
        # What a finished run has read may be gone.
        changed = {
            name: change
            for name, change in changed.items()
            if not (name.startswith("files.") and fields.get(name) is None)
        }
    refused = {name: text for name, text in changed.items() if name not in force}
    if refused:
        forced = " ".join(f"--force {name}" for name in refused)
        more = "" if finished else f", or go on all the same with {forced}"
        raise config.ConfigError(
            f"{directory} holds a run with another config: {'; '.join(refused.values())}. Choose another run_dir, or the"
            f" old values{more}"
        )
    if changed and finished:
        raise config.ConfigError(
            f"{directory} holds a finished run, of which nothing can be changed by --force: {'; '.join(changed.values())}."
            " Choose another run_dir"
        )


def keep(settings: config.RunConfig, identity: Mapping[str, Any]) -> None:
    """Notes beside the run what it is.

    Raises:
      ConfigError: the run directory, or something in it that the run writes to, cannot be written.
    """
    directory = pathlib.Path(settings.run_dir)
    path = directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        written = ("metrics.jsonl", "timing.jsonl", "checkpoints", "params")
        for path in (directory, *(directory / name for name in written)):
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        for name, text in (
            ("files.json", json.dumps(identity["files"])),
            ("config.json", settings.model_dump_json(indent=1)),
        ):
            path = directory / name
            partial = path.with_name(f"{name}.partial")
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(path)
    except OSError as error:
        raise config.ConfigError(
            f"run_dir {directory} cannot be written to ({path.name}: {error.strerror}); choose another, or change its"
            " permissions"
        ) from None


def _source(module: str) -> pathlib.Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    return pathlib.Path(spec.origin)


def content_of(path: pathlib.Path) -> str | None:
    """SHA-256 of a file, or of a folder's files and their names; None where there is nothing."""
    if path.is_dir():
        digest = hashlib.sha256()
        for each in sorted(path.rglob("*")):
            if each.is_file():
                digest.update(f"{each.relative_to(path)} {content_of(each)}\n".encode())
        return digest.hexdigest()
    if not path.exists():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(settings: config.RunConfig) -> dict[str, str | None]:
    """field -> SHA-256 of the content behind its value; None where there is none to be found."""
    found: dict[str, str | None] = {}
    for field in EARLIER_RUNS:
        if (directory := getattr(settings, field)) is not None:
            params = pathlib.Path(directory) / "params"
            found[field] = checkpoint.content_hash(params)
    return {**found, **weights(settings.model), **named(settings)}


def named(
    section: config.Section, content: Content = content_of
) -> dict[str, str | None]:
    """dotted field -> SHA-256 of what its value names, of the files and the code in a section; None where there is none.

    Args:
      section: any part of a config.
      content: hashes a file or folder; `content_of`, or one that remembers.
    """
    found: dict[str, str | None] = {}
    for field, name in config.marked(section, config.FILE).items():
        found[field] = content(pathlib.Path(name))
    for field, name in config.marked(section, config.IMPORTED).items():
        module = name.partition(":")[0]
        # Names without a dot or colon, and this package's own, are covered by its version.
        if name.isidentifier() or module.split(".")[0] == "gvjax":
            continue
        source = _source(module)
        found[field] = None if source is None else content(source)
    return found


def weights(
    model: Mapping[str, Any], content: Content = content_of
) -> dict[str, str | None]:
    """The same of the weights that a config's `model` starts from, if it names any."""
    if "checkpoint" not in model:
        return {}
    found = content(pathlib.Path(str(model["checkpoint"])))
    return {"model.checkpoint": found}


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
