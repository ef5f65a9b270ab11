"""The slow twins of accounting: dp-accounting asked round by round, a closed form by mpmath."""

from __future__ import annotations

from collections.abc import Sequence

import mpmath
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant

from fedlora.privacy import PrivacyEvent


def epsilon_by_rounds(events: Sequence[PrivacyEvent], delta: float) -> float:
    """Return PLD's epsilon with every round of every event composed by itself."""
    accountant = PLDAccountant()
    for event in events:
        release = GaussianDpEvent(event.noise_multiplier)
        for _ in range(event.count):
            accountant.compose(PoissonSampledDpEvent(event.sampling_probability, release))
    return float(accountant.get_epsilon(delta))


def gaussian_delta(mu: float, epsilon: float) -> mpmath.mpf:
    """Return the delta of a Gaussian mechanism with sixty digits."""
    with mpmath.workdps(60):
        mu, epsilon = mpmath.mpf(mu), mpmath.mpf(epsilon)
        first = mpmath.ncdf(-epsilon / mu + mu / 2)
        return first - mpmath.exp(epsilon) * mpmath.ncdf(-epsilon / mu - mu / 2)
