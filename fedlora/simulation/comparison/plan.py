"""What a comparison runs: methods × grid points × seeds, as plain data that can be written down.

A plan holds the experiment's own table and what changes in it, in this order (the later wins):

    settings   for all runs
    point      of the grid
    method     its overrides; a key may be in the grid or in a method, not in both
    seed, and the learning rate that was tuned
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any, Literal

from fedlora.errors import ConfigError, nearest
from fedlora.experiment import ExperimentConfig, parse_override
from fedlora.plain import from_plain, to_plain

__all__ = [
    "LEARNING_RATE",
    "Overrides",
    "Plan",
    "Tuning",
    "grid_points",
    "parse_grid",
    "parse_methods",
    "show_overrides",
]

Overrides = Mapping[str, Any]  # dotted key to value

LEARNING_RATE = "federation.learning_rate"
VALIDATION_SHARE = 0.1  # where an experiment has none, and the learning rate is tuned
# Tuning runs have a seed of their own: far from the reported ones, however many those are.
TUNING_SEED_DISTANCE = 1_000_000
_NOT_SWEPT = {
    "seed": "use --seeds",
    "federation.method": "use --methods",
    "name": "it changes no result",
}


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the learning rate is found, in the same way for every method and grid point."""

    seed: int  # of the tuning runs; none of the reported ones
    on: Literal["global", "personal"] = "global"  # whose metric on the validation parts decides
    values: int = 5  # a geometric ladder around the experiment's own
    factor: float = math.sqrt(10)  # between neighbours
    extra: int = 4  # values at most that are added while the best one is at an edge

    def __post_init__(self) -> None:
        if self.values < 5:
            raise ConfigError(f"tuning: expected at least 5 learning rates, found {self.values}")
        if not 1 < self.factor < math.inf:
            raise ConfigError(f"tuning: expected a factor over 1, found {self.factor!r}")
        if self.extra < 0:
            raise ConfigError(f"tuning: expected 0 or more extra values, found {self.extra}")


@dataclass(frozen=True, slots=True)
class Plan:
    """All that decides a comparison's numbers."""

    experiment: Mapping[str, Any]  # its table, before any override
    methods: Mapping[str, Mapping[str, Any]]  # label to overrides, in the order of the report
    seeds: tuple[int, ...]
    against: str  # the label of the reference method
    points: tuple[Mapping[str, Any], ...] = ({},)  # one without a grid
    settings: Mapping[str, Any] = field(default_factory=dict)
    only_global: bool = False  # evaluate base and global alone: neither own nor personal
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        if not self.methods:
            raise ConfigError("--methods: expected at least one method, found none")
        if len(self.seeds) < 2:
            raise ConfigError(
                f"--seeds: expected at least 2 for an interval, found {len(self.seeds)}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds: expected different ones, found {list(self.seeds)}")
        if self.against not in self.methods:
            raise ConfigError(
                f"--against {self.against}: not among the methods compared"
                f"{nearest(self.against, self.methods)}"
            )
        swept = {key for point in self.points for key in point}
        for key in swept & _NOT_SWEPT.keys():
            raise ConfigError(f"--grid {key}: cannot be swept; {_NOT_SWEPT[key]}")
        for label, overrides in self.methods.items():
            for key in overrides:
                if key in swept:
                    raise ConfigError(f"method {label!r} sets {key}, which --grid sweeps")
        self._check_tuning(swept)

    def _check_tuning(self, swept: set[str]) -> None:
        if self.tuning is None:
            return
        if self.tuning.seed in self.seeds:
            raise ConfigError(
                f"tuning: expected a seed that is not reported, found {self.tuning.seed}"
            )
        if self.only_global and self.tuning.on == "personal":
            raise ConfigError("--tune-on personal: with --only global there is no personal adapter")
        fixed = [label for label, keys in self.methods.items() if LEARNING_RATE in keys]
        if LEARNING_RATE in swept or fixed:
            where = "--grid sweeps" if LEARNING_RATE in swept else f"method {fixed[0]!r} sets"
            raise ConfigError(f"--tune finds {LEARNING_RATE}, and {where} it: leave one of them")

    def config(
        self, method: str, point: Overrides, *, seed: int, learning_rate: float | None = None
    ) -> ExperimentConfig:
        """Return the resolved experiment of one run. Raises `ConfigError`, naming the run."""
        overrides = {**self.settings, **point, **self.methods[method], "seed": seed}
        if learning_rate is not None:
            overrides[LEARNING_RATE] = learning_rate
        try:
            return ExperimentConfig.from_table(_for_method(self.experiment, overrides), overrides)
        except ConfigError as error:
            where = f"method {method!r}" + (f", {show_overrides(point)}" if point else "")
            raise ConfigError(f"{where}: {error}") from None

    def cells(self) -> list[tuple[int, str]]:
        """Return every (grid point's index, method)."""
        return [(index, label) for index in range(len(self.points)) for label in self.methods]

    def to_table(self) -> dict[str, Any]:
        """Return plain values for JSON; `from_table` reads them back to an equal plan."""
        return dict(to_plain(self))

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Plan:
        """Raises `ConfigError` for a table that is no plan's."""
        return from_plain(cls, table, "plan")


def _for_method(table: Mapping[str, Any], overrides: Overrides) -> Mapping[str, Any]:
    """Leave out the experiment's options of its own method where the method is another."""
    federation = table.get("federation")
    if not isinstance(federation, Mapping) or "method_options" not in federation:
        return table
    own = federation.get("method", "fedit")
    if overrides.get("federation.method", own) == own:
        return table
    kept = {key: value for key, value in federation.items() if key != "method_options"}
    return {**table, "federation": kept}


def parse_methods(text: str) -> dict[str, dict[str, Any]]:
    """Return label to overrides for ``NAME[:OPTION=VALUE…][+OPTIMIZER][+KEY=VALUE…]``, by commas.

    An option is the method's own; a bare word after + is a server optimizer; a key without a
    table's name before it is in [federation].

    >>> parse_methods("fedit,flora:rank=16+adam+robust=median")["flora:rank=16+adam+robust=median"]
    {'federation.method': 'flora', 'federation.method_options.rank': 16, \
'federation.server_optimizer': 'adam', 'federation.robust': 'median'}
    """
    found: dict[str, dict[str, Any]] = {}
    for label in (part.strip() for part in text.split(",")):
        name, *changes = label.split("+")
        method, *options = name.split(":")
        if not method or not all(changes) or not all(options):
            raise ConfigError(
                f"--methods {text}: expected names with commas between, each with :option=value or "
                f"+key=value after it, found {label!r}"
            )
        if label in found:
            raise ConfigError(f"--methods {text}: {label!r} is there twice")
        overrides: dict[str, Any] = {"federation.method": method}
        for option in options:
            key, value = _pair(option, label)
            overrides[f"federation.method_options.{key}"] = value
        for change in changes:
            if "=" not in change:
                overrides["federation.server_optimizer"] = change
                continue
            key, value = _pair(change, label)
            overrides[key if _has_table(key) else f"federation.{key}"] = value
        found[label] = overrides
    return found


def _has_table(key: str) -> bool:
    return key.partition(".")[0] in {item.name for item in fields(ExperimentConfig)}


def _pair(text: str, label: str) -> tuple[str, Any]:
    try:
        return parse_override(text)
    except ConfigError:
        raise ConfigError(f"--methods {label}: expected key=value, found {text!r}") from None


def parse_grid(text: str) -> tuple[str, list[Any]]:
    """Split ``key=v1,v2``; each value is read as TOML, or taken as text where it is not TOML.

    >>> parse_grid("lora.rank=2,8"), parse_grid("data.partition=iid,dirichlet:0.3")
    (('lora.rank', [2, 8]), ('data.partition', ['iid', 'dirichlet:0.3']))
    """
    key, equals, values = text.partition("=")
    if not equals or not key.strip() or not values.strip():
        raise ConfigError(f"--grid {text}: expected key=value,value, such as lora.rank=2,8,32")
    _, found = parse_override(f"values=[{values}]")
    if not isinstance(found, list):  # not TOML as a whole: text, piece by piece
        pieces = [piece.strip() for piece in values.split(",")]
        if not all(pieces):
            raise ConfigError(f"--grid {text}: expected a value between any two commas")
        found = [parse_override(f"value={piece}")[1] for piece in pieces]
    return key.strip(), found


def grid_points(
    grid: Mapping[str, Sequence[Any]] | Iterable[Overrides],
) -> tuple[dict[str, Any], ...]:
    """Return the product of a table's values, or points given one by one as they are.

    >>> grid_points({"lora.rank": [2, 8], "federation.cohort": [5]})
    ({'lora.rank': 2, 'federation.cohort': 5}, {'lora.rank': 8, 'federation.cohort': 5})
    """
    if isinstance(grid, Mapping):
        for key, values in grid.items():
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ConfigError(f"--grid {key}: expected a list of values, found {values!r}")
        points = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    else:
        points = [dict(point) for point in grid] or [{}]
    for index, point in enumerate(points):
        if point in points[:index]:
            raise ConfigError(f"--grid: {show_overrides(point)} is there twice")
    return tuple(points)


def show_overrides(overrides: Overrides) -> str:
    """Return ``key=value`` of each, with commas between."""
    return ", ".join(f"{key}={value}" for key, value in overrides.items())
