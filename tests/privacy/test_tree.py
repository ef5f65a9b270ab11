"""The matrix mechanism's coefficients, sensitivities and errors, against published values."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedlora.errors import ConfigError
from fedlora.privacy.tree import coefficients, error, sensitivity
from tests.matching import raises


def test_the_coefficients_are_those_of_the_root_of_the_triangle_of_ones() -> None:
    c = coefficients(6)
    root = sum(np.diag(np.full(6 - k, c[k]), -k) for k in range(6))
    np.testing.assert_allclose(root @ root, np.tril(np.ones((6, 6))), atol=1e-15)


def test_one_participation_in_a_thousand_rounds() -> None:
    c = coefficients(1000)
    found = sensitivity(c)
    assert found == pytest.approx(1.806932, abs=1e-6)
    assert error(c, found)[0] == pytest.approx(3.265003, abs=1e-6)
    alone = coefficients(1000, band=1)
    assert error(alone, sensitivity(alone))[0] == pytest.approx(31.62, abs=5e-3)


@pytest.mark.parametrize(("band", "expected"), [(1, 70.746), (100, 12.103)])
def test_ten_participations_a_hundred_rounds_apart(band: int, expected: float) -> None:
    c = coefficients(1000, band)
    found = error(c, sensitivity(c, 10, 100))[1]
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("band", [1, 3, 9])
def test_the_sensitivity_is_that_of_the_worst_of_all_patterns(band: int) -> None:
    n, times, apart = 9, 3, 2
    c = coefficients(n, band)
    matrix = sum(np.diag(np.full(n - k, c[k]), -k) for k in range(n))
    worst = 0.0
    for count in range(times + 1):
        for rounds in itertools.combinations(range(n), count):
            if all(b - a >= apart for a, b in itertools.pairwise(rounds)):
                worst = max(worst, float(np.linalg.norm(matrix[:, list(rounds)].sum(axis=1))))
    assert sensitivity(c, times, apart) == pytest.approx(worst, rel=1e-12)


def test_the_error_is_that_of_the_matrices() -> None:
    c = coefficients(8, 3)
    matrix = sum(np.diag(np.full(8 - k, c[k]), -k) for k in range(8))
    rows = np.linalg.norm(np.tril(np.ones((8, 8))) @ np.linalg.inv(matrix), axis=1)
    expected = (rows.max(), np.sqrt(np.mean(rows**2)))
    np.testing.assert_allclose(error(c, 1.0), expected, rtol=1e-12)


def test_no_rounds_are_refused() -> None:
    with raises(ConfigError, ">= 1"):
        coefficients(0)
