"""An adapter's factors as one flat array: the form in which the sides are compared."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedlora.adapter import Adapter, Array

__all__ = ["Flat", "flat_of"]

Flat = npt.NDArray[np.float32]


def flat_of(adapter: Adapter) -> Flat:
    """Return the factors one after another: sorted paths, A before B."""
    parts: list[Array] = []
    for layer in adapter.layers.values():
        parts += [layer.A, layer.B]
    return np.concatenate([part.reshape(-1) for part in parts])
