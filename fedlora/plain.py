"""Frozen dataclasses from tables of plain values, as TOML, JSON and messages have, and back.

Unknown keys are refused with the nearest known one, and every value is checked against its field's
type.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from fedlora.errors import ConfigError, nearest

__all__ = ["field_names", "from_plain", "refuse_unknown", "to_plain"]

T = TypeVar("T")


def from_plain(cls: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from plain values, each checked against its field's type.

    Raises `ConfigError` on an unknown, missing or mistyped key; `where` opens its text.
    """
    return cast(T, _build(cls, table, where))


def to_plain(value: Any) -> Any:
    """Return a dataclass as nested tables of plain values; None is left out."""
    return _plain(value)


def _build(cls: Any, table: Mapping[str, Any], where: str) -> Any:
    """Build the dataclass `cls` from a table: known keys only, each value of its field's type."""
    refuse_unknown(where, table, field_names(cls))
    hints = _hints(cls)
    values = {}
    for item in dataclasses.fields(cls):
        key = f"{where}.{item.name}" if where else item.name
        if item.name in table:
            values[item.name] = _convert(table[item.name], hints[item.name], key)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{key}: this key is needed and is missing")
    try:
        return cls(**values)
    except ConfigError as error:
        known = not where or str(error).startswith(f"{where}.")
        raise ConfigError(str(error) if known else f"{where}: {error}") from None


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)  # slow, and a message's values are read once a client and round


def _convert(value: Any, hint: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}: expected a table, found {value!r}")
        return _build(hint, value, key)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:  # TOML has no None; overrides and JSON do
            return None
        choices = [choice for choice in args if choice is not type(None)]
        if len(choices) == 1:
            return _convert(value, choices[0], key)
        for choice in choices:
            try:
                return _convert(value, choice, key)
            except ConfigError:
                continue
        raise _wrong_type(key, " or ".join(_type_name(choice) for choice in choices), value)
    if origin is Literal:
        if value not in args:
            raise ConfigError(
                f"{key}: expected one of {', '.join(map(str, args))}, found {value!r}"
            )
        return value
    if origin in (tuple, frozenset):
        if not isinstance(value, list | tuple):
            raise _wrong_type(key, _type_name(hint), value)
        return origin(_convert(item, args[0], key) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong_type(key, "a table", value)
        return {name: _convert(item, args[1], f"{key}.{name}") for name, item in value.items()}
    if hint is Any:
        return value
    accepted = (int, float) if hint is float else (hint,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise _wrong_type(key, _type_name(hint), value)
    try:
        return hint(value)
    except OverflowError:  # a whole number that no float can hold
        raise ConfigError(f"{key}: expected a number, found one that is too large") from None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: _plain(item) for name, item in items if item is not None}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def field_names(cls: Any, without: str = "") -> list[str]:
    """Return the names of a dataclass's fields, but one."""
    return [f.name for f in dataclasses.fields(cls) if f.name != without]


def refuse_unknown(where: str, table: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise `ConfigError` for a key that is not known, with the nearest one that is."""
    names = list(known)
    for key in table:
        if key not in names:
            place = f"{where}.{key}" if where else key
            raise ConfigError(f"{place}: unknown key{nearest(key, names)}")


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if get_origin(hint) in (tuple, frozenset):
        return "a list"
    return names.get(hint, "a table")


def _wrong_type(key: str, expected: str, value: Any) -> ConfigError:
    return ConfigError(f"{key}: expected {expected}, found {value!r}")
