"""The factors of an adapter as one flat float32 row, sorted by path with A before B. NumPy only.

A round has one form of rows and thousands of rows. So what is the same for all of them (names,
shapes, places) is prepared once, a row is checked as a whole, and the layers made of it are views:
nothing is copied, and what is done to all factors alike is done to the row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fedlora.adapter import Adapter, Array, LoraLayer, with_views
from fedlora.errors import NonFiniteError, ShapeMismatchError
from fedlora.training import Factor

__all__ = ["RowForm", "RowReader", "Segment", "pack", "segments_of"]

_ORDER: tuple[Factor, ...] = ("A", "B", "magnitude")


@dataclass(frozen=True, slots=True)
class Segment:
    """One factor's place in the row; its text is ``path|factor|sizes``."""

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
    """Return where some factors of `adapter` lie in a row."""
    chosen = set(factors)
    wanted = [factor for factor in _ORDER if factor in chosen]
    found = []
    for path, layer in adapter.layers.items():
        for factor in wanted:
            value = _factor(layer, factor)
            if value is not None:
                found.append(Segment(path, factor, tuple(map(int, value.shape))))
    return tuple(found)


def pack(adapter: Adapter, segments: Sequence[Segment]) -> Array:
    """Return the factors of `adapter` that `segments` name as one 1-D float32 row.

    Raises `ShapeMismatchError` for a factor that is missing or of another shape.
    """
    parts = []
    for segment in segments:
        value = _factor(adapter[segment.path], segment.factor)
        if value is None or value.shape != segment.shape:
            raise ShapeMismatchError(f"{segment}: the adapter has no such factor")
        parts.append(value.reshape(-1))
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class RowForm:
    """How a row is cut into the factors of adapters that are else like one adapter.

    The factors that `segments` do not name, the scalings, the config and the base are `like`'s.
    """

    like: Adapter
    segments: tuple[Segment, ...]
    size: int  # numbers in a row
    _cuts: dict[str, tuple[slice | None, ...]]  # by path: where A, B and the magnitude lie

    @classmethod
    def of(cls, like: Adapter, factors: Iterable[Factor]) -> RowForm:
        """Return the form of rows with some factors of `like`."""
        segments = segments_of(like, factors)
        places: dict[tuple[str, Factor], slice] = {}
        start = 0
        for segment in segments:
            places[segment.path, segment.factor] = slice(start, start + segment.size)
            start += segment.size
        cuts = {path: tuple(places.get((path, factor)) for factor in _ORDER) for path in like}
        return cls(like, segments, start, cuts)

    def read(self, data: bytes, offset: int = 0, largest: float = math.inf) -> Adapter:
        """Return the adapter whose named factors are `data` from byte `offset` on, without a copy.

        data: at least `size` little-endian float32 numbers. Bytes, since nobody can change them
        afterwards.

        Raises `NonFiniteError` with the factor and the place of the first bad number, and with the
        factor of the first whose size is over `largest`.
        """
        row = np.frombuffer(data, np.float32, self.size, offset)
        layers = {}
        for path, (a, b, magnitude) in self._cuts.items():
            like = self.like.layers[path]
            layers[path] = (
                like.A if a is None else row[a].reshape(like.A.shape),
                like.B if b is None else row[b].reshape(like.B.shape),
                like.magnitude if magnitude is None else row[magnitude],
            )
        # One reduction: a NaN or an infinity makes the sum of squares not finite. So does overflow,
        # which the layers' own checks tell apart; for a bad number they raise.
        # No number is larger than the root of that sum, so that it also answers for `largest`.
        squares = float(np.vdot(row, row)) if self.size else 0.0
        if not math.isfinite(squares):
            for path, arrays in layers.items():
                like = self.like.layers[path]
                LoraLayer(arrays[0], arrays[1], like.scaling, arrays[2], like.kind)
        if squares > largest**2:
            self._refuse_over(largest, row)
        return with_views(self.like, layers, (self, row))

    def _refuse_over(self, largest: float, row: Array) -> None:
        """Raise for the first factor with a number over `largest`; a large sum may have none."""
        start = 0
        for segment in self.segments:
            most = float(np.abs(row[start : start + segment.size]).max(initial=0.0))
            if most > largest:
                raise NonFiniteError(
                    f"layer {segment.path!r}, {segment.factor}: expected numbers up to "
                    f"{largest:g}, found {most:g}"
                )
            start += segment.size


class RowReader:
    """Read the same factors of one adapter after another as rows: ``reader(adapter)``.

    An adapter that was made of such a row gives that row back; of any other the factors are joined.
    """

    def __init__(self, like: Adapter, factors: Iterable[Factor]) -> None:
        self.segments = segments_of(like, factors)
        self.size = sum(segment.size for segment in self.segments)
        self._known: RowForm | None = None  # the last form with these segments

    def __call__(self, adapter: Adapter) -> Array:
        """Return a row of ``(size,)`` float32. Raises `ShapeMismatchError` as `pack` does."""
        if adapter.made_of is not None:
            form, row = adapter.made_of
            if form is not self._known and form.segments == self.segments:
                self._known = form
            if form is self._known:
                found: Array = row
                return found
        return pack(adapter, self.segments)


def _factor(layer: LoraLayer, factor: Factor) -> Array | None:
    return {"A": layer.A, "B": layer.B, "magnitude": layer.magnitude}[factor]
