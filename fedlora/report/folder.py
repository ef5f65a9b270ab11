"""A run's folder as it is read for a report: nothing in it is changed, not even a torn last line.

So a run can be looked at while it is under way, and a folder may be read-only.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import RunError

__all__ = ["ComparisonFolder", "Row", "RunFolder", "read_comparison", "read_run"]

Row = Mapping[str, Any]

EXPERIMENT, PLAN = "experiment.toml", "plan.json"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """What a report needs of a run's folder."""

    path: Path
    toml: str  # the resolved experiment, as it is in the file
    experiment: Row  # the same, parsed
    summary: Row | None  # None: the run is not done
    rounds: tuple[Row, ...]
    clients: tuple[Row, ...]  # a row a client, the last one that was written
    ledger: tuple[Row, ...]  # of what was released under differential privacy
    audit: Row | None


@dataclass(frozen=True, slots=True)
class ComparisonFolder:
    """What a report needs of the folder of a finished comparison."""

    path: Path
    numbers: Row  # comparison.json
    text: str  # comparison.md


def read_run(path: Path) -> RunFolder | ComparisonFolder:
    """Read a run's or a comparison's folder. Raises `RunError` for anything else."""
    if (path / PLAN).is_file():
        return read_comparison(path)
    if not path.is_dir():
        raise RunError(f"{path}: expected a run's folder, found none")
    if not (path / EXPERIMENT).is_file():
        raise RunError(
            f"{path}: expected a run's folder, found no {EXPERIMENT} in it; name the folder that "
            "fedlora simulate, compare or federation has written"
        )
    toml = _text(path / EXPERIMENT)
    try:
        experiment = tomllib.loads(toml)
    except tomllib.TOMLDecodeError as error:
        raise RunError(f"{path / EXPERIMENT}: not TOML: {error}") from None
    summary = path / "summary.json"
    audit = path / "audit.json"
    return RunFolder(
        path=path,
        toml=toml,
        experiment=experiment,
        summary=_json(summary) if summary.is_file() else None,
        rounds=_rows(path / "rounds.jsonl"),
        clients=_latest(_rows(path / "clients.jsonl")),
        ledger=_rows(path / "privacy.jsonl"),
        audit=_json(audit) if audit.is_file() else None,
    )


def read_comparison(path: Path) -> ComparisonFolder:
    """Read a comparison's folder. Raises `RunError` while it has no results."""
    numbers = path / "comparison.json"
    if not numbers.is_file():
        raise RunError(
            f"{path}: expected a finished comparison, found none; go on with: fedlora compare "
            f"--resume {path}"
        )
    text = path / "comparison.md"
    return ComparisonFolder(path, _json(numbers), _text(text) if text.is_file() else "")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RunError(f"{path}: expected text in UTF-8, found other bytes") from None


def _json(path: Path) -> Row:
    try:
        found = json.loads(_text(path))
    except ValueError:
        raise RunError(f"{path}: expected JSON, found something else") from None
    if not isinstance(found, dict):
        raise RunError(f"{path}: expected a JSON object, found a {type(found).__name__}")
    return found


def _rows(path: Path) -> tuple[Row, ...]:
    """Return the rows of a file, none if it is missing; a line that is still written is left out.

    Raises `RunError` for any other line that is no JSON object.
    """
    if not path.is_file():
        return ()
    rows = []
    for number, line in enumerate(_text(path).split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise RunError(f"{path}, line {number}: expected a JSON object, found {line[:40]!r}")
        rows.append(row)
    return tuple(rows)


def _latest(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Return each client's last row, of the global adapter that was evaluated last."""
    if not rows:
        return ()
    digest = rows[-1].get("global")
    found = {row["client"]: row for row in rows if row.get("global") == digest and "client" in row}
    return tuple(found[client] for client in sorted(found, key=str))
