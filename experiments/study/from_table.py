"""Builds dataclasses from tables of values, as TOML files have them, and checks names and types."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "a table",
    types.NoneType: "nothing",
}


def from_table(kind: type[T], table: Any, where: str) -> T:
    """An instance of the dataclass `kind`.

    Args:
      kind: fields are bool, int, float, str, list[…], dict[…], Literal[…] and unions of these.
      table: {field: value}.
      where: the place in the file, for messages.

    Raises:
      ValueError: it is no table, a name is unknown or missing, or a value has another type.

    >>> @dataclasses.dataclass
    ... class Final:
    ...     seeds: list[int]
    >>> from_table(Final, {"seeds": 3}, "final")
    Traceback (most recent call last):
    ValueError: final: seeds must be a list, each a whole number, got 3
    """
    if not isinstance(table, dict):
        raise ValueError(f"{where} must be a table, got {table!r}")
    fields, kinds = {field.name: field for field in dataclasses.fields(kind)}, typing.get_type_hints(kind)
    if unknown := [name for name in table if name not in fields]:
        raise ValueError(f"{where} has an unknown key {unknown[0]!r}; known are {', '.join(fields)}")
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and name not in table:
            raise ValueError(f"{where} has no {name}")
        if name in table and not _fits(table[name], kinds[name]):
            raise ValueError(f"{where}: {name} must be {_words(kinds[name])}, got {table[name]!r}")
    return kind(**table)


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
