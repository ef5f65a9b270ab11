"""The texts that say how factors lie in a message's flat float32 buffer. NumPy only.

A message carries one row (`fedlora.flat`) and its layout, a segment a factor:

    fc|A|8x768
    fc|B|10x8

One buffer, since each array of a message costs a header and 0.1 ms. The receiver never believes
the layout that came: it compares it with the one that it expects, so that nothing can broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlora.adapter import Array
from fedlora.errors import FederationError, LayerMismatchError, ShapeMismatchError
from fedlora.flat import Segment
from fedlora.training import Factor

__all__ = ["parse_segments", "require_same_segments", "unpack"]

_FACTORS = ("A", "B", "magnitude")


def parse_segments(texts: Sequence[str], who: str) -> tuple[Segment, ...]:
    """Read a layout that came in a message. Raises `FederationError`, which opens with `who`."""
    return tuple(_parse(text, who) for text in texts)


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
        and rest[0] in _FACTORS
        and all(s.isascii() and s.isdigit() and len(s) < 11 and 0 < int(s) < 2**31 for s in sizes)
    )
    if not valid:
        raise FederationError(
            f"{who}: expected a layout of 'path|A|8x768' texts, found {text[:80]!r}"
        )
    factor: Factor = rest[0]  # type: ignore[assignment]
    return Segment(path, factor, tuple(map(int, sizes)))
