"""Exercises from a smartwatch: windows of six axes at 50 Hz, seven classes.

Ten persons wore a watch on each wrist and did seven shoulder exercises. The data come with seglearn
1.2.5 (David Burns, BSD-3; `files/LICENSE.seglearn`). A client is a person's wrist. Half of the
persons trained the bundled base watch-cnn (group "base"); the others, whom it has never seen, are
the clients.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files

import numpy as np
import numpy.typing as npt

from fedlora.data.client import ClientData
from fedlora.data.examples import Examples

__all__ = [
    "BASE_PERSONS",
    "CLIENT_PERSONS",
    "LABELS",
    "STEP",
    "WINDOW",
    "client_ids",
    "read_client",
    "windows",
]

LABELS = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
BASE_PERSONS = ("6", "7", "8", "9", "10")
CLIENT_PERSONS = ("1", "2", "3", "4", "5")
WINDOW = 100  # samples: 2 seconds
STEP = 25  # samples between the starts of two windows of one part


def client_ids(group: str) -> tuple[str, ...]:
    """Return the clients of "clients" or "base", as ``person_wrist``, sorted."""
    persons = {"clients": CLIENT_PERSONS, "base": BASE_PERSONS}[group]
    return tuple(sorted(f"{person}_{wrist}" for person in persons for wrist in ("left", "right")))


def read_client(client_id: str, test_share: float, validation_share: float) -> ClientData:
    """Return one client's windows, every recording cut by time into train, validation and test.

    The cut is made before the windows, so that none reaches into another part.
    """
    parts: list[list[npt.NDArray[np.float32]]] = [[], [], []]
    targets: list[list[int]] = [[], [], []]
    for label in range(len(LABELS)):
        signal = recordings()[f"{client_id}_{label}"]
        stop = int((1 - test_share) * len(signal))
        middle = int((1 - test_share - validation_share) * len(signal))
        for part, piece in enumerate((signal[:middle], signal[middle:stop], signal[stop:])):
            cut = windows(piece)
            parts[part].append(cut)
            targets[part].extend([label] * len(cut))
    train, validation, test = (
        Examples(np.concatenate(cut), np.array(classes, np.int64))
        for cut, classes in zip(parts, targets, strict=True)
    )
    return ClientData(client_id, train, validation, test)


def windows(signal: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
    """Cut a signal (samples, 6), int16 thousandths, into windows (n, 6, WINDOW) float32."""
    if len(signal) < WINDOW:
        return np.empty((0, signal.shape[1], WINDOW), np.float32)
    every = np.lib.stride_tricks.sliding_window_view(signal, WINDOW, axis=0)
    return (every[::STEP] / 1000).astype(np.float32)


@cache
def recordings() -> dict[str, npt.NDArray[np.int16]]:
    """Return the recordings by ``person_wrist_label``, each (samples, 6) int16."""
    with as_file(files("fedlora.data") / "files" / "watch.npz") as path, np.load(path) as archive:
        return {name: archive[name] for name in archive.files}
