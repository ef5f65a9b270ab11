"""How a row of factors becomes few bytes in a message, and back: fp16, int8 and int4. NumPy only.

A row's numbers are sorted by rank component: a row of A, a column of B. Then follow one another,
little-endian and without gaps,

    int8, int4   a float32 scale a component; the DoRA magnitudes, float32; the integers
    fp16         the numbers in the order of the row

int4 puts two integers in a byte, the first in the lower half, over the ends of components. How many
bytes that are is known from the layout alone, so that nothing is read from a header.

The scales are those of a packed file (`fedlora.formats.codecs`). The rounding is not: a packed file
rounds to nearest, a message at random, up with a probability that is the distance from below:

    y = x / scale,   q = floor(y) + 1 with probability y - floor(y), else floor(y)

so that E[q * scale] = x (QSGD, arXiv:1610.02132, section 3.1), up to 2**-24 of a step, since the
draws are float32; |error| < scale (nearest: half of that). Nearest would send every number below
half a step as zero, from every client and in every round alike: an error that no mean makes smaller
and that adds up over the rounds. fp16 rounds to nearest: its error is relative, 2**-11 of a number,
and what travels up is the change itself, which no number is too large to take up; only a change
below 2**-25 is lost. So there is nothing for draws to repair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedlora.adapter import Array
from fedlora.errors import FormatError, NonFiniteError
from fedlora.flat import Segment
from fedlora.formats.codecs import (
    CODECS,
    LEVELS,
    Codec,
    pack_nibbles,
    scales_for,
    to_half,
    unpack_nibbles,
)
from fedlora.randomness import rng

__all__ = ["CODECS", "FP32", "SERVER", "Codec", "Codecs", "RowCodec", "agreed", "rounding"]

FP32: Codec = "fp32"
SERVER = "server"  # in the place of a client's id, for what goes down
Indices: TypeAlias = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Codecs:
    """How factors travel between the server and one client."""

    upload: Codec = FP32
    download: Codec = FP32


def agreed(wanted: Codecs, known: Sequence[str]) -> Codecs:
    """Return what is wanted as far as a client knows it; fp32 is known to everyone."""
    upload = wanted.upload if wanted.upload in known else FP32
    download = wanted.download if wanted.download in known else FP32
    return Codecs(upload, download)


def rounding(codec: str, seed: int, who: str, round: int) -> np.random.Generator | None:
    """Return the draws of `who`, a client's id or `SERVER`, in a round; None where none are made.

    They are keyed: a round that runs again after a crash sends the same bytes, on every engine.
    """
    return rng(seed, "codec", who, round) if codec in LEVELS else None


class RowCodec:
    """One codec for the rows of one layout. Making it allocates nothing of the layout's size."""

    def __init__(self, segments: Sequence[Segment], codec: Codec) -> None:
        self.codec = codec
        self._segments = tuple(segments)
        self.size = sum(segment.size for segment in segments)  # numbers of a row
        magnitudes = sum(s.size for s in segments if s.factor == "magnitude")
        self._scaled = self.size - magnitudes  # numbers that become integers
        self._scales = sum(map(_rank, segments))  # one a component
        integers = self._scaled if codec == "int8" else (self._scaled + 1) // 2
        self._head = 4 * (self._scales + magnitudes)  # bytes before the integers
        self.num_bytes = 2 * self.size if codec == "fp16" else self._head + integers

    def encode(self, row: Array, draws: np.random.Generator | None = None) -> bytes:
        """Return `num_bytes` bytes for a row, ``(size,)`` float32.

        draws: for int8 and int4; None rounds to nearest.

        Raises `NonFiniteError`, which names the layer: NaN, infinity, or over 65504 with fp16.
        """
        if self.codec == "fp16":
            self._require_finite(row)
            return to_half(row, "the factors").astype("<f2", copy=False).tobytes()
        values = row[self._order]
        scaled, magnitudes = values[: self._scaled], values[self._scaled :]
        largest = np.zeros(0)
        if len(scaled):
            largest = np.maximum.reduceat(np.abs(scaled), self._starts).astype(np.float64)
        if not (np.isfinite(largest).all() and np.isfinite(magnitudes).all()):
            self._require_finite(row)
        scales = scales_for(largest, self.codec)
        steps = scaled / np.repeat(np.where(scales > 0, scales, 1).astype(np.float64), self._each)
        if draws is None:
            integers = np.rint(steps).astype(np.int8)
        else:
            below = np.floor(steps)
            above = draws.random(len(steps), dtype=np.float32) < steps - below
            integers = (below + above).astype(np.int8)
        packed = integers if self.codec == "int8" else pack_nibbles(integers[None])
        head = (np.asarray(part, "<f4").tobytes() for part in (scales, magnitudes))
        return b"".join((*head, packed.tobytes()))

    def decode(self, data: bytes | memoryview) -> Array:
        """Return the row, ``(size,)`` float32, of exactly `num_bytes` bytes.

        A number that is not finite, or too large for float32, comes out as one that is not finite.

        Raises `FormatError`: another number of bytes, scales that are not finite or below 0, an
        integer that the codec does not use.
        """
        if len(data) != self.num_bytes:
            raise FormatError(f"{self.codec}: expected {self.num_bytes} bytes, found {len(data)}")
        if self.codec == "fp16":
            return np.frombuffer(data, "<f2").astype(np.float32)
        head = np.frombuffer(data, "<f4", self._head // 4)
        scales, magnitudes = head[: self._scales], head[self._scales :]
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise FormatError("scales: expected finite numbers >= 0")
        if self.codec == "int8":
            integers = np.frombuffer(data, np.int8, offset=self._head)
        else:
            packed = np.frombuffer(data, np.uint8, offset=self._head)
            integers = unpack_nibbles(packed[None], self._scaled)[0]
        if int(integers.min(initial=0)) < -LEVELS[self.codec]:
            raise FormatError(f"{self.codec}: expected integers from -{LEVELS[self.codec]} on")
        row: Array = np.empty(self.size, np.float32)
        with np.errstate(over="ignore"):
            row[self._order[: self._scaled]] = integers * np.repeat(
                scales.astype(np.float64), self._each
            )
        row[self._order[self._scaled :]] = magnitudes
        return row

    @cached_property
    def _order(self) -> Indices:
        """Where in a row the numbers lie, component by component, and then the magnitudes."""
        parts: list[Indices] = []
        last: list[Indices] = []
        start = 0
        for segment in self._segments:
            places = np.arange(start, start + segment.size).reshape(segment.shape)
            start += segment.size
            if segment.factor == "magnitude":
                last.append(places.reshape(-1))
            else:
                parts.append((places.T if segment.factor == "B" else places).reshape(-1))
        return np.concatenate([np.zeros(0, np.intp), *parts, *last])

    @cached_property
    def _each(self) -> Indices:
        """The numbers of each component."""
        pairs = ((segment.size, _rank(segment)) for segment in self._segments)
        each = [size // rank for size, rank in pairs if rank for _ in range(rank)]
        return np.array(each, np.intp)

    @cached_property
    def _starts(self) -> Indices:
        starts: Indices = np.cumsum(self._each) - self._each
        return starts

    def _require_finite(self, row: Array) -> None:
        start = 0
        for segment in self._segments:
            part: npt.NDArray[Any] = row[start : start + segment.size]
            start += segment.size
            if not np.isfinite(part).all():
                raise NonFiniteError(
                    f"layer {segment.path!r}, {segment.factor}: expected finite numbers, found "
                    f"{part[~np.isfinite(part)][0]}"
                )


def _rank(segment: Segment) -> int:
    """Return how many scales a factor has."""
    if segment.factor == "magnitude":
        return 0
    return segment.shape[0] if segment.factor == "A" else segment.shape[-1]
