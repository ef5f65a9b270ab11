"""Split a secret among n holders so that any t of them have it, and t - 1 know nothing of it.

Shamir 1979 (doi:10.1145/359168.359176): the secret is a polynomial's value at 0, its other t - 1
coefficients are uniform, and a share is the value at the holder's place, 1 to n. The field is the
integers modulo the smallest prime above 2**256, so that every 32 bytes are one of its elements.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate

from fedlora.errors import ShareError, ThresholdError

__all__ = ["PRIME", "SHARE_BYTES", "combine", "split"]

PRIME = 2**256 + 297
SHARE_BYTES = 33


def split(
    secret: bytes,
    threshold: int,
    places: Sequence[int],
    below: Callable[[int], int] = secrets.randbelow,
) -> dict[int, bytes]:
    """Return a share of 32 secret bytes for every place.

    places: distinct, above 0. below(n): uniform whole numbers in [0, n), for the coefficients.

    Raises `ShareError` for places or a threshold with which nothing can be split.
    """
    if len(secret) != 32:
        raise ShareError(f"shares: expected a secret of 32 bytes, found {len(secret)}")
    if len(set(places)) != len(places) or any(not 0 < place < PRIME for place in places):
        raise ShareError("shares: expected distinct places above 0")
    if not 1 <= threshold <= len(places):
        raise ShareError(
            f"shares: expected a threshold of 1 to {len(places)} holders, found {threshold}"
        )
    # The highest power first, for Horner's rule.
    coefficients = [below(PRIME) for _ in range(threshold - 1)]
    last = int.from_bytes(secret, "big")
    shares = {}
    for place in places:
        value = 0
        for coefficient in coefficients:
            value = (value * place + coefficient) % PRIME
        shares[place] = ((value * place + last) % PRIME).to_bytes(SHARE_BYTES, "big")
    return shares


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the 32 bytes that shares by place stand for; the lowest `threshold` places are read.

    Raises `ThresholdError` for too few shares, and `ShareError` for bytes that are no share, or
    that stand for no 32 bytes. Other wrong shares give other bytes: who combines must know a digest
    of the secret, or of every share.
    """
    if len(shares) < threshold:
        raise ThresholdError(
            f"shares: expected at least {threshold} to have the secret, found {len(shares)}"
        )
    places = tuple(sorted(shares)[:threshold])
    total = 0
    for place, weight in zip(places, _weights(places), strict=True):
        total += weight * _number(place, shares[place])
    secret = total % PRIME
    if secret >> 256:
        raise ShareError("shares: expected shares of one secret of 32 bytes, found others")
    return secret.to_bytes(32, "big")


def _number(place: int, share: bytes) -> int:
    value = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or value >= PRIME:
        raise ShareError(
            f"share of place {place}: expected {SHARE_BYTES} bytes of a number below the prime, "
            f"found {len(share)} bytes"
        )
    return value


@lru_cache(maxsize=8)  # in a complete graph one set of holders opens every secret
def _weights(places: tuple[int, ...]) -> list[int]:
    """Return Lagrange's weights at 0: of x_i the product over j of x_j / (x_j - x_i)."""
    if any(not 0 < place < PRIME for place in places):
        raise ShareError("shares: expected distinct places above 0")
    above = math.prod(places)
    below = [
        place * math.prod(other - place for other in places if other != place) % PRIME
        for place in places
    ]
    # One inverse for all, of their product: an inverse takes as long as hundreds of products.
    products = list(accumulate(below, lambda one, other: one * other % PRIME, initial=1))
    inverse = pow(products.pop(), -1, PRIME)
    weights = []
    for before, last in zip(reversed(products), reversed(below), strict=True):
        weights.append(above * inverse * before % PRIME)
        inverse = inverse * last % PRIME
    return weights[::-1]
