"""A secure sum's parts, one number at a time, as `fedlora.privacy.secure` has them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

PRIME = 2**256 + 297


def levels(bits: int, clients: int) -> int:
    """The most steps on each side of zero, found by counting down from float64's own limit."""
    most = 2**52
    while 2 * most * clients >= 2**bits:
        most = min(most - 1, (2**bits - 1) // (2 * clients))
    return most


def quantize(
    vector: Sequence[float], bits: int, clipping_range: float, clients: int, draws: object
) -> list[int]:
    """Ring numbers of a vector; `draws.random()` gives a float64 in [0, 1) a number."""
    most = levels(bits, clients)
    numbers = []
    for value in vector:
        clipped = max(-clipping_range, min(clipping_range, float(value)))
        steps = math.floor(clipped * (most / clipping_range) + draws.random())
        numbers.append(max(-most, min(most, steps)) % 2**bits)
    return numbers


def total(vectors: Sequence[Sequence[int]], bits: int, step: float) -> np.ndarray:
    """The float64 sum that the ring numbers of some vectors stand for."""
    found = []
    for column in zip(*vectors, strict=True):
        value = sum(column) % 2**bits
        found.append((value - 2**bits if value >= 2 ** (bits - 1) else value) * step)
    return np.array(found)


def shares(secret: int, coefficients: Sequence[int], places: Sequence[int]) -> dict[int, int]:
    """A polynomial's values; coefficients: of the highest power first, without the secret."""
    powers = range(len(coefficients), 0, -1)
    return {
        x: (secret + sum(c * x**power for c, power in zip(coefficients, powers, strict=True)))
        % PRIME
        for x in places
    }


def secret_of(shares: dict[int, int]) -> int:
    """Lagrange's formula at 0."""
    found = 0
    for x, share in shares.items():
        above = below = 1
        for other in shares:
            if other != x:
                above, below = above * other % PRIME, below * (other - x) % PRIME
        found += share * above * pow(below, PRIME - 2, PRIME)
    return found % PRIME
