"""How the factors of an adapter lie in one flat float32 buffer. NumPy only.

A message carries one buffer and its layout, a segment a factor, sorted by path with A before B:

    fc|A|8x768
    fc|B|10x8

One buffer, since each array of a message costs a header and 0.1 ms. The receiver never believes
the layout that came: it compares it with the one that it expects, so that nothing can broadcast.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlora.adapter import Adapter, Array, LoraLayer
from fedlora.errors import FederationError, LayerMismatchError, ShapeMismatchError
from fedlora.training import Factor

__all__ = [
    "Segment",
    "digest",
    "pack",
    "parse_segments",
    "require_same_segments",
    "segments_of",
    "unpack",
    "with_factors",
]

_ORDER: tuple[Factor, ...] = ("A", "B", "magnitude")


@dataclass(frozen=True, slots=True)
class Segment:
    """One factor's place in the buffer; its text is ``path|factor|sizes``."""

    path: str
    factor: Factor
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.path}|{self.factor}|{'x'.join(map(str, self.shape))}"


def segments_of(adapter: Adapter, factors: Iterable[Factor]) -> tuple[Segment, ...]:
    """Return the layout of some factors of `adapter`."""
    wanted = [factor for factor in _ORDER if factor in set(factors)]
    found = []
    for path, layer in adapter.layers.items():
        for factor in wanted:
            value = _factor(layer, factor)
            if value is not None:
                found.append(Segment(path, factor, tuple(map(int, value.shape))))
    return tuple(found)


def parse_segments(texts: Sequence[str], who: str) -> tuple[Segment, ...]:
    """Read a layout that came in a message. Raises `FederationError`, which opens with `who`."""
    return tuple(_parse(text, who) for text in texts)


def pack(adapter: Adapter, segments: Sequence[Segment]) -> Array:
    """Return the factors of `adapter` that `segments` name as one 1-D float32 buffer."""
    parts = []
    for segment in segments:
        value = _factor(adapter[segment.path], segment.factor)
        if value is None or value.shape != segment.shape:
            raise ShapeMismatchError(f"{segment}: the adapter has no such factor")
        parts.append(value.reshape(-1))
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def unpack(buffer: Array, segments: Sequence[Segment], who: str) -> dict[tuple[str, Factor], Array]:
    """Cut a buffer into factors. Raises `ShapeMismatchError` unless its size is the layout's."""
    expected = sum(segment.size for segment in segments)
    if buffer.dtype != np.float32 or buffer.shape != (expected,):
        raise ShapeMismatchError(
            f"{who}: expected a buffer of ({expected},) float32, found "
            f"{buffer.shape} {buffer.dtype}"
        )
    factors: dict[tuple[str, Factor], Array] = {}
    start = 0
    for segment in segments:
        values = buffer[start : start + segment.size].reshape(segment.shape)
        factors[segment.path, segment.factor] = values
        start += segment.size
    return factors


def with_factors(adapter: Adapter, factors: Mapping[tuple[str, Factor], Array]) -> Adapter:
    """Return `adapter` with the given factors in place of its own."""
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


def require_same_segments(expected: Sequence[Segment], found: Sequence[Segment], who: str) -> None:
    """Raise unless the layouts are equal; the text names the first layer that differs."""
    if tuple(expected) == tuple(found):
        return
    theirs = {(segment.path, segment.factor): segment for segment in found}
    mine = {(segment.path, segment.factor): segment for segment in expected}
    for key, segment in mine.items():
        if key not in theirs:
            raise LayerMismatchError(
                f"{who}, layer {segment.path!r}: lora_{segment.factor} is missing, the other side "
                f"has {segment.shape}"
            )
        if theirs[key].shape != segment.shape:
            raise ShapeMismatchError(
                f"{who}, layer {segment.path!r}: lora_{segment.factor} is {theirs[key].shape}, "
                f"the other side has {segment.shape}"
            )
    for key, segment in theirs.items():
        if key not in mine:
            raise LayerMismatchError(
                f"{who}, layer {segment.path!r}: lora_{segment.factor} {segment.shape} was not "
                "expected"
            )
    raise LayerMismatchError(f"{who}: the layers are right, their order or number is not")


def _parse(text: str, who: str) -> Segment:
    path, *rest = text.rsplit("|", 2)
    sizes = rest[1].split("x") if len(rest) == 2 else []
    valid = (
        path
        and len(rest) == 2
        and rest[0] in _ORDER
        and all(s.isascii() and s.isdigit() and len(s) < 11 and 0 < int(s) < 2**31 for s in sizes)
    )
    if not valid:
        raise FederationError(
            f"{who}: expected a layout of 'path|A|8x768' texts, found {text[:80]!r}"
        )
    factor: Factor = rest[0]  # type: ignore[assignment]
    return Segment(path, factor, tuple(map(int, sizes)))


def _factor(layer: LoraLayer, factor: Factor) -> Array | None:
    return {"A": layer.A, "B": layer.B, "magnitude": layer.magnitude}[factor]
