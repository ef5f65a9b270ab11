"""The plan carried out: a line a run in OUT/runs.jsonl, and what is there is not run again."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedlora.errors import DataError
from fedlora.federation.folder import append_row, read_rows
from simulations.studies.privacy.plan import NONE, Settings, Task, Trial
from simulations.studies.privacy.runs import carry_out

__all__ = ["OutOfTime", "Study", "best"]

Row = Mapping[str, Any]


class OutOfTime(Exception):
    """The minutes are over; what is done is kept."""


class Study:
    """One task's runs in a folder."""

    def __init__(self, task: Task, folder: Path, until: float | None = None) -> None:
        self.task, self.until = task, until
        self.file, self._scratch = folder / f"{task.name}.jsonl", folder / f"{task.name}-run"
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, Row] = {row["key"]: row for row in read_rows(self.file)}

    def run(self) -> None:
        """Search and run, budget by budget. Raises `OutOfTime`."""
        for trial in self._trials():
            if trial.key not in self.rows:
                self._run(trial)

    def _trials(self) -> Iterable[Trial]:
        """Yield the runs in their order; a search is over before what it decides comes."""
        task, most = self.task, max(self.task.users)
        for method in task.methods:
            for rate in task.rates:
                for seed in task.tuning_seeds:
                    yield Trial("rates", task.name, most, method, NONE, Settings(rate), seed)
        for users, epsilon in task.blocks():
            for method in task.methods if epsilon != NONE else ():
                rate = self.settings(most, method, NONE).learning_rate
                for settings in (Settings(rate, norm) for norm in task.norms):
                    for seed in task.tuning_seeds:
                        yield Trial("norms", task.name, users, method, epsilon, settings, seed)
            for size, method, budget, seed in task.finals(users, epsilon):
                found = self.settings(size, method, budget)
                yield Trial("final", task.name, size, method, budget, found, seed)

    def settings(self, users: int, method: str, epsilon: float) -> Settings:
        """Return the learning rate and clipping norm that the searches have found."""
        if epsilon == NONE:
            return best(self._found("rates", max(self.task.users), method, NONE))
        at, budget = self.task.tuning_of(users, epsilon)
        return best(self._found("norms", at, method, budget))

    def _found(self, stage: str, users: int, method: str, epsilon: float) -> list[Row]:
        told = None if epsilon == NONE else epsilon
        wanted = (stage, users, method, told)
        return [
            row
            for row in self.rows.values()
            if (row["stage"], row["users"], row["method"], row["epsilon"]) == wanted
        ]

    def _run(self, trial: Trial) -> None:
        if self.until is not None and time.monotonic() > self.until:
            raise OutOfTime
        row = carry_out(self.task, trial, self._scratch)
        append_row(self.file, row)
        self.rows[trial.key] = row
        told = row.get("failed") or ", ".join(
            f"{name} {scores[0]:.4f}" for name, scores in row["scores"].items()
        )
        print(f"{len(self.rows)}: {trial.key}: {told} ({row['cpu_seconds']} CPU s)",
              file=sys.stderr, flush=True)  # fmt: skip


def best(rows: Iterable[Row]) -> Settings:
    """Return the settings whose global adapters have the lowest mean loss.

    Settings with which a run has failed are out. Raises `DataError` where all are.
    """
    losses: dict[Settings, list[float]] = {}
    for row in rows:
        settings = Settings(row["learning_rate"], row["clipping_norm"])
        loss = math.inf if "failed" in row else float(row["scores"]["global"][1])
        losses.setdefault(settings, []).append(loss)
    means = {settings: sum(found) / len(found) for settings, found in losses.items()}
    settings = min(means, key=lambda at: means[at], default=None)
    if settings is None or not math.isfinite(means[settings]):
        raise DataError("a search: expected settings that do not fail, found none; widen its grid")
    return settings
