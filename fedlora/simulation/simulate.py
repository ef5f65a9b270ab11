"""The main job: federate over virtual clients, then show what each person gets."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora import __version__
from fedlora.adapter import Adapter
from fedlora.data import FederatedData
from fedlora.errors import ConfigError, RunError
from fedlora.evaluation import evaluate
from fedlora.experiment import ExperimentConfig, find_experiment
from fedlora.files import write_atomic
from fedlora.formats import load_adapter, save_adapter
from fedlora.personalization import compare_adapters
from fedlora.simulation.folder import (
    EXPERIMENT,
    append_row,
    claim,
    free_folder,
    locked,
    read_rows,
)
from fedlora.simulation.results import cross_matrix, results, table

__all__ = ["Progress", "Run", "simulate"]

Progress = Callable[[str, int, int, str], None]  # stage, done, of how many, a few words


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run."""

    folder: Path
    adapter: Adapter  # the global one
    summary: dict[str, Any]  # summary.json
    clients: list[dict[str, Any]]  # clients.jsonl

    def table(self) -> str:
        """Return base, own, global and personal as a text table."""
        return table(self.summary)


def simulate(
    experiment: str | Path | ExperimentConfig | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    cross: int = 0,
    progress: Progress | None = None,
) -> Run:
    """Run an experiment and return its results; everything is also in the run's folder.

    experiment: the name of a bundled experiment, a TOML file, or a config.
    overrides: dotted keys, such as ``{"federation.rounds": 5}``.
    out: a new or empty folder; default ``runs/<name>``, numbered when that is taken.
    resume: the folder of a run that was stopped, instead of an experiment.
    cross: evaluate the own adapters of that many clients on one another's data too.

    Raises `ConfigError`, `RunError` and whatever data and base raise.
    """
    report = progress or (lambda stage, done, total, words: None)
    config, folder = _prepare(experiment, overrides or {}, out, resume)
    with locked(folder):
        return _run(config, folder, cross, report)


def _prepare(
    experiment: str | Path | ExperimentConfig | None,
    overrides: Mapping[str, Any],
    out: str | Path | None,
    resume: str | Path | None,
) -> tuple[ExperimentConfig, Path]:
    if resume is not None:
        folder = Path(resume)
        if experiment is not None or out is not None or overrides:
            raise ConfigError("--resume goes on with what its folder says: name nothing beside it")
        if not (folder / EXPERIMENT).is_file():
            raise RunError(f"{folder}: expected a run's folder, found no {EXPERIMENT} in it")
        return ExperimentConfig.from_toml(folder / EXPERIMENT), folder
    if experiment is None:
        raise ConfigError("expected an experiment or a folder to resume")
    if isinstance(experiment, ExperimentConfig):
        config = ExperimentConfig.from_table(experiment.to_table(), overrides)
    else:
        config = ExperimentConfig.from_toml(find_experiment(str(experiment)), overrides)
    folder = free_folder(config.name) if out is None else Path(out)
    claim(folder, config.to_toml())
    return config, folder


def _run(config: ExperimentConfig, folder: Path, cross: int, report: Progress) -> Run:
    if (folder / SUMMARY).is_file():
        return _finished(folder)
    clock = _Clock(folder)
    world = open_world(config.base, config.data, config.lora, config.seed)
    state, population = run_rounds(config, folder, report)
    provenance = {"run": config.name, "round": state.round, "method": config.federation.method}
    save_adapter(state.adapter, folder / "adapter", provenance=provenance)
    save_adapter(state.adapter, folder / "adapter.safetensors", provenance=provenance)
    rows = _evaluate_clients(world, state.adapter, population, folder, cross, clock, report)
    task = world.task
    summary = {
        "name": config.name,
        "rounds": state.round,
        **results(rows, metric=task.metric, higher_is_better=task.higher_is_better),
        "bytes_up": population.bytes_up,
        "bytes_down": population.bytes_down,
        "seconds": round(clock.seconds(), 3),
        "seed": config.seed,
        "fedlora_version": __version__,
        "privacy": None,
    }
    if cross:
        summary["extra"]["cross"] = _cross(world, rows, folder, cross, report)
    write_atomic(folder / SUMMARY, json.dumps(summary, indent=2).encode())
    return Run(folder, state.adapter, summary, rows)
