"""Checks that server optimizers and robust rules share: names, options, numbers. NumPy only."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fedlora.errors import ConfigError, nearest, unknown_name

__all__ = ["build_named", "require_number", "require_whole"]

T = TypeVar("T")


def build_named(
    kind: str, table: Mapping[str, Callable[..., T]], name: str, options: Mapping[str, Any]
) -> T:
    """Call ``table[name](**options)``.

    Raises `UnknownNameError` and, for an unknown option or its value, `ConfigError`, each with the
    nearest known name.
    """
    if name not in table:
        raise unknown_name(kind, name, table)
    parameters = inspect.signature(table[name]).parameters
    for option in options:
        if option not in parameters:
            known = nearest(option, parameters) or "; it has none"
            raise ConfigError(f"{kind} {name!r}: unknown option {option!r}{known}")
    for option, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and option not in options:
            raise ConfigError(f"{kind} {name!r}: option {option!r} is needed and is missing")
    try:
        return table[name](**options)
    except ConfigError as error:
        raise ConfigError(f"{kind} {name!r}: {error}") from None


def require_number(option: str, value: object, low: float, high: float, words: str) -> None:
    """Raise `ConfigError` unless `value` is a number in [low, high); `words` say which."""
    number = float(value) if isinstance(value, int | float) else math.nan
    if isinstance(value, bool) or not low <= number < high:
        raise ConfigError(f"{option}: expected {words}, found {value!r}")


def require_whole(option: str, value: object, least: int) -> None:
    """Raise `ConfigError` unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{option}: expected a whole number >= {least}, found {value!r}")
