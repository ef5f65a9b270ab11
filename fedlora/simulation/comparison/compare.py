"""Compare methods fairly: the same seeds, clients and budget for each, and intervals for all.

A comparison's folder:

    plan.json          what is compared; its presence makes a folder a comparison
    tuning/ runs/      a folder a run, as of `simulate`, each with its result.json
    comparison.json    all numbers and resolved experiments
    comparison.md      the tables
    comparison.png     the plot, where matplotlib is installed
    report.html        all of it to look at, there too

Runs that share a base, data, LoRA and seed follow one another, so that each is opened once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

import fedlora.report as reports
from fedlora import __version__
from fedlora.errors import ConfigError, MissingExtraError, RunError
from fedlora.experiment import (
    ExperimentConfig,
    find_experiment,
    read_table,
)
from fedlora.federation.folder import LOCK, free_folder, locked
from fedlora.files import write_atomic
from fedlora.plain import to_plain
from fedlora.simulation.comparison.plan import (
    TUNING_SEED_DISTANCE,
    VALIDATION_SHARE,
    Overrides,
    Plan,
    Tuning,
    grid_points,
    parse_methods,
    show_overrides,
)
from fedlora.simulation.comparison.plot import draw
from fedlora.simulation.comparison.report import Table, markdown, tables
from fedlora.simulation.comparison.runs import Kind, Part, Result, compute, read_result
from fedlora.simulation.comparison.statistics import (
    COMPARED,
    Cell,
    Difference,
    cell,
    difference,
)
from fedlora.simulation.comparison.tuning import Tuned, tune
from fedlora.simulation.simulate import Progress

__all__ = ["Comparison", "compare"]

PLAN, NUMBERS, TEXT, PLOT = "plan.json", "comparison.json", "comparison.md", "comparison.png"
VERSION = 1  # of plan.json
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Comparison:
    """A finished comparison."""

    folder: Path
    plan: Plan
    results: Mapping[tuple[int, str], Mapping[int, Result]]  # by (point, method), then by seed
    tuned: tuple[Tuned, ...]
    cells: tuple[Cell, ...]
    differences: tuple[Difference, ...]
    plot: Path | None = None  # None without matplotlib
    notes: tuple[str, ...] = ()

    @property
    def any_done(self) -> bool:
        """Whether at least one run came to its end."""
        return any(found.done for found in self.cells)

    def cell(self, method: str, point: int = 0) -> Cell:
        """Return one method's numbers at one grid point."""
        (found,) = (c for c in self.cells if (c.method, c.point) == (method, point))
        return found

    def difference(self, method: str, adapter: str = "global", point: int = 0) -> Difference:
        """Return one method's paired test against the reference."""
        (found,) = (
            d
            for d in self.differences
            if (d.method, d.adapter, d.point) == (method, adapter, point)
        )
        return found

    def tables(self) -> list[Table]:
        """Return the tables of comparison.md."""
        return tables(self.plan, self.cells, self.differences, self.tuned, self.metric)

    @property
    def metric(self) -> str:
        """The task's metric."""
        return _metric(self.results.values())[0]

    def summary(self) -> dict[str, Any]:
        """Return what comparison.json has."""
        return _summary(self)


def compare(
    experiment: str | Path | ExperimentConfig | None = None,
    methods: str | Iterable[str] | Mapping[str, Overrides] | None = None,
    *,
    seeds: int | Sequence[int] = 5,
    grid: Mapping[str, Sequence[Any]] | Iterable[Overrides] = (),
    overrides: Overrides | None = None,
    against: str | None = None,
    only: Literal["global"] | None = None,
    tune: Literal["global", "personal"] | None = None,
    learning_rates: int = 5,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run every method × grid point × seed, and return their means, intervals and paired tests.

    experiment: the name of a bundled experiment, a TOML file, or a config.
    methods: labels as of `parse_methods`, such as ``"fedit,ffa-lora"``; or label to overrides.
    seeds: how many, from the experiment's own upwards; or which.
    grid: dotted key to values, of which every combination is a point; or the points, one by one.
    overrides: dotted keys for all runs.
    against: the label of the method that the others are tested against; default the first.
    only: "global" leaves out own and personal adapters, which cost about as much as the rounds.
    tune: the adapter by whose metric on the clients' validation parts the learning rate is chosen,
        for each method and grid point, among `learning_rates` values and a few more (`tune` in
        `tuning`); a `data.validation_share` of 0 becomes 0.1, also in the reported runs.
    out: a new or empty folder, or one of this very comparison, which goes on; default
        ``runs/<name>-comparison``.
    resume: the folder of a comparison that was stopped, instead of an experiment.

    Raises `ConfigError`, `UnknownNameError`, `RunError` and what data and base raise. A run that
    diverges is no error: it has a result that says so.
    """
    if resume is not None:
        if experiment is not None or methods is not None or out is not None:
            raise ConfigError("--resume goes on with what its folder says: name nothing beside it")
        folder = Path(resume)
        plan = _read_plan(folder)
    else:
        if experiment is None or methods is None:
            raise ConfigError("expected an experiment and --methods, or a folder to --resume")
        plan = _plan(
            experiment, methods, seeds, grid, overrides or {}, against, only, tune, learning_rates
        )
        name = plan.config(plan.against, plan.points[0], seed=plan.seeds[0]).name
        folder = free_folder(f"{name}-comparison") if out is None else Path(out)
        _require_free(folder, plan)
    for point, label in plan.cells():
        plan.config(label, plan.points[point], seed=plan.seeds[0])  # all, before the first run
    with locked(folder):
        if not (folder / PLAN).is_file():
            document = {"version": VERSION, "plan": plan.to_table()}
            write_atomic(folder / PLAN, json.dumps(document, indent=2).encode())
        return _run(plan, folder, progress or (lambda stage, done, total, words: None))


def _plan(
    experiment: str | Path | ExperimentConfig,
    methods: str | Iterable[str] | Mapping[str, Overrides],
    seeds: int | Sequence[int],
    grid: Mapping[str, Sequence[Any]] | Iterable[Overrides],
    overrides: Overrides,
    against: str | None,
    only: Literal["global"] | None,
    tune_on: Literal["global", "personal"] | None,
    learning_rates: int,
) -> Plan:
    if isinstance(experiment, ExperimentConfig):
        table = experiment.to_table()
    else:
        table = read_table(find_experiment(str(experiment)))
    if only not in (None, "global"):
        raise ConfigError(f"--only: expected 'global', found {only!r}")
    if not isinstance(methods, str | Mapping):
        methods = ",".join(methods)
    variants = parse_methods(methods) if isinstance(methods, str) else methods
    # Hundreds of runs would keep everyone's personal adapter, which nobody asked for.
    settings = {"personalization.save": False, **overrides}
    first = settings.pop("seed", table.get("seed", 0))
    if not isinstance(first, int) or isinstance(first, bool):
        raise ConfigError(f"seed: expected a whole number, found {first!r}")
    if tune_on is not None and not settings.get(
        "data.validation_share", table.get("data", {}).get("validation_share", 0)
    ):
        settings["data.validation_share"] = VALIDATION_SHARE
    return Plan(
        experiment=table,
        methods={label: dict(changes) for label, changes in variants.items()},
        seeds=tuple(range(first, first + seeds)) if isinstance(seeds, int) else tuple(seeds),
        against=next(iter(variants), "") if against is None else against,
        points=grid_points(grid or {}),
        settings=settings,
        only_global=only == "global",
        tuning=None
        if tune_on is None
        else Tuning(seed=first + TUNING_SEED_DISTANCE, on=tune_on, values=learning_rates),
    )


def _read_plan(folder: Path) -> Plan:
    if not (folder / PLAN).is_file():
        raise RunError(f"{folder}: expected a comparison's folder, found no {PLAN} in it")
    try:
        document = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        if document.pop("version", None) != VERSION:
            raise ConfigError("it is of another version of fedlora")
        return Plan.from_table(document["plan"])
    except (ConfigError, ValueError, KeyError) as error:
        raise RunError(f"{folder / PLAN}: not a plan: {error}; start a new comparison") from None


def _require_free(folder: Path, plan: Plan) -> None:
    """Raise unless `folder` is new, empty, or of this very plan."""
    if (folder / PLAN).is_file():
        if _read_plan(folder) != plan:
            raise RunError(
                f"{folder}: expected a new or empty folder, found another comparison; go on with "
                f"that one: fedlora compare --resume {folder}"
            )
    elif folder.exists() and not (folder.is_dir() and all(map(_is_ours, folder.iterdir()))):
        raise RunError(
            f"{folder}: expected a new or empty folder, found a file or content; name another --out"
        )


def _is_ours(path: Path) -> bool:
    """Whether a file may be what a start that was killed has left."""
    return path.name == LOCK or path.name.startswith(f".{PLAN}.")


def _run(plan: Plan, folder: Path, report: Progress) -> Comparison:
    tuned = _tune(plan, folder, report) if plan.tuning is not None else {}
    results: dict[tuple[int, str], dict[int, Result]] = {cell: {} for cell in plan.cells()}
    todo = [
        (point, label, seed, _config(plan, point, label, seed, tuned))
        for point in range(len(plan.points))
        for seed in plan.seeds
        for label in plan.methods
    ]
    for number, (point, label, seed, config) in enumerate(_by_world(todo, lambda run: run[3])):
        results[point, label][seed] = _once(
            config,
            folder / "runs" / _folder(plan, point, label) / f"seed-{seed}",
            "global" if plan.only_global else "whole",
            "test",
            _Place(report, "runs", number, len(todo), _words(plan, point, label, f"seed {seed}")),
        )
    ordered = {key: {s: found[s] for s in plan.seeds} for key, found in results.items()}
    return _reported(plan, folder, ordered, tuned)


def _tune(plan: Plan, folder: Path, report: Progress) -> dict[tuple[int, str], Tuned]:
    tuning = plan.tuning
    assert tuning is not None
    cells = [(p, m, _config(plan, p, m, tuning.seed, {})) for p, m in plan.cells()]
    done, total = 0, len(cells) * tuning.values
    found = {}
    for point, label, config in _by_world(cells, lambda cell: cell[2]):
        mine = 0

        def run(rate: float, point: int = point, label: str = label) -> Result:
            nonlocal done, mine, total
            words = _words(plan, point, label, f"learning rate {rate:g}")
            total += mine >= tuning.values  # one that was added at an edge
            mine, done = mine + 1, done + 1
            return _once(
                plan.config(label, plan.points[point], seed=tuning.seed, learning_rate=rate),
                folder / "tuning" / _folder(plan, point, label) / f"{rate:g}",
                "global" if tuning.on == "global" else "whole",
                "validation",
                _Place(report, "tuning", done - 1, total, words),
            )

        center = config.federation.train.learning_rate
        found[point, label] = tune(label, point, center, tuning, run)
    return {cell: found[cell] for cell in plan.cells()}


def _config(
    plan: Plan, point: int, label: str, seed: int, tuned: Mapping[tuple[int, str], Tuned]
) -> ExperimentConfig:
    rate = tuned[point, label].learning_rate if tuned else None
    return plan.config(label, plan.points[point], seed=seed, learning_rate=rate)


def _by_world(items: Sequence[T], config_of: Callable[[T], ExperimentConfig]) -> list[T]:
    """Return `items` with those together that open the same base and data; else in their order."""
    first: dict[Any, int] = {}

    def key(item: T) -> int:
        config = config_of(item)
        world = (config.base, config.data, config.lora, config.seed, config.engine.checkpointing)
        return first.setdefault(world, len(first))

    return sorted(items, key=key)


def _folder(plan: Plan, point: int, label: str) -> Path:
    """Return a run's place: the grid point, where there is a grid, then the method."""
    method = quote(label, safe="+=")
    if plan.points == ({},):
        return Path(method)
    shown = quote(show_overrides(plan.points[point]).replace(", ", ","), safe="=,.")
    return Path(f"{point:03d}-{shown}"[:100]) / method


def _words(plan: Plan, point: int, label: str, more: str) -> str:
    return ", ".join(filter(None, (label, show_overrides(plan.points[point]), more)))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a run stands among those of its stage."""

    report: Progress
    stage: str
    before: int  # runs that are done
    total: int
    words: str

    def within(self, inner: str, done: int, of: int, _: str) -> None:
        """Show the run's own progress beside the number of runs that are done."""
        self.report(self.stage, self.before, self.total, f"{self.words}: {inner} {done}/{of}")

    def over(self) -> None:
        self.report(self.stage, self.before + 1, self.total, self.words)


def _once(config: ExperimentConfig, folder: Path, kind: Kind, part: Part, place: _Place) -> Result:
    """Return a run's result; one that an earlier process has finished is only read."""
    if (found := read_result(folder)) is not None:
        return found
    result = compute(config, folder, kind, part, place.within)
    place.over()
    return result


def _reported(
    plan: Plan,
    folder: Path,
    results: Mapping[tuple[int, str], Mapping[int, Result]],
    tuned: Mapping[tuple[int, str], Tuned],
) -> Comparison:
    adapters = COMPARED[:1] if plan.only_global else COMPARED
    comparison = Comparison(
        folder=folder,
        plan=plan,
        results=results,
        tuned=tuple(tuned.values()),
        cells=tuple(cell(label, point, found) for (point, label), found in results.items()),
        differences=tuple(
            difference(label, plan.against, point, adapter, found, results[point, plan.against])
            for (point, label), found in results.items()
            for adapter in adapters
            if label != plan.against
        ),
    )
    write_atomic(folder / NUMBERS, json.dumps(comparison.summary(), indent=2).encode())
    write_atomic(folder / TEXT, markdown(plan, comparison.tables()).encode())
    try:
        image = draw(plan, comparison.cells, comparison.metric)
    except MissingExtraError as missing:
        return replace(comparison, notes=(str(missing),))
    write_atomic(folder / PLOT, image)
    reports.report_at_end(folder)
    return replace(comparison, plot=folder / PLOT)


def _metric(results: Iterable[Mapping[int, Result]]) -> tuple[str, bool]:
    """Return the task's metric and whether higher is better, as some finished run has them."""
    for found in results:
        for result in found.values():
            if result.is_done:
                return result.metric, result.higher_is_better
    return "metric", True


def _summary(comparison: Comparison) -> dict[str, Any]:
    plan = comparison.plan
    tuned = {(found.point, found.method): found for found in comparison.tuned}
    metric, higher = _metric(comparison.results.values())
    runs = []
    for (point, label), found in comparison.results.items():
        for seed, result in found.items():
            numbers = to_plain(result)
            del numbers["clients"]  # of a large population; every run's folder has them
            folder = Path("runs") / _folder(plan, point, label) / f"seed-{seed}"
            runs.append(
                {"method": label, "point": point, "seed": seed, "folder": str(folder), **numbers}
            )
    return {
        "fedlora_version": __version__,
        "metric": metric,
        "higher_is_better": higher,
        "plan": plan.to_table(),
        "experiments": [
            {
                "method": label,
                "point": point,
                "resolved": _config(plan, point, label, plan.seeds[0], tuned).to_table(),
            }
            for point, label in plan.cells()
        ],
        "tuning": [to_plain(found) for found in comparison.tuned],
        "cells": [found.as_dict() for found in comparison.cells],
        "differences": [found.as_dict() for found in comparison.differences],
        "runs": runs,
    }
