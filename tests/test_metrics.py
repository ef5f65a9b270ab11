"""Summaries and paired gains, against hand-made numbers and the tables of Student's t."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import DataError
from fedlora.metrics import Gain, Summary, auc, gain, interval, share_better, summarize
from fedlora.metrics import _student as student
from tests.reference.auc import auc_of_pairs


def test_worst_tenth_is_the_mean_of_the_lowest_accuracies():
    values = [i / 100 for i in range(25)]  # ⌈25/10⌉ = 3 worst: 0.00, 0.01, 0.02
    found = summarize(values, [1.0] * 25, higher_is_better=True)
    assert found == Summary(
        mean=pytest.approx(0.12), median=0.12, worst_tenth=pytest.approx(0.01), loss=1.0
    )


def test_worst_tenth_is_the_mean_of_the_highest_losses():
    losses = [3.0, 1.0, 2.0]
    assert summarize(losses, losses, higher_is_better=False) == Summary(2.0, 2.0, 3.0, 2.0)


def test_no_clients_have_no_summary():
    with pytest.raises(DataError, match="at least one client, found 0 values and 0 losses"):
        summarize([], [], higher_is_better=True)


def test_gain_is_paired_and_positive_where_the_second_is_better():
    before, after = [3.0, 2.0, 4.0], [2.5, 1.0, 3.9]  # losses fall by 0.5, 1.0, 0.1
    found = gain(before, after, higher_is_better=False)
    mean = 1.6 / 3
    half = 4.302653 * np.std([0.5, 1.0, 0.1], ddof=1) / math.sqrt(3)
    assert found.mean == pytest.approx(mean)
    assert found.low == pytest.approx(mean - half, rel=1e-6)
    assert found.high == pytest.approx(mean + half, rel=1e-6)
    assert found.clients == 3


def test_one_client_says_nothing_of_the_others():
    assert gain([1.0], [2.0], higher_is_better=True) == Gain(1.0, -math.inf, math.inf, 1)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    # Tables of Student's t, two-sided 95 %.
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (9, 2.262157), (30, 2.042272), (116, 1.980626)],
)
def test_students_quantile_is_the_tables(freedom, quantile):
    assert student(freedom) == pytest.approx(quantile, rel=2e-3 if freedom == 3 else 1e-5)


def test_share_better_is_strict():
    assert share_better([1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 0.5, 3.0], higher_is_better=True) == 0.5
    assert share_better([1.0, 1.0], [0.9, 1.0], higher_is_better=False) == 0.5


def test_an_interval_is_students_over_the_values():
    found = interval([1.0, 2.0, 6.0])  # mean 3, variance 7
    half = 4.302653 * math.sqrt(7 / 3)
    assert (found.mean, found.count) == (3.0, 3)
    assert found.low == pytest.approx(3 - half, rel=1e-6)  # the quantile's digits
    assert found.high == pytest.approx(3 + half, rel=1e-6)
    assert interval([2.0]).as_dict() == {"mean": 2.0, "low": None, "high": None, "count": 1}
    with pytest.raises(DataError, match="at least one value"):
        interval([])


FEW = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)  # with many ties


@given(FEW, FEW)
def test_auc_is_the_share_of_pairs_in_order(positive, negative):
    assert auc(positive, negative) == pytest.approx(auc_of_pairs(positive, negative), abs=1e-12)


def test_auc_of_scores_that_tell_all_nothing_or_the_contrary():
    assert auc([3.0, 2.5], [1.0, 2.0, -math.inf]) == 1.0
    assert auc([1.0, 1.0], [1.0, 1.0, 1.0]) == 0.5
    assert auc([0.0], [1.0, math.inf]) == 0.0


@pytest.mark.parametrize(("positive", "negative"), [([], [1.0]), ([1.0], []), ([math.nan], [1.0])])
def test_auc_of_nothing_is_refused(positive, negative):
    with pytest.raises(DataError, match="auc: expected positive and negative scores without NaN"):
        auc(positive, negative)
