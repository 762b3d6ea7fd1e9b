"""From YAML text and `a.b=c` overrides to checked sections, with messages that name the way out."""

import dataclasses
import difflib
import importlib
import json
import pathlib
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pydantic
import yaml

from gvjax.config.base import ConfigError, Section
from gvjax.config.recipes import RECIPES_OF_ROAD
from gvjax.config.sections import KINDS_OF_TASK

S = TypeVar("S", bound=Section)
D = TypeVar("D")


class Loader(yaml.SafeLoader):
    """YAML with 1e-6 a number, only true and false booleans (not yes, no, on, off), only decimal integers (010 is none, nor
    1:30), and no dates; repeated keys are refused."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            (tag, regex)
            for tag, regex in pairs
            if not tag.endswith((":bool", ":float", ":int", ":timestamp"))
        ]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def read(path: pathlib.Path, extended: tuple[pathlib.Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a config file, laid over that of the file which its `extends` names, if it does.

    Nested mappings are merged; any other value, lists too, replaces what it stands over.

    Args:
      path: YAML. `extends` is a path from the file's own directory.
      extended: the files that led here.

    Raises:
      ConfigError: a file cannot be read, holds no mapping, or extends itself.
    """
    if path.resolve() in extended:
        raise ConfigError(f"{path} extends itself; take out one `extends`")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no mapping; a config is `key: value` lines")
    name = data.pop("extends", None)
    if name is None:
        return data
    if not isinstance(name, str):
        raise ConfigError(f"{path}: extends is {name!r}; name one file")
    base = read(path.parent / name, (*extended, path.resolve()))
    return merge(base, data)


def override(data: dict, assignment: str) -> None:
    """Writes the value of one `a.b=c` into nested mappings, in place.

    Raises:
      ConfigError: it is not of that form, or leads through a value.
    """
    name, separator, text = assignment.partition("=")
    if not separator or not name:
        raise ConfigError(
            f"override {assignment!r} is not of the form key=value, e.g. settings.steps=10"
        )
    try:
        value = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the value of override {assignment!r} is not YAML: {error}"
        ) from None
    *parents, last = name.split(".")
    place = data
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ConfigError(
                f"override {assignment!r}: {parent} is a value, not a section with keys"
            )
    place[last] = value


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings with some values replaced."""
    merged = dict(base)
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def validate(
    kind: type[S], data: Any, source: str, context: dict[str, Any] | None = None
) -> S:
    """A section from plain data.

    Raises:
      ConfigError: every fault on one line, each with its place, starting with `source`.
    """
    try:
        return kind.model_validate_json(json.dumps(data), context=context)
    except pydantic.ValidationError as error:
        lines = [_explain(kind, problem) for problem in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


_TAGS = {
    "sft",
    "reward",
    *(name for names in RECIPES_OF_ROAD.values() for name in names),
}


def _explain(kind: type[Section], problem: Any) -> str:
    # The tag of a union stands in pydantic's place, but not in the file.
    parts = [
        part
        for before, part in zip((None, *problem["loc"]), problem["loc"])
        if not (before == "settings" and part in _TAGS)
        and not (before == "task" and part in KINDS_OF_TASK)
    ]
    place = ".".join(str(part) for part in parts)
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        fields = _fields_at(kind, problem["loc"][:-1])
        close = difflib.get_close_matches(key, fields, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(fields)}"
        return f"{place} is not a key; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{place}: {message}" if place else message
    if problem["type"] == "missing":
        return f"{place} is missing"
    return f"{place} is {problem['input']!r}: {message}"


def _fields_at(kind: type[Section], loc: Sequence[Any]) -> list[str]:
    """The field names of the section at a place, following tags of unions."""
    kinds: list[Any] = [kind]
    for part in loc:
        following = []
        for each in kinds:
            for section in _sections(each):
                if part in section.model_fields:
                    following.append(section.model_fields[part].annotation)
                elif (
                    section.model_fields.get("recipe")
                    and part == section.model_fields["recipe"].default
                ) or KINDS_OF_TASK.get(str(part)) is section:
                    following.append(section)
        # A dictionary key or a list index leads to no new field: stay with the value's type.
        kinds = following or kinds
    return sorted(
        {
            name
            for each in kinds
            for section in _sections(each)
            for name in section.model_fields
        }
    )


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [
        section
        for argument in getattr(annotation, "__args__", ())
        for section in _sections(argument)
    ]


def dataclass_from(kind: type[D], fields: Mapping[str, Any], place: str) -> D:
    """A frozen dataclass of the library from config values, types checked.

    Args:
      kind: the dataclass; its own ValueErrors are passed on with `place` in front.
      fields: its arguments.
      place: the config key they stand under, for messages.

    Raises:
      ConfigError: an unknown field (with the near miss), a wrong type or a refused value.
    """
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            )
            raise ConfigError(f"{place}.{name} is not a key; {hint}")
    types = typing.get_type_hints(kind)
    for name, value in fields.items():
        try:
            pydantic.TypeAdapter(types[name]).validate_json(
                json.dumps(value), strict=True
            )
        except pydantic.ValidationError as error:
            message = error.errors()[0]["msg"]
            raise ConfigError(f"{place}.{name} is {value!r}: {message}") from None
    try:
        return kind(**fields)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{place}: {error}") from None


def import_object(path: str) -> Any:
    """What `package.module:name` names.

    Raises:
      ConfigError: no such module or name.
    """
    module, separator, name = path.partition(":")
    if not separator:
        raise ConfigError(f"{path!r} is not an import path; write package.module:name")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"cannot import {path!r}: {error}") from None
