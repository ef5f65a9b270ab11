"""What virtual clients keep to themselves between rounds: one memory-mapped table of rows.

A factor that a method trains but does not share stays on the client (FedSA-LoRA's B, for one). For
thousands of virtual clients that is a file with a row each, which the operating system pages in and
out; rows that were never written take no space on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fedlora.adapter import Adapter, Array
from fedlora.aggregation import ServerState
from fedlora.errors import RunError, ShapeMismatchError
from fedlora.files import write_atomic
from fedlora.flat import RowForm, Segment
from fedlora.training import Factor

__all__ = ["PersonalSlab", "open_slab", "starts_of"]


class PersonalSlab:
    """A float32 row per client in `folder`, each with the round that wrote it.

    Every client has two places, and a round writes to the one that it did not read. So a round that
    was killed halfway and runs again reads what it read before: the rows are those of the last
    round before it.

    segments: the layout of a row. Raises `RunError` when the folder holds rows of another layout or
    number of clients.
    """

    def __init__(self, folder: Path, clients: int, segments: Sequence[Segment]) -> None:
        self._size = sum(segment.size for segment in segments)
        texts = [str(segment) for segment in segments]
        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        described = {"clients": clients, "numbers": self._size, "segments": digest}
        header = folder / "rows.json"
        folder.mkdir(parents=True, exist_ok=True)
        if header.is_file():
            found = json.loads(header.read_text(encoding="utf-8"))
            if found != described:
                raise RunError(
                    f"{header}: expected rows of {described}, found {found}; they are another "
                    "run's: choose another folder"
                )
        self._rows = _mapped(folder / "rows.float32", np.float32, (clients, 2, self._size))
        self._rounds = _mapped(folder / "rounds.int64", np.int64, (clients, 2))
        if not header.is_file():  # last: the files that it describes are there
            write_atomic(header, json.dumps(described).encode())

    def read(self, client: int, round: int) -> Array | None:
        """Return a copy of the client's row as the rounds before `round` left it; None if none."""
        place = self._place(client, round)
        return None if place is None else np.array(self._rows[client, place])

    def write(self, client: int, round: int, row: Array) -> None:
        """Keep the row that `round` has made."""
        if row.shape != (self._size,):
            raise ShapeMismatchError(
                f"private factors of client {client}: expected ({self._size},), found {row.shape}"
            )
        before = self._place(client, round)
        place = 0 if before is None else 1 - before
        self._rounds[client, place] = 0  # torn by a crash, it must not look whole
        self._rows[client, place] = row
        self._rounds[client, place] = round

    def flush(self) -> None:
        """Write everything to the disk."""
        self._rows.flush()
        self._rounds.flush()

    def _place(self, client: int, round: int) -> int | None:
        rounds = self._rounds[client]
        usable = [place for place in (0, 1) if 0 < rounds[place] < round]
        return max(usable, key=lambda place: int(rounds[place]), default=None)


def open_slab(
    folder: Path, clients: int, segments: Sequence[Segment], kind: str = ""
) -> PersonalSlab:
    """Return the rows of one layout in `folder`: clients of other ranks have rows of another.

    kind: what else is kept there, as the beginning of a folder's name; "": the factors.
    """
    digest = hashlib.sha256("\n".join(map(str, segments)).encode()).hexdigest()
    return PersonalSlab(folder / f"{kind}{digest[:16]}", clients, segments)


def starts_of(
    folder: Path, client_ids: Sequence[str], state: ServerState, kept: frozenset[Factor]
) -> Callable[[str], Adapter]:
    """Return what each client goes on from: the trainable adapter, with its own factors in it.

    kept: the factors that clients have trained and not shared, whose rows lie in `folder`. Somebody
    who never took part has none, and gets the trainable adapter as it is.
    """
    form = RowForm.of(state.trainable, kept)
    slab = open_slab(folder, len(client_ids), form.segments)
    numbers = {client: number for number, client in enumerate(client_ids)}

    def start_of(client: str) -> Adapter:
        row = slab.read(numbers[client], state.round + 1)
        return state.trainable if row is None else form.read(row.tobytes())

    return start_of


def _mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """Map a file of zeros, made sparse where it is not there or was left half made."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not path.is_file() or path.stat().st_size != size:
        with path.open("wb") as file:
            file.truncate(size)
            os.fsync(file.fileno())
    return np.memmap(path, dtype, "r+", shape=shape)
