"""The main job: federate over virtual clients, then show what each person gets."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fedlora.report as reports
from fedlora.adapter import Adapter
from fedlora.data import FederatedData
from fedlora.errors import ConfigError, RunError
from fedlora.experiment import ExperimentConfig, find_experiment
from fedlora.federation.callbacks import Callbacks, RunCallback
from fedlora.federation.checkpoint import (
    ClientRecord,
    RoundRecord,
    has_checkpoint,
    read_checkpoint,
    read_rounds,
)
from fedlora.federation.faults import describe_faults
from fedlora.federation.folder import (
    CLIENTS,
    EXPERIMENT,
    SUMMARY,
    claim,
    free_folder,
    locked,
    read_rows,
    require_free,
    save_global,
)
from fedlora.federation.guarantee import privacy_summary
from fedlora.federation.phases import round_words
from fedlora.federation.results import run_notes, run_summary, table
from fedlora.files import write_atomic
from fedlora.formats import load_adapter
from fedlora.nn.inject import kept_activations
from fedlora.simulation.people import cross_evaluate, evaluate_clients
from fedlora.simulation.rounds import PRIVATE, run_rounds
from fedlora.simulation.slab import starts_of
from fedlora.world import shared_world

__all__ = ["Progress", "Run", "simulate"]

OUTSIDE = (
    "the figures of single clients are this simulation's own, and outside the guarantee: devices "
    "tell none of them"
)

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
    progress: Progress | None = None,
    callbacks: Sequence[RunCallback] = (),
    report: bool = True,
) -> Run:
    """Run an experiment and return its results; everything is also in the run's folder.

    experiment: the name of a bundled experiment, a TOML file, or a config.
    overrides: dotted keys, such as ``{"federation.rounds": 5}``.
    out: a new or empty folder; default ``runs/<name>``, numbered when that is taken.
    resume: the folder of a run that was stopped, instead of an experiment.
    callbacks: what hears of the run's rounds and clients; see `fedlora.federation.callbacks`.
    report: whether to write ``report.html`` at the end, where matplotlib is installed.

    Raises `ConfigError`, `RunError` and whatever data and base raise.
    """
    show = progress or (lambda stage, done, total, words: None)
    heard = Callbacks(callbacks)
    config, folder = _prepare(experiment, overrides or {}, out, resume)
    if resume is None:
        require_free(folder)
    with locked(folder):
        if resume is None:
            claim(folder, config.to_toml())
        try:
            run = _run(config, folder, show, heard)
        except BaseException:
            heard.on_end(None)
            raise
        if report and not (folder / reports.REPORT).is_file():
            reports.report_at_end(folder)
        heard.on_end(run.summary)
        return run


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
    return config, folder


def _run(config: ExperimentConfig, folder: Path, report: Progress, heard: Callbacks) -> Run:
    done = _finished(folder) if (folder / SUMMARY).is_file() else None
    if done is not None and done.summary["rounds"] == config.federation.rounds:
        return done
    clients_file = folder / CLIENTS
    (folder / reports.REPORT).unlink(missing_ok=True)  # of fewer rounds, or of a part of them
    before = _seconds_before(folder, clients_file)
    started = time.monotonic()

    def seconds() -> float:
        return before + time.monotonic() - started

    world = shared_world(
        config.base, config.data, config.lora, config.seed, config.engine.checkpointing
    )
    kept_activations(world.model).enabled = config.engine.prefix_cache
    show = _show_rounds(config, folder, report, heard)
    checkpoint = run_rounds(config, folder, len(world.data), on_round=show)
    state, took_part = checkpoint.state, checkpoint.clients
    if config.sums_only:
        took_part = tuple(_with_steps(client, config, world.data) for client in took_part)
    whole = state.adapter  # one object for everyone: it is evaluated once a window
    save_global(folder, config, state)
    # A skewed partition may leave a client without held-out examples: it only takes part.
    tested = [c for c in took_part if len(world.data.client(c.client_id).test)]
    copies = len(tested)
    if not config.personalization.every_copy:
        tested = _one_of_each(tested)
    copies -= len(tested)
    crossed = [c.client_id for c in tested if not c.held_out][: config.personalization.cross]
    own = _files(folder / "own", crossed)
    kept = config.federation.build_method().kept(max(1, state.round))
    everyone = [c.client_id for c in tested] if config.personalization.save else []
    rows = evaluate_clients(
        world,
        config,
        whole,
        parts=state.broadcast,
        start_of=(
            starts_of(folder / PRIVATE, world.data.client_ids, state, kept)
            if kept and config.engine.kind == "cohort"
            else None
        ),
        took_part=tested,
        file=clients_file,
        keep_own=own,
        keep_personal=_files(folder / "personal", everyone),
        report=lambda *args: report("clients", *args),
        seconds=seconds,
        on_row=heard.on_client,
    )
    task, rounds = world.task, read_rounds(folder)
    summary = run_summary(
        config, checkpoint, rows, rounds, metric=task.metric,
        higher_is_better=task.higher_is_better, privacy=privacy_summary(folder, config, checkpoint),
    )  # fmt: skip
    untested = len(took_part) - len(tested) - copies
    summary["extra"]["notes"] = [
        *world.data.notes,
        *filter(None, [describe_faults(config.faults)]),
        *run_notes(checkpoint, rounds, rows, untested),
        *([f"{copies} copies of people are not evaluated: one of each is"] if copies else []),
        *([OUTSIDE] if config.sums_only else []),
    ]
    if kept and config.engine.kind != "cohort":
        summary["extra"]["notes"].append(
            f"personal adapters begin with the global {', '.join(sorted(kept))}: only the cohort "
            "engine keeps what clients train for themselves beyond the rounds"
        )
    own = {client: path for client, path in own.items() if path.is_file()}
    if own:
        summary["extra"]["cross"] = cross_evaluate(
            world, config, own, lambda *args: report("cross", *args)
        )
    summary["seconds"] = round(seconds(), 3)
    write_atomic(folder / SUMMARY, json.dumps(summary, indent=2).encode())
    return Run(folder, whole, summary, rows)


def _with_steps(
    client: ClientRecord, config: ExperimentConfig, data: FederatedData
) -> ClientRecord:
    """Return a client with the steps that it has taken, which it does not tell with privacy."""
    count = len(data.client(client.client_id).train)
    return replace(client, steps=client.rounds * config.federation.train.steps_for(count))


def _one_of_each(clients: Sequence[ClientRecord]) -> list[ClientRecord]:
    """Return one copy of each person: the one that took part most often, of these the first."""
    found: dict[str, ClientRecord] = {}
    for client in clients:
        person = client.client_id.partition("#")[0]
        if person not in found or client.rounds > found[person].rounds:
            found[person] = client
    return list(found.values())


def _files(folder: Path, clients: Sequence[str]) -> dict[str, Path]:
    return {client: folder / f"{quote(client, safe='')}.safetensors" for client in clients}


def _show_rounds(
    config: ExperimentConfig, folder: Path, report: Progress, heard: Callbacks
) -> Callable[[RoundRecord], None]:
    total = config.federation.rounds

    def show(record: RoundRecord) -> None:
        report("rounds", record.round, total, round_words(record))
        heard.on_round(record)

    done = read_checkpoint(folder).state.round if has_checkpoint(folder) else 0
    heard.on_start(folder, config, done)
    report("rounds", done, total, "")
    return show


def _seconds_before(folder: Path, clients_file: Path) -> float:
    """Return the seconds that earlier parts of this run took, as far as they were written down."""
    rows = read_rows(clients_file)
    if rows:
        return float(max(row["seconds"] for row in rows))
    return read_checkpoint(folder).seconds if has_checkpoint(folder) else 0.0


def _finished(folder: Path) -> Run:
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    rows = read_rows(folder / CLIENTS)
    return Run(folder, load_adapter(folder / "adapter.safetensors"), summary, rows)
