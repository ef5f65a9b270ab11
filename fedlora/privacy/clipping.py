"""Bound what one client can move: joint clipping of its whole update, with a norm that may adapt.

    clipped = update * min(1, C / norm(update))

The norm is that of all factors together, in float64. Clipping each factor or layer on its own would
change the direction, and its bounds would add up.

Adaptive clipping (arXiv:1905.03871, algorithm 1) lets C follow a quantile of the updates' norms.
Each round also releases how large a share of the cohort stayed below C, with noise of its own, and
``C <- C exp(-rate (share - quantile))``. Noise is divided between the two releases so that both
together cost what the sum alone would: with ``s`` the noise on the count, which one client moves by
1/2 at most, the sum gets ``z_sum = (z**-2 - (2 s)**-2)**-0.5``.
"""

from __future__ import annotations

import math

import numpy as np

from fedlora.adapter import Array
from fedlora.errors import ConfigError, NonFiniteError
from fedlora.low_rank import Matrix

__all__ = [
    "clip",
    "count_noise",
    "multiplier_of_sum",
    "next_clipping_norm",
    "norm_of",
]

COUNT_SHARE = 20  # the noise on the count of a cohort of m is m / 20; arXiv:1905.03871, section 3


def norm_of(update: Array | Matrix) -> float:
    """Return the L2 norm of a row ``(n,)``, summed in float64.

    Raises `NonFiniteError` where it is not finite, so also for every row with such a number.
    """
    row = np.asarray(update, np.float64)
    norm = math.sqrt(float(np.dot(row, row)))
    if not math.isfinite(norm):
        raise NonFiniteError(f"an update to clip: expected a finite norm, found {norm}")
    return norm


def clip(update: Array | Matrix, clipping_norm: float) -> Matrix:
    """Return a row ``(n,)`` float64 whose norm is at most `clipping_norm`; zero stays zero.

    A row that is short enough keeps its numbers. Raises `NonFiniteError` as `norm_of` does.

    >>> clip(np.array([3.0, 4.0], np.float32), 1.0)
    array([0.6, 0.8])
    """
    norm = norm_of(update)
    row = np.array(update, np.float64)
    return row * (clipping_norm / norm) if norm > clipping_norm else row


def count_noise(cohort: int) -> float:
    """Return the standard deviation of the noise on the count of those below the norm."""
    return cohort / COUNT_SHARE


def multiplier_of_sum(noise_multiplier: float, cohort: int) -> float:
    """Return the noise multiplier of the sum, beside a noised count, for the two to cost z.

    noise_multiplier: z, what the ledger says. cohort: the expected number of clients of a round.

    Raises `ConfigError` where the count alone would cost more than z allows.

    >>> round(multiplier_of_sum(1.0, 100), 6)
    1.005038
    """
    rest: float = noise_multiplier**-2 - (2 * count_noise(cohort)) ** -2
    if rest <= 0:
        raise ConfigError(
            f"privacy.target_quantile: expected a noise multiplier under {2 * count_noise(cohort)} "
            f"(a tenth of federation.cohort), found {noise_multiplier:g}: the count of clients "
            "below the clipping norm would cost more than both releases may; use a larger cohort, "
            "or a fixed norm"
        )
    found: float = rest**-0.5
    # Only rounding can make it smaller, where the count's share is next to nothing.
    return max(found, noise_multiplier)


def next_clipping_norm(
    clipping_norm: float, share_below: float, target_quantile: float, rate: float
) -> float:
    """Return the next round's norm (arXiv:1905.03871, algorithm 1).

    share_below: of the cohort, as it was released. Noise may put it outside [0, 1]; it is used
    within it, which costs nothing: so one round changes the norm by a factor of exp(rate) at most.

    >>> next_clipping_norm(1.0, 0.5, 0.5, 0.2)
    1.0
    """
    share = min(max(share_below, 0.0), 1.0)
    return clipping_norm * math.exp(-rate * (share - target_quantile))
