"""Rows, factor by factor: what `fedlora.flat` and `fedlora.federation.buffers` do at once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedlora.adapter import Adapter, Array, LoraLayer
from fedlora.flat import Segment
from fedlora.training import Factor


def with_factors(adapter: Adapter, factors: Mapping[tuple[str, Factor], Array]) -> Adapter:
    """Return `adapter` with the given factors in place of its own, each checked by its layer."""
    layers = {}
    for path, layer in adapter.layers.items():
        layers[path] = LoraLayer(
            factors.get((path, "A"), layer.A),
            factors.get((path, "B"), layer.B),
            layer.scaling,
            factors.get((path, "magnitude"), layer.magnitude),
            layer.kind,
        )
    return replace(adapter, layers=layers)


def digest(segments: Sequence[Segment], buffer: Array) -> str:
    """Return the SHA-256 over the layout's texts and the buffer's little-endian bytes."""
    hashed = hashlib.sha256("\n".join(map(str, segments)).encode())
    hashed.update(np.ascontiguousarray(buffer, dtype="<f4").data)
    return hashed.hexdigest()
