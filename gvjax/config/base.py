"""What every section of a config is made of."""

import difflib
from collections.abc import Iterable
from typing import Annotated

import pydantic
from pydantic import Field

Scalar = bool | int | float | str | None
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class ConfigError(ValueError):
    """A config that cannot be run; the message says which field, what is wrong and what would do."""


class Section(pydantic.BaseModel):
    """A frozen part of a config that knows its own fields and no others."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


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
