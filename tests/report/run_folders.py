"""Folders of runs and comparisons that nobody ran, with the files that a run writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.federation.results import cross_matrix, results

ADAPTERS = ("base", "own", "global", "personal")
TOML = """name = "keyboard"
seed = 3

[base]
id = "tiny-chat"

[data]
id = "chitchat"
task = "next-token"

[lora]
rank = 8

[federation]
method = "fedit"
rounds = {rounds}
cohort = 4
weights = "equal"
local_steps = 4
batch_size = 8
learning_rate = 1e-3
"""


def client_rows(names: Sequence[str], held_out: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of clients.jsonl; the last `held_out` never took part."""
    draws = np.random.default_rng(seed)
    rows = []
    for number, name in enumerate(names):
        losses = 3.5 + 0.3 * draws.standard_normal(4)
        scores = {a: {"loss": float(x), "top1": 0.1} for a, x in zip(ADAPTERS, losses, strict=True)}
        rows.append(
            {
                "client": name, "held_out": number >= len(names) - held_out, "rounds": 2,
                "global": "ab" * 32, "scores": scores, "seconds": 1.0 + number,
            }
        )  # fmt: skip
    return rows


def round_lines(count: int, names: Sequence[str], **changes: Any) -> list[dict[str, Any]]:
    """Return lines of rounds.jsonl."""
    return [
        {
            "round": number, "status": "updated", "cohort": list(names[:4]),
            "loss": 4.0 - 0.1 * number, "seconds": 2.5, "bytes_up": 1_000_000,
            "bytes_down": 1_100_000, "dropped": [], "noted": {},
            "phases": {"prepare": 0.1, "send": 0.1, "wait": 2.0, "aggregate": 0.2, "save": 0.1},
            "clients": {}, "late": 0, "declined": [], "fp32_bytes": {}, **changes,
        }
        for number in range(1, count + 1)
    ]  # fmt: skip


def summary_of(
    rows: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], **changes: Any
) -> dict[str, Any]:
    """Return the summary.json that a run with these rows and rounds writes."""
    found = {
        "name": "keyboard",
        "rounds": len(lines),
        **results(rows, metric="loss", higher_is_better=False),
        "bytes_up": sum(line["bytes_up"] for line in lines),
        "bytes_down": sum(line["bytes_down"] for line in lines),
        "seed": 3,
        "fedlora_version": "0.1.0",
        "privacy": None,
        "seconds": 60.0,
    }
    found["extra"]["notes"] = ["a note for the reader"]
    return found | changes


def write_run(
    folder: Path,
    *,
    names: Sequence[str] = tuple("abcdefghijkl"),
    held_out: int = 3,
    rounds: int = 5,
    cross: int = 0,
    lines: Sequence[Mapping[str, Any]] | None = None,
    done: bool = True,
    toml: str = "",
    **changes: Any,
) -> Path:
    """Write a run's folder and return it."""
    folder.mkdir(parents=True)
    lines = round_lines(rounds, names) if lines is None else lines
    rows = client_rows(names, held_out)
    (folder / "experiment.toml").write_text(TOML.format(rounds=rounds) + toml)
    write_lines(folder / "rounds.jsonl", lines)
    if not done:
        return folder
    write_lines(folder / "clients.jsonl", rows)
    summary = summary_of(rows, lines, **changes)
    if cross:
        values = np.random.default_rng(1).uniform(3, 4, (cross, cross)).tolist()
        summary["extra"]["cross"] = cross_matrix(names[:cross], values, higher_is_better=False)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_comparison(folder: Path, methods: Sequence[str] = ("fedit", "rolora")) -> Path:
    """Write the folder of a comparison over three seeds, without its runs."""
    folder.mkdir(parents=True)
    between = {"mean": 0.8, "low": 0.75, "high": 0.85, "count": 3}
    cells = [
        {
            "method": method, "point": 0, "done": 3, "runs": 3,
            "adapters": {name: {"metric": between, "loss": between} for name in ADAPTERS},
            "held_out": {}, "bytes_up": 1e6, "bytes_down": 2e6, "seconds": 12.5,
            "left_out": 0, "dropped": 0, "failures": [],
        }
        for method in methods
    ]  # fmt: skip
    pair = {"mean": -0.02, "low": -0.05, "high": 0.01, "count": 3, "effect_size": -0.4,
            "wins": 1, "losses": 2, "verdict": "no evidence"}  # fmt: skip
    differences = [
        {
            "method": method, "against": methods[0], "point": 0, "adapter": adapter,
            "over_seeds": pair, "over_clients": pair, "verdict": "no evidence",
        }
        for method in methods[1:]
        for adapter in ("global", "personal")
    ]  # fmt: skip
    numbers = {
        "fedlora_version": "0.1.0",
        "metric": "accuracy",
        "higher_is_better": True,
        "plan": {
            "experiment": {"name": "watch", "data": {"task": "classification"}},
            "methods": {method: {} for method in methods},
            "seeds": [0, 1, 2],
            "against": methods[0],
            "points": [{}],
            "settings": {"federation.rounds": 5},
        },
        "experiments": [
            {"method": methods[0], "point": 0, "resolved": {"federation": {"rounds": 5}}}
        ],
        "tuning": [],
        "cells": cells,
        "differences": differences,
        "runs": [{"method": m, "status": "done"} for m in methods for _ in range(3)],
    }
    (folder / "plan.json").write_text("{}")
    (folder / "comparison.json").write_text(json.dumps(numbers))
    (folder / "comparison.md").write_text("# watch")
    return folder
