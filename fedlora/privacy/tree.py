"""Noise that later rounds take back: the matrix mechanism of DP-FTRL, for uncontrolled sampling.

Round i releases the sum so far plus row i of A C⁻¹Z, where A is the lower triangle of ones, C is
lower triangular Toeplitz, and Z has the standard deviation z·sensitivity(C). With C the square root
of A (arXiv:2202.11205), its coefficients are c₀ = 1, c_k = c_{k−1} (2k − 1)/(2k). Cut off after
`band` of them (arXiv:2405.13763), C also serves clients who come back after `separation` rounds.
Nothing is drawn, so nothing is amplified: the whole run costs one Gaussian of the multiplier z.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import ConfigError

__all__ = ["coefficients", "error", "sensitivity"]

Coefficients = NDArray[np.float64]


def coefficients(rounds: int, band: int | None = None) -> Coefficients:
    """Return c as float64 ``(rounds,)``, zero from `band` on. Raises `ConfigError` below one."""
    band = rounds if band is None else band
    if rounds < 1 or band < 1:
        raise ConfigError(f"rounds, band: expected whole numbers >= 1, found {(rounds, band)}")
    k = np.arange(1, rounds, dtype=np.float64)
    found = np.concatenate([[1.0], np.cumprod((2 * k - 1) / (2 * k))])
    found[band:] = 0.0
    return found


def sensitivity(c: Coefficients, participations: int = 1, separation: int = 1) -> float:
    """Return the most that one client moves C's image, in clipping norms.

    The client takes part at most `participations` times with `separation` rounds from one to the
    next at least. For coefficients that are not negative and fall, as those of `coefficients`, the
    worst is to begin in the first round and to come back as soon as allowed (arXiv:2405.13763).
    """
    total = np.zeros_like(c)
    for start in range(0, min(participations * separation, len(c)), separation):
        total[start:] += c[: len(c) - start]
    return float(np.linalg.norm(total))


def error(c: Coefficients, sensitivity: float) -> tuple[float, float]:
    """Return (largest, root mean square) standard deviation of a round's sum, for z = 1."""
    n, band = len(c), int(np.flatnonzero(c)[-1]) + 1
    inverse = np.zeros(n)  # the first column of C⁻¹, by forward substitution
    inverse[0] = 1 / c[0]
    for i in range(1, n):
        m = min(i, band - 1)
        inverse[i] = -(c[1 : m + 1] @ inverse[i - m : i][::-1]) / c[0]
    squares = np.cumsum(np.cumsum(inverse) ** 2)  # of the rows of A C⁻¹
    deviations = sensitivity * np.sqrt(squares)
    return float(deviations[-1]), float(np.sqrt(np.mean(deviations**2)))
