"""Submit a run to a SuperLink, follow it, and go on with one that was stopped.

The ServerApp writes the run's folder on the host of the SuperLink, which is the host of these
commands too: the Control API that they use has no login and is shown to nobody else.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import FederationError, FedloraError, RunError
from fedlora.experiment import ExperimentConfig, app_root
from fedlora.federation.checkpoint import (
    RoundRecord,
    has_checkpoint,
    read_checkpoint,
    read_rounds,
)
from fedlora.federation.deploy import processes
from fedlora.federation.deploy.folder import Federation
from fedlora.federation.deploy.link import link_commands
from fedlora.federation.flower_commands import FlowerCommands, stage_app, wait_for_run
from fedlora.federation.folder import EXPERIMENT, SUMMARY
from fedlora.federation.phases import round_words
from fedlora.files import lock_file, write_atomic

__all__ = ["Submission", "claim_run", "read_run", "round_line", "submit", "was_submitted"]

SUBMITTED = "submitted.json"  # the id of the run on the SuperLink
LOCK = ".submit.lock"
LINK_SECONDS = 5.0  # a SuperLink that is restarted by its service manager is away for so long


@dataclass(frozen=True, slots=True)
class Submission:
    """What is asked of the server."""

    config: ExperimentConfig
    out: Path
    min_clients: int
    timeout: float = 7 * 24 * 3600.0  # seconds for the whole run


def claim_run(out: Path, config: ExperimentConfig) -> None:
    """Make a new or empty folder the run of an experiment. Raises `RunError`."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if out.is_file() or names - {EXPERIMENT, LOCK}:
        todo = "name another --out"
        if EXPERIMENT in names:
            todo = f"go on with: fedlora federation submit --resume {out}"
        raise RunError(f"{out}: expected a new or empty folder, found a file or content; {todo}")
    write_atomic(out / EXPERIMENT, config.to_toml().encode())


def read_run(out: Path, overrides: Mapping[str, Any] | None = None) -> ExperimentConfig:
    """Return the experiment of a run's folder. Raises `RunError` when it is none.

    overrides: keys that may change in a run, such as federation.rounds; the server refuses others.
    """
    if not (out / EXPERIMENT).is_file():
        raise RunError(f"{out}: expected a run's folder, found no {EXPERIMENT} in it")
    return ExperimentConfig.from_toml(out / EXPERIMENT, overrides)


def was_submitted(out: Path) -> bool:
    """Whether a SuperLink has had this folder's run, be it that it has it no longer."""
    return (out / SUBMITTED).is_file()


def submit(
    federation: Federation,
    submission: Submission,
    *,
    on_round: Callable[[RoundRecord], None] | None = None,
    say: Callable[[str], None],
    look: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run the experiment, or go on with it where `out` has a checkpoint; return its result.

    The folder has to be claimed. A run that the SuperLink still has is only followed. look: is
    called every half second, and may raise.

    Raises the run's own error when it fails, `FederationError` when the SuperLink goes away, and
    `RunError` while another process follows this run.
    """
    out = submission.out.absolute()
    with _locked(out):
        commands = link_commands(federation)
        run_id = _unfinished(commands, federation, out, say)
        if run_id is not None:
            say(f"run {run_id} still goes on; following it")
            try:
                _follow(commands, run_id, federation, submission, on_round, look)
            except FedloraError as error:
                if not commands.status(run_id).startswith("finished"):
                    raise  # the SuperLink has gone, or somebody interrupts
                # Such as a ServerApp that was killed, which Flower notices a minute later.
                say(f"run {run_id} has failed ({error}); beginning another one")
                run_id = None
        if run_id is None:
            if has_checkpoint(out):
                rounds = submission.config.federation.rounds
                say(f"going on after round {read_checkpoint(out).state.round} of {rounds}")
            run_id = _start(commands, federation, submission, out)
            _follow(commands, run_id, federation, submission, on_round, look)
        # What was changed on resume was taken by the server: it is what the folder now holds.
        write_atomic(out / EXPERIMENT, submission.config.to_toml().encode())
    return result(run_id, out)


def result(run_id: str, out: Path) -> dict[str, Any]:
    """Return what `submit` prints of a run that is done; summary: None without an evaluation."""
    checkpoint, records = read_checkpoint(out), read_rounds(out)
    packed = out / "adapter.safetensors"
    if not packed.is_file():
        packed = next((out / "checkpoint").glob(f"round-{checkpoint.state.round:06d}.safetensors"))
    return {
        "run_id": run_id,
        "status": "completed",
        "out": str(out),
        "adapter": str(packed),
        "clients": len(checkpoint.clients),
        "rounds": checkpoint.state.round,
        "loss": records[-1].loss if records else None,
        "failed_rounds": sum(record.status == "failed" for record in records),
        "dropped": sum(len(record.dropped) for record in records),
        "bytes_up": checkpoint.bytes_up,
        "bytes_down": checkpoint.bytes_down,
        "seconds": round(checkpoint.seconds, 3),
        "summary": json.loads((out / SUMMARY).read_bytes()) if (out / SUMMARY).is_file() else None,
    }


def round_line(record: RoundRecord, rounds: int) -> str:
    """Return one round as a line of progress.

    >>> round_line(RoundRecord(1, "updated", ("a", "b"), 0.5, 7.25, 2048, 4096), 3)
    'round 1/3: loss 0.5000 7.2 s; 2 clients, 2 kB up, 4 kB down'
    """
    words = [
        f"{len(record.cohort)} clients",
        f"{record.bytes_up / 1000:.0f} kB up",
        f"{record.bytes_down / 1000:.0f} kB down",
    ]
    if record.status != "updated":
        words.insert(0, record.status)
    if record.dropped:
        first = record.dropped[0]
        words.append(f"first dropped {first.client}: {first.reason}")
    return f"round {record.round}/{rounds}: {round_words(record)}; {', '.join(words)}"


def _follow(
    commands: FlowerCommands,
    run_id: str,
    federation: Federation,
    submission: Submission,
    on_round: Callable[[RoundRecord], None] | None,
    look: Callable[[], None] | None,
) -> None:
    out = submission.out.absolute()
    watch = _LinkWatch(federation)

    def alive() -> None:
        watch.look(out)
        if look is not None:
            look()

    wait_for_run(
        commands,
        run_id,
        out,
        submission.config.federation.rounds,
        end=time.monotonic() + submission.timeout,
        alive=alive,
        on_round=on_round,
        last_file=SUMMARY,  # of the devices' last stage
    )


def _start(
    commands: FlowerCommands, federation: Federation, submission: Submission, out: Path
) -> str:
    with tempfile.TemporaryDirectory(prefix="fedlora-") as temporary:
        app = stage_app(app_root(), submission.config, Path(temporary) / "fedlora-app")
        run_config = {
            "experiment": "simulations/experiment.toml",
            "out": str(out),
            "min-clients": submission.min_clients,
        }
        run_id = commands.run(app, run_config)
    table = {"run_id": run_id, "link": _link_process(federation)}
    write_atomic(out / SUBMITTED, json.dumps(table).encode())
    return run_id


def _unfinished(
    commands: FlowerCommands, federation: Federation, out: Path, say: Callable[[str], None]
) -> str | None:
    """Return the id of this folder's run if the SuperLink still works on it.

    A SuperLink that was started again calls its old runs running until their ServerApps, which it
    lost, have not been heard of for a minute. Such a run is stopped here.
    """
    try:
        table = json.loads((out / SUBMITTED).read_bytes())
        run_id = str(table["run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    status = commands.status(run_id)
    if status.startswith("finished") or status == "unknown":
        return None
    if table.get("link") == _link_process(federation):
        return run_id
    say(f"run {run_id} ended with its SuperLink")
    commands.flwr("stop", run_id)
    return None


def _link_process(federation: Federation) -> str:
    process = federation.link.process if federation.link else None
    return "" if process is None else f"{process.pid} {process.started}"


class _LinkWatch:
    """Raises once the recorded SuperLink has been away for longer than a restart takes."""

    def __init__(self, federation: Federation) -> None:
        self.folder = federation.folder
        self.last_seen = time.monotonic()

    def look(self, out: Path) -> None:
        link = Federation.read(self.folder).link  # a restarted one has another process
        if link is not None and link.process is not None and processes.is_running(link.process):
            self.last_seen = time.monotonic()
        elif time.monotonic() - self.last_seen > LINK_SECONDS:
            raise FederationError(
                "the SuperLink ended in the middle of the run; start it again, and go on with: "
                f"fedlora federation submit --resume {out}"
            )


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK, "w") as file:
        try:
            lock_file(file.fileno())
        except OSError:
            raise RunError(f"{out}: another process follows this run; wait for it") from None
        yield
