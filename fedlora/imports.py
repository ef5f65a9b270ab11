"""Import what a user names as "module:function": a base, a data set, a task."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from fedlora.errors import ConfigError

__all__ = ["import_function", "is_function"]


def is_function(name: str) -> bool:
    """Whether `name` has the form "module:function" rather than an id or a path."""
    module, colon, function = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), function))


def import_function(name: str, what: str) -> Callable[..., Any]:
    """Return the function named "module:function"; the working directory is searched as well.

    Raises `ConfigError`, opening with `what`, when it cannot be imported or is no function.
    """
    module, _, function = name.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that a stray file cannot hide an installed package
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{what}: cannot import {name!r}: {error}") from error
    if not callable(found):
        raise ConfigError(
            f"{what}: expected {name!r} to be a function, found {type(found).__name__}"
        )
    return found  # type: ignore[no-any-return]
