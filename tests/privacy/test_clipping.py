"""Clipping bounds a whole update, and an adaptive norm costs no more than the ledger says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedlora.errors import ConfigError, NonFiniteError
from fedlora.privacy.central import CentralMechanism
from fedlora.privacy.clipping import (
    clip,
    count_noise,
    multiplier_of_sum,
    next_clipping_norm,
    norm_of,
)
from tests.matching import raises

FLOATS = st.floats(-1e6, 1e6, width=32)


@given(arrays(np.float32, st.integers(0, 40), elements=FLOATS), st.floats(1e-6, 1e6))
def test_no_update_is_longer_than_the_norm(row: np.ndarray, norm: float) -> None:
    found = clip(row, norm)
    assert found.dtype == np.float64
    # Scaling and summing in float64 round by a few parts in 1e16.
    assert norm_of(found) <= norm * (1 + 1e-14)
    if norm_of(row) <= norm:
        assert np.array_equal(found, row)
    else:
        assert norm_of(found) == pytest.approx(norm, rel=1e-12)
        np.testing.assert_allclose(found * norm_of(row), row.astype(np.float64) * norm, rtol=1e-12)


def test_zero_stays_zero_and_the_given_row_stays_as_it_is() -> None:
    assert np.array_equal(clip(np.zeros(5, np.float32), 1.0), np.zeros(5))
    row = np.array([3.0, 4.0])
    clip(row, 1.0)
    assert row.tolist() == [3.0, 4.0]
    inside = clip(row, 10.0)
    inside[0] = 7.0
    assert row[0] == 3.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_has_no_norm_is_refused(bad: float) -> None:
    with raises(NonFiniteError, "expected a finite norm"):
        clip(np.array([0.0, bad]), 1.0)


@given(st.integers(1, 10_000), st.floats(0.01, 0.99))
def test_the_sum_and_the_count_together_cost_no_more_than_the_ledger_says(
    cohort: int, share: float
) -> None:
    z = share * 2 * count_noise(cohort)  # of the most that the count allows
    of_sum = multiplier_of_sum(z, cohort)
    # Two Gaussian mechanisms on one cohort: the inverse squares of their multipliers add up.
    together = (of_sum**-2 + (2 * count_noise(cohort)) ** -2) ** -0.5
    assert of_sum >= z
    assert together >= z * (1 - 1e-9)
    assert together == pytest.approx(z, rel=1e-9)


@pytest.mark.parametrize("z", [1.0, 1.5])
def test_a_count_that_would_cost_more_than_both_may_is_refused(z: float) -> None:
    with raises(ConfigError, "privacy.target_quantile", "under 1.0", "a larger cohort"):
        multiplier_of_sum(z, 10)


def test_the_norm_follows_the_quantile() -> None:
    assert next_clipping_norm(2.0, 0.5, 0.5, 0.2) == 2.0
    assert next_clipping_norm(2.0, 0.7, 0.5, 0.2) == pytest.approx(2 * math.exp(-0.04))
    assert next_clipping_norm(2.0, 0.2, 0.5, 0.2) == pytest.approx(2 * math.exp(0.06))
    # Noise alone, far outside of what a share can be, moves it by the rate at most.
    assert next_clipping_norm(2.0, -40.0, 0.5, 0.2) == pytest.approx(2 * math.exp(0.1))


def test_an_adaptive_norm_finds_the_median_of_the_cohorts_norms() -> None:
    norms = np.linspace(0.5, 1.5, 101)
    norm = 20.0
    for round in range(1, 101):
        mechanism = CentralMechanism(bytes(32), 1.0, norm, 101, target_quantile=0.5)
        rows = [np.array([length]) for length in norms]
        below = sum(map(mechanism.is_below, rows))
        total = sum((mechanism.clip(row) for row in rows), np.zeros(1))
        norm = mechanism.next_norm(total, round, below, len(rows))
    # The noise on the share is 1/20, which moves the norm by 1 % a round: it stays near 1.
    assert norm == pytest.approx(1.0, rel=0.1)
