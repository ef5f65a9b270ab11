"""The slow twin of a private sum: client by client, in plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedlora.adapter import Adapter
from fedlora.training import Factor

_ORDER: tuple[Factor, ...] = ("A", "B")


def clipped_sum(
    sent: Adapter, updates: Sequence[Adapter], factors: frozenset[Factor], clipping_norm: float
) -> list[float]:
    """Add up what clients have changed, each clipped over all of its factors together."""
    names = [(path, f) for path in sorted(sent) for f in _ORDER if f in factors]
    total = [0.0] * sum(getattr(sent[path], factor).size for path, factor in names)
    for adapter in updates:
        changes: list[float] = []
        for path, factor in names:
            before, after = (getattr(a[path], factor).reshape(-1) for a in (sent, adapter))
            changes += [float(y) - float(x) for x, y in zip(before, after, strict=True)]
        norm = math.sqrt(math.fsum(change**2 for change in changes))
        scale = min(1.0, clipping_norm / norm) if norm else 1.0
        for place, change in enumerate(changes):
            total[place] += scale * change
    return total


def as_row(adapter: Adapter, factors: frozenset[Factor]) -> np.ndarray:
    """Return the same factors as one float64 row, sorted by path with A before B."""
    parts = [
        getattr(adapter[path], f).reshape(-1) for path in sorted(adapter) for f in _ORDER
        if f in factors
    ]  # fmt: skip
    return np.concatenate(parts).astype(np.float64)
