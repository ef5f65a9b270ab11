"""A `LoraConfig` of values from a stranger's file: types are checked, and no pattern is slow."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedlora.adapter import LoraConfig
from fedlora.errors import ConfigError, FormatError
from fedlora.formats.strict_json import shown
from fedlora.patterns import compile_regex, is_plain, total_cost

__all__ = ["MAX_PATH", "build_config", "is_cheap", "is_module_path"]

MAX_REGEX_CHARACTERS = 8192  # of all regular expressions that are not plain names
MAX_PATH = 512  # characters of a module path
MAX_PARTS = 32
MAX_MATCH_COST = 1e6  # see fedlora.patterns.match_cost; about 0.05 s


def build_config(
    values: Mapping[str, Any],
    where: str,
    paths: Sequence[str],
    names: Mapping[str, str] | None = None,
) -> LoraConfig:
    """Return the config of an adapter with layers at `paths`; `values` has every field of it.

    `names` are the file's own names of fields, for the text of errors. Raises `FormatError`.
    """
    names = names or {}
    for field, (expected, fits) in _TYPES.items():
        if not fits(values[field]):
            raise FormatError(
                f"{where}: {names.get(field, field)}: expected {expected}, "
                f"found {shown(values[field])}"
            )
    excluded = values["extra"].get("exclude_modules")
    if not _is_target(excluded):
        raise FormatError(f"{where}: exclude_modules: expected {_TARGET}, found {shown(excluded)}")
    _check_patterns([*values["rank_pattern"], *values["alpha_pattern"]], paths, where)
    try:
        if isinstance(excluded, str):
            compile_regex(excluded)
        arguments: Any = {
            field: tuple(value) if isinstance(value, list) else value
            for field, value in values.items()
        }
        return LoraConfig(**arguments)
    except ConfigError as error:
        raise FormatError(f"{where}: {error}") from None


def is_module_path(path: str) -> bool:
    """Whether a path is one that a model may have, and that can be shown and searched."""
    return 0 < len(path) <= MAX_PATH and path.count(".") < MAX_PARTS and path.isprintable()


def is_cheap(config: LoraConfig, paths: Sequence[str]) -> bool:
    """Whether target_modules and exclude_modules can be matched without much work.

    Where they cannot, matching is left out: what an adapter computes is in its layers.
    """
    patterns = [config.target_modules, config.extra.get("exclude_modules")]
    return total_cost([p for p in patterns if isinstance(p, str)], paths) <= MAX_MATCH_COST


def _check_patterns(patterns: list[str], paths: Sequence[str], where: str) -> None:
    characters = sum(len(pattern) for pattern in patterns if not is_plain(pattern))
    if characters > MAX_REGEX_CHARACTERS:
        raise FormatError(
            f"{where}: expected at most {MAX_REGEX_CHARACTERS} characters of regular expressions "
            f"in rank_pattern and alpha_pattern, found {characters:,}; name the layers instead"
        )
    if total_cost(patterns, paths) > MAX_MATCH_COST:
        raise FormatError(
            f"{where}: rank_pattern and alpha_pattern: expected names or simple regular "
            "expressions, found one that could take very long to match; name the layers instead"
        )


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_target(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_REGEX_CHARACTERS
    return value is None or _is_names(value)


def _is_index(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key and type(number) in (int, float) for key, number in value.items()
    )


_TARGET = "a list of names, or a regular expression"
_BLOCK_NAME = re.compile(r"\w{1,64}")
_Check = tuple[str, Callable[[Any], bool]]
_NUMBER: _Check = ("a number", lambda value: type(value) in (int, float))
_TABLE: _Check = ("an object of patterns and numbers", _is_table)
_TYPES: dict[str, _Check] = {
    "rank": ("a whole number", lambda value: type(value) is int),
    "lora_alpha": _NUMBER,
    "target_modules": (_TARGET, lambda value: bool(value) and _is_target(value)),
    "variant": ("a name", lambda value: isinstance(value, str)),
    "lora_dropout": _NUMBER,
    "layers": ("'last:N'", lambda value: value is None or isinstance(value, str)),
    "layers_to_transform": (
        "indices of blocks",
        lambda value: value is None or (isinstance(value, list) and all(map(_is_index, value))),
    ),
    "layers_pattern": (
        "names of lists of blocks",
        lambda value: (
            _is_names(value) and len(value) <= 4 and all(map(_BLOCK_NAME.fullmatch, value))
        ),
    ),
    "rank_pattern": _TABLE,
    "alpha_pattern": _TABLE,
    "fan_in_fan_out": ("true or false", lambda value: isinstance(value, bool)),
    "extra": ("an object", lambda value: isinstance(value, dict)),
}
