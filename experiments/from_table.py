"""Builds dataclasses from tables such as those of TOML files, and checks names and types."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
}


def from_table(kind: type[T], table: Any, where: str) -> T:
    """Builds an instance of the dataclass `kind` from {field: value}; messages call the table `where`.

    Raises:
      ValueError: `table` is not a table, a name is unknown or missing, or a value has another type.

    >>> @dataclasses.dataclass
    ... class Final:
    ...     seeds: list[int]
    >>> from_table(Final, {"seeds": 3}, "final")
    Traceback (most recent call last):
    ValueError: final: seeds must be a list, each a whole number, got 3
    """
    if not isinstance(table, dict):
        raise ValueError(f"{where} must be a table, got {table!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := [name for name in table if name not in fields]:
        raise ValueError(f"{where} has an unknown key {unknown[0]!r}; known are {', '.join(fields)}")
    for name, field in fields.items():
        if field.default is field.default_factory is dataclasses.MISSING and name not in table:
            raise ValueError(f"{where} has no {name}")
    check_types(kind, table, f"{where}: ")
    return kind(**table)


def check_types(kind: type, values: Mapping[str, Any], where: str = "") -> None:
    """Raises a ValueError if a value does not have the type of the field of that name in the dataclass `kind`.

    Types may be bool, int, float (which also takes an int), str, list[…], dict[…], Literal[…] and unions of these.
    """
    for name, wanted in typing.get_type_hints(kind).items():
        if name in values and not _fits(values[name], wanted):
            raise ValueError(f"{where}{name} must be {_words(wanted)}, got {values[name]!r}")


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value in inner
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(one, inner[1]) for one in value.values())
    return kind is Any or type(value) is kind or (kind is float and type(value) is int)


def _words(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(one) for one in inner if one is not types.NoneType)
    if origin is list:
        return f"a list, each {_words(inner[0])}"
    if origin is dict:
        return "a table" if inner[1] is Any else f"a table, each {_words(inner[1])}"
    return WORDS.get(kind, kind.__name__)
