"""Intervals and paired tests against values that were worked out by hand."""

import math

import pytest

from fedlora.simulation.comparison.runs import Result, Score
from fedlora.simulation.comparison.statistics import cell, difference, paired

T1, T2 = 12.706205, 4.302653  # 97.5 % quantiles of Student's t, 1 and 2 degrees of freedom


def result(values: dict[str, float], loss: float = 1.0, **changes) -> Result:
    """A run in which the clients' global adapters have these values."""
    mean = sum(values.values()) / len(values)
    return Result(
        **{
            "status": "done",
            "metric": "accuracy",
            "scores": {"global": Score(mean, loss)},
            "clients": {"global": values},
            "bytes_up": 100,
            "bytes_down": 200,
            "seconds": 3.0,
            **changes,
        }
    )


FAILED = Result("diverged", reason="round 3: NaN")


def test_pairs_have_the_students_interval_and_cohens_d():
    found = paired([1.0, 2.0, 6.0])  # mean 3, variance (4 + 1 + 9) / 2 = 7
    half = T2 * math.sqrt(7 / 3)
    assert found.interval.mean == 3.0
    assert found.interval.low == pytest.approx(3 - half, rel=1e-6)  # the quantile's digits
    assert found.interval.high == pytest.approx(3 + half, rel=1e-6)
    assert found.effect == pytest.approx(3 / math.sqrt(7))
    assert (found.wins, found.losses) == (3, 0)
    assert found.verdict == "no evidence"  # 3 - 6.57 is under 0


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([1.0, 1.1, 0.9], "better"),  # 1 ± 0.25
        ([-1.0, -1.1, -0.9], "worse"),
        ([0.0, 0.0], "no evidence"),  # equal in all
        ([5.0], "no evidence"),  # one pair has no interval
        ([1.0, 1.0], "better"),  # the same difference each time
    ],
)
def test_a_claim_needs_an_interval_without_zero(differences, verdict):
    assert paired(differences).verdict == verdict


def test_equal_differences_have_no_effect_size():
    assert paired([0.1 + 0.2, 0.3]).effect is None
    assert paired([2.0]).effect is None


def test_a_cell_is_the_mean_over_the_runs_that_are_done():
    runs = {0: result({"a": 0.5, "b": 0.7}), 1: result({"a": 0.7, "b": 0.9}, 3.0), 2: FAILED}
    found = cell("fedit", 0, runs)
    accuracy = found.adapters["global"].metric
    assert (accuracy.mean, accuracy.count) == (pytest.approx(0.7), 2)
    # Runs of 0.6 and 0.8: the standard deviation is 0.2/√2, the mean's 0.1.
    assert accuracy.high - accuracy.mean == pytest.approx(T1 * 0.1, rel=1e-6)
    assert found.adapters["global"].loss.mean == 2.0
    assert (found.bytes_up, found.bytes_down, found.seconds) == (100, 200, 3.0)
    assert (found.done, found.runs) == (2, 3)
    assert found.failures == ("seed 2 diverged: round 3: NaN",)


def test_a_cell_without_a_finished_run_has_no_means():
    found = cell("fedit", 0, {0: FAILED, 1: FAILED})
    assert (found.adapters, found.bytes_up, found.done) == ({}, None, 0)
    assert found.as_dict()["adapters"] == {}


def test_over_seeds_and_over_clients_are_two_questions():
    mine = {0: result({"a": 0.9, "b": 0.5}), 1: result({"a": 0.9, "b": 0.7})}
    other = {0: result({"a": 0.5, "b": 0.5}), 1: result({"a": 0.7, "b": 0.7})}
    found = difference("ffa-lora", "fedit", 0, "global", mine, other)
    assert found.over_seeds is not None
    assert found.over_clients is not None
    # Seeds: 0.7 - 0.5 and 0.8 - 0.7. Clients: a has 0.4 and 0.2, b nothing.
    assert found.over_seeds.interval.mean == pytest.approx(0.15)
    assert found.over_seeds.interval.high == pytest.approx(0.15 + T1 * 0.05, rel=1e-6)
    assert found.over_seeds.effect == pytest.approx(0.15 / (0.1 / math.sqrt(2)))
    assert found.over_clients.interval.mean == pytest.approx(0.15)
    assert found.over_clients.interval.high == pytest.approx(0.15 + T1 * 0.15, rel=1e-6)
    assert (found.over_clients.wins, found.over_clients.losses) == (1, 0)


def test_a_lower_loss_is_better():
    mine, other = (
        {s: result({"a": v}, higher_is_better=False) for s in (0, 1)} for v in (1.0, 2.0)
    )
    found = difference("ffa-lora", "fedit", 0, "global", mine, other)
    assert found.verdict == "better"
    assert found.over_seeds is not None
    assert found.over_seeds.interval.mean == 1.0


def test_only_seeds_that_both_have_finished_are_pairs():
    mine = {0: result({"a": 1.0}), 1: FAILED, 2: result({"a": 1.0})}
    other = {0: result({"a": 0.5}), 1: result({"a": 0.1}), 2: FAILED}
    found = difference("ffa-lora", "fedit", 0, "global", mine, other)
    assert found.over_seeds is not None
    assert (found.over_seeds.interval.mean, found.over_seeds.interval.count) == (0.5, 1)
    assert found.verdict == "no evidence"
    none = difference("ffa-lora", "fedit", 0, "global", {1: FAILED}, {1: FAILED})
    assert (none.over_seeds, none.verdict) == (None, "no evidence")


def test_a_client_counts_by_the_seeds_that_have_it_twice():
    """A seed may decide which clients there are."""
    mine = {0: result({"a": 1.0, "b": 1.0}), 1: result({"a": 1.0, "c": 1.0})}
    other = {0: result({"a": 0.0, "b": 0.5}), 1: result({"a": 0.5})}
    found = difference("ffa-lora", "fedit", 0, "global", mine, other)
    assert found.over_clients is not None
    assert found.over_clients.interval.count == 2  # a: 0.75, b: 0.5
    assert found.over_clients.interval.mean == pytest.approx(0.625)
