"""Real numbers to whole ones in a ring, so that masks can be added and taken off exactly.

A number is clipped to [-range, range] and rounded, up or down at random so that its mean stays, to
a multiple of ``step = range / half_levels``. Sums of these multiples are exact in the ring 2**bits
while ``2 * half_levels * clients < 2**bits``; so the most levels that fit are taken, but no more
than 2**53 on both sides together, which is what float64 can tell apart.

Error of a sum of `count` vectors, each number of it: less than ``count * step`` in the worst case,
``step * sqrt(count) / 2`` or less as a standard deviation, against the exact sum of the clipped
numbers, and above it float64's own rounding of the input and the result (2**-52 relative).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlora.errors import NonFiniteError, SecureSumError, SecureTermsError, ShapeMismatchError

__all__ = ["Quantizer", "Ring"]

Ring = npt.NDArray[np.unsignedinteger[Any]]  # uint32 or uint64
_CHUNK = 1 << 16  # numbers at a time: the temporaries stay in the processor's cache
_EXACT = 1 << 52  # on each side of zero


@dataclass(frozen=True)
class Quantizer:
    """bits: of the ring, 32 or 64. clients: the most vectors that are ever added up."""

    bits: int
    clipping_range: float
    clients: int

    def __post_init__(self) -> None:
        if self.half_levels < 1:
            raise SecureTermsError(
                f"ring of {self.bits} bits: expected room for the sum of all clients, found "
                f"{self.clients} clients; take 64 bits, or fewer clients"
            )

    @cached_property
    def half_levels(self) -> int:
        """How many steps a number may be away from zero."""
        return min(((1 << (self.bits - 1)) - 1) // self.clients, _EXACT)

    @property
    def step(self) -> float:
        """The difference between two levels, in the vector's unit."""
        return self.clipping_range / self.half_levels

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the ring's numbers."""
        return np.dtype(np.uint32 if self.bits == 32 else np.uint64)

    def error_bound(self, count: int) -> float:
        """Return the most that a number of a sum of `count` vectors can be off."""
        return count * self.step

    def norm_bound(self, size: int) -> float:
        """Return the most that rounding adds to the L2 norm of a vector of `size` numbers.

        Who bounds a client's part of the sum by its norm must clip to that much less, or count it.
        """
        return math.sqrt(size) * self.step

    def quantize(self, vector: npt.NDArray[np.float64], draws: np.random.Generator) -> Ring:
        """Return a float64 vector (n,) as ring numbers (n,), negative ones as two's complement.

        draws: for the rounding only; it hides nothing. Raises `NonFiniteError`.
        """
        vector = np.asarray(vector, np.float64)
        if vector.ndim != 1:
            raise ShapeMismatchError(f"secure sum: expected a vector (n,), found {vector.shape}")
        if not np.isfinite(vector).all():
            raise NonFiniteError("secure sum: expected finite numbers, found NaN or infinity")
        out = np.empty(len(vector), self.dtype)
        most = float(self.half_levels)
        scale = most / self.clipping_range
        signed = np.int32 if self.bits == 32 else np.int64
        for start in range(0, len(vector), _CHUNK):
            part = np.clip(
                vector[start : start + _CHUNK], -self.clipping_range, self.clipping_range
            )
            part *= scale
            part += draws.random(len(part))
            np.floor(part, out=part)
            # The sum above may be rounded up past the last level.
            np.clip(part, -most, most, out=part)
            out[start : start + _CHUNK] = part.astype(signed).view(self.dtype)
        return out

    def dequantize(self, total: Ring, count: int) -> npt.NDArray[np.float64]:
        """Return the sum (n,) float64 that ring numbers (n,) stand for, of `count` vectors.

        Raises `SecureSumError` where `count` such vectors cannot add up to a number.
        """
        if not 0 <= count <= self.clients:
            raise SecureSumError(
                f"secure sum: expected at most {self.clients} vectors in it, found {count}"
            )
        signed: npt.NDArray[np.int32 | np.int64] = total.view(
            np.int32 if self.bits == 32 else np.int64
        )
        most = count * self.half_levels
        if len(signed) and (int(signed.max()) > most or int(signed.min()) < -most):
            place = int(np.flatnonzero((signed > most) | (signed < -most))[0])
            raise SecureSumError(
                f"secure sum, number {place}: expected at most {most} steps for {count} clients, "
                f"found {int(signed[place])}; a message was damaged, or a client lied"
            )
        return signed.astype(np.float64) * self.step
