"""What Gaussian noise costs when everyone takes part: a closed form, by `math` alone.

For a sum of sensitivity s under noise of the standard deviation σ, with μ = s/σ (arXiv:1805.06530,
Theorem 8; several of them compose to the root of the sum of their μ²):

    δ(ε) = Φ(−ε/μ + μ/2) − exp(ε) Φ(−ε/μ − μ/2)

The second term is computed without its exponential, which overflows beyond ε = 709: with
a = ε/μ − μ/2 and b = ε/μ + μ/2, exp(ε) φ(b) = φ(a), so it is φ(a) M(b), where M(x) = Φ(−x)/φ(x)
is Mills' ratio.
"""

from __future__ import annotations

import math

__all__ = ["gaussian_delta", "gaussian_epsilon"]


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return δ of a Gaussian mechanism at ε >= 0; mu: sensitivity over standard deviation."""
    if mu == 0:
        return 0.0
    if math.isinf(mu):
        return 1.0
    a, b = epsilon / mu - mu / 2, epsilon / mu + mu / 2
    if a > 0:  # both terms are small: their difference is taken before they are scaled
        return _density(a) * max(_mills(a) - _mills(b), 0.0)
    return min(max(_upper_tail(a) - _density(a) * _mills(b), 0.0), 1.0)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the smallest ε >= 0 at which δ(ε) <= `delta`, by bisection and from above.

    mu: sensitivity over standard deviation; delta in (0, 1).
    """
    if math.isinf(mu):
        return math.inf
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    # The privacy loss is N(μ²/2, μ²), and δ(ε) is less than the chance that it is above ε.
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(-2 * math.log(delta))
    while low < (middle := (low + high) / 2) < high:
        if gaussian_delta(mu, middle) <= delta:
            high = middle
        else:
            low = middle
    return high


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _upper_tail(x: float) -> float:
    """Return Φ(−x)."""
    return math.erfc(x / math.sqrt(2)) / 2


def _mills(x: float) -> float:
    """Return Φ(−x)/φ(x), x >= 0."""
    if x < 20:  # beyond it erfc loses digits and ends in zero at 38
        return _upper_tail(x) / _density(x)
    # Laplace's continued fraction x + 1/(x + 2/(x + 3/(x + …))); 20 terms are exact to the last
    # digit from x = 20 on.
    fraction = x
    for k in range(20, 0, -1):
        fraction = x + k / fraction
    return 1 / fraction
