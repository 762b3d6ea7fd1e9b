"""Answers of a judge kept on disk under the hash of what was asked, so that nothing is paid for twice.

Several processes may share a folder: an entry appears whole or not at all, and the first one to write it wins.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any

CACHE_VERSION = 1
"""Part of every key; raised when what a stored answer means changes."""


def key_of(base_url: str, request: dict[str, Any]) -> str:
    """The key of a request to an endpoint: 64 hex digits."""
    text = json.dumps([CACHE_VERSION, base_url.rstrip("/"), request], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read(path: pathlib.Path) -> dict[str, Any] | None:
    """The entry that stands there, if any.

    Raises:
      ValueError: it is damaged.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        entry = json.loads(text)
        whole = isinstance(entry["answer"], str) and "finish_reason" in entry
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(
            f"the kept answer {path} is damaged; delete the file, and it will be asked again"
        )
    return entry


def keep(path: pathlib.Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Writes an entry in one piece; the one that stands there afterwards, ours or an earlier one."""
    path.parent.mkdir(exist_ok=True)
    number, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            json.dump(entry, file)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)
        except FileExistsError:
            pass
        except OSError:
            # No hard links here: then the last one to write wins.
            os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
    standing = read(path)
    return entry if standing is None else standing
