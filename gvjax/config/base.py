"""What every section of a config is made of."""

import contextlib
import difflib
import typing
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import pydantic
from pydantic import Field

Scalar = bool | int | float | str | None
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveOrInf = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]

IMPORTED, FILE = "imported", "file"
Imported = Annotated[str, IMPORTED]
"""A name that may be an import path, `package.module:name`: the code behind it belongs to what a run computes."""
FileName = Annotated[str, FILE]
"""A file or folder that a run reads: its content belongs to what a run computes."""


def _is_path(run_dir: str) -> str:
    if "://" in run_dir:
        raise ValueError(
            f"{run_dir} is a bucket's address, but a run is written as files, and this would become a directory of that name; mount"
            " the bucket and give the path of the mount, or let `python -m launch` do both"
        )
    return run_dir


RunDir = Annotated[str, pydantic.AfterValidator(_is_path)]
"""A directory that a run is written to."""


class ConfigError(ValueError):
    """A config that cannot be run; the message says which field, what is wrong and what would do."""


@contextlib.contextmanager
def refusing(place: str = "") -> Iterator[None]:
    """A ValueError that comes up inside is the config's fault, and becomes a ConfigError.

    Args:
      place: the field, or whatever is to be put right; the message begins with it.
    """
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{place}: {error}" if place else str(error)) from None


class Section(pydantic.BaseModel):
    """A frozen part of a config that knows its own fields and no others."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


def marked(section: Section, mark: str, prefix: str = "") -> dict[str, str]:
    """dotted field -> value, of the fields of a section, and of those inside it, that are of a marked type."""
    found: dict[str, str] = {}
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            found |= marked(value, mark, f"{prefix}{name}.")
        elif isinstance(value, str) and _bears(info, mark):
            found[prefix + name] = value
    return found


def _bears(info: Any, mark: str) -> bool:
    kinds = [info, *typing.get_args(info.annotation)]
    return any(
        mark in getattr(kind, where, ())
        for kind in kinds
        for where in ("metadata", "__metadata__")
    )


Unused = list[tuple[str, str]]
"""(field, why nothing reads it) of options that other fields switch off."""

RESOLVED = {"resolved": True}
"""Validation context of a config that the library itself wrote, with every field spelled out."""


def refuse_unused(
    section: Section, unused: Unused, info: pydantic.ValidationInfo
) -> None:
    if info.context == RESOLVED:
        return
    for field, why in unused:
        if field in section.model_fields_set:
            raise ValueError(f"{field} is given, but {why}; take it out of the config")


def known(name: str, names: Iterable[str], place: str) -> str:
    """The name, if it is one of them.

    Raises:
      ConfigError: it is not; the message names the near miss.
    """
    names = list(names)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"{place}: there is no {name!r}{hint} (known: {', '.join(names)})"
        )
    return name
