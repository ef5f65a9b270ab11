"""The closed form of a Gaussian mechanism, against the same with sixty digits."""

from __future__ import annotations

import math

import pytest

from fedlora.privacy.exact import gaussian_delta, gaussian_epsilon
from tests.reference import accounting as slow

MUS = (1e-4, 0.01, 0.3, 1.0, 3.7, 20.0, 100.0)


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("delta", [0.3, 1e-5, 1e-10, 1e-100, 1e-250])
def test_epsilon_is_that_of_sixty_digits(mu: float, delta: float) -> None:
    found = gaussian_epsilon(mu, delta)
    if found == 0:
        assert slow.gaussian_delta(mu, 0) <= delta
        return
    # Cancellation between two tails that differ by mu costs about 1e-16 / mu.
    margin = 1e-9 * found + 1e-12
    assert slow.gaussian_delta(mu, found + margin) < delta
    assert slow.gaussian_delta(mu, max(found - margin, 0)) > delta


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0, 4.0, 30.0])
def test_delta_is_that_of_sixty_digits_out_to_the_end_of_floats(mu: float, share: float) -> None:
    epsilon = mu * mu / 2 + share * mu  # epsilon beyond 709, where its exponential overflows
    expected = float(slow.gaussian_delta(mu, epsilon))
    assert gaussian_delta(mu, epsilon) == pytest.approx(expected, rel=1e-8, abs=1e-300)


def test_the_known_value() -> None:
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.377178095681224, abs=1e-9)


def test_epsilon_is_found_from_above() -> None:
    for mu in MUS:
        assert gaussian_delta(mu, gaussian_epsilon(mu, 1e-7)) <= 1e-7


def test_the_ends() -> None:
    assert gaussian_epsilon(0.0, 1e-5) == 0.0
    assert gaussian_epsilon(math.inf, 1e-5) == math.inf
    assert gaussian_delta(math.inf, 5.0) == 1.0
    assert gaussian_delta(0.0, 0.0) == 0.0
