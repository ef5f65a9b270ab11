"""How an adapter is made: `LoraConfig`, with PEFT's keys where PEFT has them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, get_args

from fedlora.errors import ConfigError
from fedlora.patterns import compile_regex, pattern_table

__all__ = ["LoraConfig", "Variant", "check_rank"]

Variant = Literal["lora", "rslora", "dora", "rsdora"]


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """How an adapter is made. The keys are PEFT's where PEFT has them (`rank` is its ``r``).

    Raises `ConfigError` on a value that makes no sense.
    """

    rank: int = 8
    lora_alpha: float = 16.0
    # Names (a path's last components), one regular expression for the whole path, or "all-linear".
    target_modules: tuple[str, ...] | str = "all-linear"
    variant: Variant = "lora"
    lora_dropout: float = 0.0  # probability
    layers: str | None = None  # "last:4": only the last four blocks
    layers_to_transform: tuple[int, ...] | None = None  # indices of blocks; not beside `layers`
    layers_pattern: tuple[str, ...] = ()  # names of the lists of blocks; empty: any
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # regular expression -> rank
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False  # the base keeps its weights as (in, out), as GPT-2's Conv1D does
    extra: Mapping[str, Any] = field(default_factory=dict)  # PEFT keys that change nothing here

    def __post_init__(self) -> None:
        check_rank("rank", self.rank)
        _check_positive("lora_alpha", self.lora_alpha)
        if self.variant not in get_args(Variant):
            raise ConfigError(
                f"variant: expected one of {', '.join(get_args(Variant))}, found {self.variant!r}"
            )
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(
                f"lora_dropout: expected a probability in [0, 1), found {self.lora_dropout!r}"
            )
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if not self.target_modules or not all(isinstance(t, str) for t in self.target_modules):
            raise ConfigError(
                "target_modules: expected names of modules, a regular expression or 'all-linear', "
                f"found {self.target_modules!r}"
            )
        if self.layers is not None:
            if not re.fullmatch(r"last:[1-9]\d*", self.layers):
                raise ConfigError(f"layers: expected 'last:N' with N >= 1, found {self.layers!r}")
            if self.layers_to_transform is not None:
                raise ConfigError("layers and layers_to_transform exclude each other: remove one")
        for name, rank in self.rank_pattern.items():
            check_rank(f"rank_pattern[{name!r}]", rank)
        for name, alpha in self.alpha_pattern.items():
            _check_positive(f"alpha_pattern[{name!r}]", alpha)
        for patterns in (self.rank_pattern, self.alpha_pattern):
            pattern_table(tuple(patterns))
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            compile_regex(self.target_modules)
        for name in ("rank_pattern", "alpha_pattern", "extra"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __hash__(self) -> int:
        return hash((self.rank, self.lora_alpha, self.target_modules, self.variant, self.layers))

    def __reduce__(self) -> tuple[Any, ...]:  # a MappingProxyType cannot be pickled or copied
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        plain: dict[str, Any] = {
            name: dict(v) if isinstance(v, Mapping) else v for name, v in values.items()
        }
        return partial(LoraConfig, **plain), ()

    @property
    def uses_rslora(self) -> bool:
        return self.variant in ("rslora", "rsdora")

    @property
    def uses_dora(self) -> bool:
        return self.variant in ("dora", "rsdora")

    def resolve(self, paths: Iterable[str]) -> dict[str, tuple[int, float]]:
        """Return each path's rank and scaling, the patterns applied as PEFT applies them.

        The scaling is ``lora_alpha / rank``, or ``lora_alpha / sqrt(rank)`` for rsLoRA
        (arXiv:2312.03732).
        """
        paths = list(paths)
        ranks = _first_matches(self.rank_pattern, paths, self.rank)
        alphas = _first_matches(self.alpha_pattern, paths, self.lora_alpha)
        divisors = [math.sqrt(rank) if self.uses_rslora else rank for rank in ranks]
        values = zip(paths, ranks, alphas, divisors, strict=True)
        return {path: (rank, float(alpha / divisor)) for path, rank, alpha, divisor in values}

    def rank_of(self, path: str) -> int:
        """Return the rank for the layer at `path`; see `resolve`."""
        return self.resolve([path])[path][0]

    def scaling_of(self, path: str) -> float:
        """Return the scaling for the layer at `path`; see `resolve`."""
        return self.resolve([path])[path][1]


def _first_matches(patterns: Mapping[str, Any], paths: Sequence[str], default: Any) -> list[Any]:
    if not patterns:
        return [default] * len(paths)
    table, values = pattern_table(tuple(patterns)), list(patterns.values())
    found = [table.find(path) for path in paths]
    return [default if index is None else values[index] for index in found]


def check_rank(name: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is a rank; `name` opens the text."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: expected a whole number >= 1, found {value!r}")


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name}: expected a finite number > 0, found {value!r}")
