"""A run's folder: who may write to it, and rows that survive kill -9.

experiment.toml   the resolved experiment; its presence makes a folder a run
rounds.jsonl      a line a round
privacy.jsonl     a line a release, in a run with privacy
checkpoint/       the server's state after the last round
clients.jsonl     a line a client, in the order in which they were evaluated
adapter/          the global adapter as a PEFT folder
adapter.safetensors   the same as one packed file
personal/, own/   personal adapters of all clients; own ones of those in the cross matrix
summary.json      written last: its presence means that the run is done
report.html       after that, where matplotlib is installed: all of it to look at
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlora.aggregation import ServerState
from fedlora.errors import RunError
from fedlora.experiment import ExperimentConfig
from fedlora.federation.guarantee import guarantee
from fedlora.files import lock_file, write_atomic
from fedlora.formats import save_adapter

__all__ = [
    "CLIENTS",
    "EXPERIMENT",
    "SUMMARY",
    "append_row",
    "claim",
    "free_folder",
    "json_line",
    "locked",
    "read_rows",
    "require_free",
    "rows_of_global",
    "save_global",
]

EXPERIMENT = "experiment.toml"
CLIENTS = "clients.jsonl"
SUMMARY = "summary.json"
LOCK = ".lock"


def free_folder(name: str) -> Path:
    """Return ``runs/name``, or ``runs/name-2`` and so on when that is not empty."""
    number = 1
    while True:
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if is_free(folder):
            return folder
        number += 1


def is_free(folder: Path) -> bool:
    """Whether a run may start in `folder`: it is missing, empty, or a run that never got going."""
    return not folder.exists() or (
        folder.is_dir() and {path.name for path in folder.iterdir()} <= {EXPERIMENT, LOCK}
    )


def require_free(folder: Path) -> None:
    """Raise `RunError` unless `is_free`, with the line that resumes it if it is a run."""
    if not is_free(folder):
        is_run = (folder / EXPERIMENT).is_file()
        todo = f"go on with: fedlora simulate --resume {folder}" if is_run else "name another --out"
        raise RunError(f"{folder}: expected a new or empty folder, found a file or content; {todo}")


def claim(folder: Path, toml: str) -> None:
    """Make `folder` the run of the experiment `toml`. Raises `RunError`; see `require_free`."""
    require_free(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / EXPERIMENT, toml.encode())
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror}") from None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against another process. The lock ends with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as file:
        try:
            lock_file(file.fileno())
        except OSError:
            raise RunError(f"{folder}: another process is running this run; wait for it") from None
        yield


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line and put it on the disk."""
    with open(path, "ab") as file:
        file.write(json_line(row))
        file.flush()
        os.fsync(file.fileno())


def json_line(row: Mapping[str, Any]) -> bytes:
    """Return a row as its line of a file."""
    return json.dumps(row).encode() + b"\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, none if it is missing. A torn last line is cut off the file.

    Raises `RunError` for any other line that is not JSON.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        write_atomic(path, whole)
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise RunError(
                f"{path}, line {number}: expected JSON, found {line[:40]!r}; "
                "the file was changed by hand: start a new run"
            ) from None
    return rows


def rows_of_global(path: Path, digest: str, *, failed: bool = True) -> dict[str, dict[str, Any]]:
    """Return the rows of one global adapter by their client; others are cut out of the file.

    digest: the adapter's fingerprint. failed: whether those of clients that failed count. Raises
    `RunError` as `read_rows` does.
    """
    found = read_rows(path)
    rows = {
        row["client"]: row
        for row in found
        if row.get("global") == digest and (failed or "failed" not in row)
    }
    if len(rows) < len(found):  # the run went on for more rounds after they were written
        write_atomic(path, b"".join(json_line(row) for row in rows.values()))
    return rows


def save_global(folder: Path, config: ExperimentConfig, state: ServerState) -> None:
    """Write the global adapter as a PEFT folder and as a packed file."""
    about: dict[str, Any] = {
        "run": config.name, "round": state.round, "method": config.federation.method
    }  # fmt: skip
    if (promised := guarantee(folder, config)) is not None:
        about["privacy"] = promised
    whole = state.adapter
    for target in ("adapter", "adapter.safetensors"):
        save_adapter(whole, folder / target, provenance=about)
