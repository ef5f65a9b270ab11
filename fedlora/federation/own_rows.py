"""Where a client keeps rows of numbers that are its own, from one round to the next.

`fedlora.store.RunRows` keeps them in the device's state, where the owner has named one; else they
are in Flower's `Context.state`, which ends with a run and does not survive a restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedlora.adapter import Array
from fedlora.errors import FederationError
from fedlora.flat import Segment

__all__ = ["ContextRows", "OwnRows"]


class OwnRows(Protocol):
    """The rows of one client in one run; `kind` tells apart what they are."""

    def read(self, kind: str, segments: Sequence[Segment], round: int) -> Array | None:
        """Return the row as the rounds before `round` left it, (n,) float32; None if none did.

        segments: how the factors lie in it. Raises a `FedloraError` when they lay otherwise.
        """

    def write(self, kind: str, segments: Sequence[Segment], round: int, row: Array) -> None:
        """Keep the row that `round` has made, beside the one that it was made of."""


class ContextRows:
    """`OwnRows` in a `Context.state`.

    The last two of a kind are kept, each with the round that made it: a round that was killed
    halfway and runs again reads what it read before.
    """

    def __init__(self, state: RecordDict) -> None:
        self._state = state

    def read(self, kind: str, segments: Sequence[Segment], round: int) -> Array | None:
        """See `OwnRows`. Raises `FederationError` for rows of another layout."""
        kept = [row for number, row in self._kept(kind, segments) if number < round]
        return kept[-1] if kept else None

    def write(self, kind: str, segments: Sequence[Segment], round: int, row: Array) -> None:
        """See `OwnRows`."""
        kept = [pair for pair in self._kept(kind, segments) if pair[0] < round][-1:]
        kept.append((round, row))
        arrays = {str(number): FlowerArray(np.ascontiguousarray(row)) for number, row in kept}
        self._state[kind] = ArrayRecord(arrays)
        self._state[f"{kind}-layout"] = ConfigRecord({"segments": list(map(str, segments))})

    def _kept(self, kind: str, segments: Sequence[Segment]) -> list[tuple[int, Array]]:
        """Return the rows of a kind, each with its round, oldest first."""
        rows, layout = self._state.get(kind), self._state.get(f"{kind}-layout")
        if not isinstance(rows, ArrayRecord) or not isinstance(layout, ConfigRecord):
            return []
        if layout["segments"] != list(map(str, segments)):
            raise FederationError(
                "this client's own rows: expected the layers and ranks of this run, found others; "
                "start a new run"
            )
        return sorted((int(key), rows[key].numpy()) for key in rows)
