"""Which clients each round of local privacy has asked, also a round that was cut off.

    OUT/checkpoint/asked.jsonl    {"round": 3, "cohort": ["c1", "c7"]}

What a device has sent cannot be taken back, so a line is on the disk before anyone is asked, and
none is dropped on resume: the ledger counts the most that any one device may have sent. A round
that was done twice has two lines.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fedlora.errors import RunError
from fedlora.files import sync_folder, write_atomic

__all__ = ["ASKED", "append_asked", "read_asked"]

ASKED = "checkpoint/asked.jsonl"


def read_asked(out: Path) -> tuple[Counter[str], set[int]]:
    """Return how often each client was asked, and the rounds; nobody where there is no file.

    A last line without its end is cut off: nobody was asked by it. Raises `RunError` for any other
    line that is not one.
    """
    path, asked, rounds = out / ASKED, Counter[str](), set[int]()
    if not path.is_file():
        return asked, rounds
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            round, cohort = row["round"], row["cohort"]
            if not isinstance(cohort, list) or not all(isinstance(name, str) for name in cohort):
                raise ValueError("expected a list of client ids")
            if type(round) is not int:
                raise ValueError("expected a round's number")
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path}, line {number}: not a cohort: {error!r}; the file was changed or damaged, "
                "and what devices have sent is not known: restore it, or start a new run"
            ) from None
        asked.update(cohort)
        rounds.add(round)
    if whole != data:
        write_atomic(path, whole)
    return asked, rounds


def append_asked(out: Path, round: int, cohort: Sequence[str]) -> None:
    """Write down, flushed to the disk, that these are asked now."""
    path = out / ASKED
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "ab") as file:
        file.write(json.dumps({"round": round, "cohort": list(cohort)}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync_folder(path.parent)
