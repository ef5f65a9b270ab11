"""One run of a comparison, in a folder of its own, and the few numbers that are kept of it.

Runs share the rounds, and differ in what is done after them:

    whole, test         an ordinary `simulate`: base, own, global and personal on the test parts
    global, test        base and global on the test parts; no adapter is trained after the rounds
    …, validation       for tuning: the same on the validation parts, and nothing on the test parts

A run's folder is that of `simulate`, so that a killed run goes on, bit for bit, from its last round
or clients. `result.json` is written last: its presence means that the run is over, and how.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fedlora.data import ClientData, FederatedData
from fedlora.errors import (
    AdapterError,
    ConfigError,
    DataError,
    FederationError,
    FedloraError,
    NonFiniteError,
    RunError,
)
from fedlora.evaluation import Trial, evaluate_many
from fedlora.experiment import ExperimentConfig
from fedlora.federation import Checkpoint, RoundRecord, read_rounds
from fedlora.federation.checkpoint import ClientRecord
from fedlora.federation.folder import EXPERIMENT, locked, read_rows
from fedlora.files import write_atomic
from fedlora.nn.inject import kept_activations
from fedlora.plain import from_plain, to_plain
from fedlora.simulation.people import evaluate_clients
from fedlora.simulation.rounds import run_rounds
from fedlora.simulation.simulate import simulate
from fedlora.simulation.threads import one_torch_thread
from fedlora.world import World, shared_world

__all__ = ["Kind", "Part", "Result", "Score", "compute", "on_validation", "read_result", "tried"]

RESULT = "result.json"
Kind = Literal["whole", "global"]  # after the rounds: all four adapters, or base and global alone
Part = Literal["test", "validation"]  # of the clients' data, on which they are evaluated
Report = Callable[[str, int, int, str], None]  # stage, done, of how many, a few words
Row = Mapping[str, Any]  # of clients.jsonl


@dataclass(frozen=True, slots=True)
class Score:
    """Means over clients, each counting once."""

    mean: float  # of the task's metric
    loss: float


@dataclass(frozen=True, slots=True)
class Result:
    """What a comparison keeps of a run. Without `scores` where the run has failed."""

    status: Literal["done", "diverged", "failed"]
    reason: str = ""  # why it is not done
    metric: str = ""
    higher_is_better: bool = True
    scores: Mapping[str, Score] = field(default_factory=dict)  # by adapter
    held_out: Mapping[str, Score] = field(default_factory=dict)  # the same, of held-out clients
    # By adapter, each client's metric; of clients that may take part.
    clients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    left_out: int = 0  # clients that diverged after the rounds: they are in no mean
    dropped: int = 0  # replies that did not count in the rounds

    @property
    def is_done(self) -> bool:
        return self.status == "done"


def compute(
    config: ExperimentConfig,
    folder: Path,
    kind: Kind,
    part: Part,
    report: Report,
) -> Result:
    """Run `config` in `folder`, or go on with it, and return the result.

    A run whose rounds or clients fail, or of whose replies more than half diverge, has a result
    that says so. Raises `UsageError` for what no
    run can do, `RunError` for a folder that cannot be written, and `DataError`.
    """
    if (folder / EXPERIMENT).is_file():
        if ExperimentConfig.from_toml(folder / EXPERIMENT) != config:
            raise RunError(
                f"{folder}: expected the experiment of this comparison, found another; "
                "remove that folder, and it is run again"
            )
    else:  # the folder is the comparison's own: what a killed start has left there is no obstacle
        write_atomic(folder / EXPERIMENT, config.to_toml().encode())
    result = tried(
        lambda: (
            _whole(folder, report)
            if (kind, part) == ("whole", "test")
            else _after_rounds(config, folder, kind, part, report)
        )
    )
    write_atomic(folder / RESULT, json.dumps(to_plain(result)).encode())
    return result


def read_result(folder: Path) -> Result | None:
    """Return the result of the run in `folder`, or None while it has none."""
    path = folder / RESULT
    if not path.is_file():
        return None
    try:
        return from_plain(Result, json.loads(path.read_text(encoding="utf-8")))
    except (ConfigError, ValueError) as error:
        raise RunError(f"{path}: {error}; remove that file, and the run goes on") from None


def tried(run: Callable[[], Result]) -> Result:
    """Return what `run` returns, or a failed result where the run itself came to nothing."""
    try:
        return run()
    except _Diverged as error:
        return Result("diverged", reason=_line(error))
    except (AdapterError, FederationError) as error:
        # A round's error has the last client's: its class and its words.
        is_infinite = isinstance(error, NonFiniteError) or "NonFiniteError" in str(error)
        return Result("diverged" if is_infinite else "failed", reason=_line(error))


class _Diverged(FedloraError):
    """Too little of the run is left to be called the method's."""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _whole(folder: Path, report: Report) -> Result:
    """Go on with an ordinary run: its folder has the experiment."""
    try:
        run = simulate(resume=folder, progress=report, report=False)
    except DataError:
        _require_scores(read_rows(folder / "clients.jsonl"), none_is_well=True)
        raise
    summary = run.summary
    result = _result(run.clients, summary["metric"], summary["higher_is_better"], folder)
    return replace(
        result,
        bytes_up=summary["bytes_up"],
        bytes_down=summary["bytes_down"],
        seconds=summary["seconds"],
    )


def _after_rounds(
    config: ExperimentConfig, folder: Path, kind: Kind, part: Part, report: Report
) -> Result:
    """Run the rounds, then evaluate on `part`: all four adapters, or base and global alone."""
    world = shared_world(
        config.base, config.data, config.lora, config.seed, config.engine.checkpointing
    )
    kept_activations(world.model).enabled = config.engine.prefix_cache
    with locked(folder):
        checkpoint = run_rounds(
            config,
            folder,
            len(world.data),
            on_round=lambda r: report("rounds", r.round, config.federation.rounds, ""),
        )
        after_rounds = time.monotonic()
        if part == "validation":
            world = replace(world, data=on_validation(world.data))
        tested = [c for c in checkpoint.clients if len(world.data.client(c.client_id).test)]
        if not any(not c.held_out for c in tested):
            raise ConfigError(
                f"data.validation_share: expected examples of at least one client in the {part} "
                f"parts, found none with {config.data.validation_share:g}; set a larger share"
            )
        if kind == "global":
            rows = _base_and_global(world, config, checkpoint, tested)
        else:
            rows = evaluate_clients(
                world,
                config,
                checkpoint.state.adapter,
                took_part=tested,
                file=folder / "clients.jsonl",
                keep_own={},
                keep_personal={},
                report=lambda *args: report("clients", *args),
                seconds=lambda: checkpoint.seconds + time.monotonic() - after_rounds,
            )
    result = _result(rows, world.task.metric, world.task.higher_is_better, folder)
    return replace(
        result,
        bytes_up=checkpoint.bytes_up,
        bytes_down=checkpoint.bytes_down,
        # The checkpoint has those of all rounds, also from before a kill.
        seconds=round(checkpoint.seconds + time.monotonic() - after_rounds, 3),
    )


def on_validation(data: FederatedData) -> FederatedData:
    """Return the same clients with their validation parts in the place of the test parts."""

    def read(client_id: str) -> ClientData:
        found = data.client(client_id)
        return ClientData(client_id, found.train, found.validation, found.validation)

    return FederatedData(data.id, data.task, data.client_ids, read, data.labels, data.notes)


def _base_and_global(
    world: World, config: ExperimentConfig, checkpoint: Checkpoint, tested: Sequence[ClientRecord]
) -> list[dict[str, Any]]:
    """Return rows as of `evaluate_clients`, with base and global alone."""
    adapters = {"base": world.initial, "global": checkpoint.state.adapter}
    trials = [
        Trial(adapter, world.data.client(c.client_id).test, f"client {c.client_id!r}, {name}")
        for c in tested
        for name, adapter in adapters.items()
    ]
    together = config.engine.kind != "sequential"
    with one_torch_thread():
        found = iter(evaluate_many(world.model, trials, world.task, together=together))
    rows = []
    for client in tested:
        scores = {name: next(found) for name in adapters}
        broken = [score for score in scores.values() if isinstance(score, NonFiniteError)]
        value = {"failed": str(broken[0])} if broken else {"scores": scores}
        rows.append({"client": client.client_id, "held_out": client.held_out, **value})
    return rows


def _result(rows: Sequence[Row], metric: str, higher_is_better: bool, folder: Path) -> Result:
    rounds = read_rounds(folder)
    _require_replies(rounds)
    _require_scores(rows)
    scored = [row for row in rows if "scores" in row]
    taking_part = [row for row in scored if not row["held_out"]]
    names = list(taking_part[0]["scores"])
    return Result(
        status="done",
        metric=metric,
        higher_is_better=higher_is_better,
        scores=_means(taking_part, metric),
        held_out=_means([row for row in scored if row["held_out"]], metric),
        clients={
            name: {row["client"]: row["scores"][name][metric] for row in taking_part}
            for name in names
        },
        left_out=len(rows) - len(scored),
        dropped=sum(len(record.dropped) for record in rounds),
    )


def _means(rows: Sequence[Row], metric: str) -> dict[str, Score]:
    def mean(name: str, measure: str) -> float:
        return float(sum(row["scores"][name][measure] for row in rows) / len(rows))

    names = list(rows[0]["scores"]) if rows else []
    return {name: Score(mean(name, metric), mean(name, "loss")) for name in names}


def _require_replies(rounds: Sequence[RoundRecord]) -> None:
    """Raise when more than half of all replies were dropped since their training diverged.

    Such a run ends without an error, with an adapter that is hardly another than the base, and
    would do well beside a method that has learned something wrong.
    """
    asked = sum(len(record.cohort) for record in rounds)
    lost = [d for record in rounds for d in record.dropped if "NonFiniteError" in d.reason]
    if 2 * len(lost) > asked:
        raise _Diverged(f"{len(lost)} of {asked} replies; the last: {lost[-1].reason}")


def _require_scores(rows: Sequence[Row], *, none_is_well: bool = False) -> None:
    """Raise when no client that may take part has scores, though there are such clients."""
    mine = [row for row in rows if not row["held_out"]]
    if mine and not any("scores" in row for row in mine):
        raise _Diverged(mine[0]["failed"])
    if not mine and not none_is_well:
        raise DataError("expected the scores of at least one client, found none")
