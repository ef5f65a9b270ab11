"""Rows that a client of a federation keeps for itself from round to round, in a device's state.

    STATE/federation/RUN/KIND      RUN and KIND: 32 hexadecimal digits of a SHA-256

They are the factors that a method trains and does not share, and control variates. A file holds the
last two rows, each with the round that made it, so that a round which was killed halfway and runs
again reads what it read before; it is replaced whole. The run is named by the server and the kind
by us: neither is ever part of a path, only its digest is. Of older runs a few are kept.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedlora.adapter import Array
from fedlora.errors import FormatError, StoreError
from fedlora.files import sync_folder, write_atomic
from fedlora.flat import Segment
from fedlora.formats.tensors import MAX_FILE_BYTES, dump_tensors, parse_tensors, read_bytes
from fedlora.store.store import KEPT, Store

__all__ = ["MOST_RUNS", "RunRows"]

MOST_RUNS = 4  # whose rows a device keeps, the one under way among them
_DIGEST_BYTES = 32


class RunRows:
    """The rows of one run, which is told apart by the text `run`, in the state of `store`.

    Raises `FormatError` for a file that is not what was written, and `StoreError` when the state
    cannot be written to or another process holds it.
    """

    def __init__(self, store: Store, run: str) -> None:
        self.store, self._folder = store, store.path / KEPT / _name(run)

    def read(self, kind: str, segments: Sequence[Segment], round: int) -> Array | None:
        """Return the row as the rounds before `round` left it, (n,) float32; None if none did.

        segments: how the factors lie in it. Raises `StoreError` when they lay otherwise.
        """
        kept = [row for number, row in self._kept(kind, segments) if number < round]
        return kept[-1] if kept else None

    def write(self, kind: str, segments: Sequence[Segment], round: int, row: Array) -> None:
        """Keep the row that `round` has made, beside the one that it was made of."""
        with self.store.lock():
            self._make_folder()
            kept = [pair for pair in self._kept(kind, segments) if pair[0] < round][-1:]
            rows = {str(number): values for number, values in (*kept, (round, row))}
            data = dump_tensors(rows, {"segments": _texts(segments)})
            path = self._folder / _name(kind)
            write_atomic(path, hashlib.sha256(data).digest() + data, mode=0o600)
            self._remove_others()

    def _kept(self, kind: str, segments: Sequence[Segment]) -> list[tuple[int, Array]]:
        path = self._folder / _name(kind)
        if not path.is_file():
            return []
        data = read_bytes(path, MAX_FILE_BYTES)
        digest, data = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(data).digest() != digest:
            raise FormatError(f"{path}: damaged or changed; erase it, and this client begins anew")
        file = parse_tensors(data, str(path))
        if file.metadata.get("segments") != _texts(segments):
            raise StoreError(
                "this client's own rows: expected the layers and ranks of this run, found others; "
                "forget them with fedlora device forget, or start a new run"
            )
        return sorted((int(name), np.array(file.array(name))) for name in file.entries)

    def _make_folder(self) -> None:
        for folder in (self._folder.parent, self._folder):
            if not folder.is_dir():
                folder.mkdir(mode=0o700)
                sync_folder(folder.parent)

    def _remove_others(self) -> None:
        """Remove what a crash left over here, and the runs that were written to longest ago."""
        for path in [path for path in self._folder.iterdir() if path.name.startswith(".")]:
            path.unlink()
        others = [path for path in self._folder.parent.iterdir() if path != self._folder]
        others.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
        for path in others[: max(0, len(others) + 1 - MOST_RUNS)]:
            _remove(path)


def _remove(folder: Path) -> None:
    for path in list(folder.iterdir()):
        path.unlink()
    os.rmdir(folder)


def _texts(segments: Sequence[Segment]) -> str:
    return "\n".join(map(str, segments))


def _name(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:32]
