"""What events cost: published values, laws, calibration, and how many rounds fit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import ConfigError
from fedlora.privacy import PrivacyEvent, accounting
from fedlora.privacy.accounting import (
    accountant_used,
    calibrate,
    delta_of,
    epsilon_of,
    grouped,
    neighboring_relation,
)
from tests.matching import raises
from tests.reference import accounting as slow

VECTORS = Path(__file__).resolve().parents[1] / "golden" / "dp_vectors.jsonl"


def poisson(q: float, z: float, count: int = 1) -> PrivacyEvent:
    return PrivacyEvent(z, "poisson", q, count=count)


def everyone(z: float, count: int = 1) -> PrivacyEvent:
    return PrivacyEvent(z, "all", count=count)


def fixed(population: int, cohort: int, z: float, count: int = 1) -> PrivacyEvent:
    return PrivacyEvent(z, "fixed", cohort / population, cohort, population, count)


def vectors() -> list[dict[str, Any]]:
    """Return the lines that are cases; the file keeps two lines of an error message and an end."""
    lines = VECTORS.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


POISSON = [case for case in vectors() if "pld" in case]
FIXED = [case for case in vectors() if case.get("kind", "").startswith("fixed-size")]
QUICK = {(0.001, 1.0), (1.0, 10.0)}  # (q, z): under half a second each


def case_id(case: dict[str, Any]) -> str:
    return f"{case['q']:.3g}-{case['z']}-{case['T']}"


def marked(case: dict[str, Any]) -> Any:
    slow_one = (case["q"], case["z"]) not in QUICK
    return pytest.param(case, id=case_id(case), marks=pytest.mark.slow if slow_one else ())


@pytest.mark.parametrize("case", [marked(case) for case in POISSON])
def test_pld_gives_the_published_values(case: dict[str, Any]) -> None:
    events = [poisson(case["q"], case["z"], case["T"])]
    assert epsilon_of(events, case["delta"]) == pytest.approx(case["pld"], abs=1e-4)


@pytest.mark.parametrize("case", [marked(case) for case in POISSON])
def test_rdp_gives_the_published_values(case: dict[str, Any]) -> None:
    events = [poisson(case["q"], case["z"], case["T"])]
    assert epsilon_of(events, case["delta"], "rdp") == pytest.approx(case["rdp"], abs=1e-4)


def test_there_are_as_many_vectors_as_the_file_has() -> None:
    assert (len(POISSON), len(FIXED)) == (10, 2)


@pytest.mark.parametrize("accountant", ["pld", "exact"])
def test_everyone_at_ten_times_the_noise_a_hundred_times(accountant: str) -> None:
    found = epsilon_of([everyone(10, 100)], 1e-5, accountant)
    # 1e-6 for the closed form; the grid of pld adds some 1e-9 here
    assert found == pytest.approx(4.377178095681224, abs=1e-6)


# Replacing a person moves the sum by two clipping norms, so with the noise multiplier relative to
# the clipping norm a published multiplier (relative to the sensitivity) is half of ours.
@pytest.mark.parametrize(
    "case",
    [pytest.param(FIXED[0], marks=pytest.mark.slow), FIXED[1]],
    ids=lambda case: f"{case['n']}-{case['k']}",
)
def test_a_fixed_cohort_costs_the_published_value_at_twice_its_multiplier(
    case: dict[str, Any],
) -> None:
    events = [fixed(case["n"], case["k"], 2 * case["z"], case["T"])]
    assert epsilon_of(events, case["delta"]) == pytest.approx(case["eps"], abs=1e-4)
    assert accountant_used(events) == "rdp"
    assert neighboring_relation(events) == "replace-one"


@pytest.mark.slow
def test_a_fixed_cohort_is_never_reported_below_what_two_data_sets_show() -> None:
    # All others at +C; one at +C or at -C. Where that one is drawn, the sum differs by 2 C; where
    # not, it is the same, k C. So these two data sets are a Gaussian of the multiplier z / 2 that
    # is hit with the probability k / n: what pld computes for Poisson sampling bounds replace-one
    # from below. An accountant that forgot the two would say 14.05.
    shown = epsilon_of([poisson(0.1, 1 / 2, 100)], 1e-5)
    assert shown == pytest.approx(31.371, abs=1e-3)
    assert epsilon_of([fixed(1000, 100, 1.0, 100)], 1e-5) > shown


def test_a_fixed_cohort_of_everyone_is_a_gaussian_of_twice_the_sensitivity() -> None:
    expected = epsilon_of([everyone(5, 4)], 1e-5, "exact")
    for accountant in ("pld", "exact"):
        assert accountant_used([fixed(7, 7, 10, 4)], accountant) == accountant
        found = epsilon_of([fixed(7, 7, 10, 4)], 1e-5, accountant)
        assert found == pytest.approx(expected, abs=1e-6)


def test_no_noise_has_no_bound_and_no_release_costs_nothing() -> None:
    for accountant in ("pld", "rdp", "exact"):
        assert epsilon_of([everyone(0)], 1e-5, accountant) == math.inf
        assert delta_of([everyone(0)], 3.0, accountant) == 1.0
        for free in (everyone(0, 0), poisson(0, 0), everyone(math.inf)):
            assert epsilon_of([free], 1e-5, accountant) == 0.0
            assert delta_of([free], 0.0, accountant) == 0.0
        assert epsilon_of([], 1e-5, accountant) == 0.0
    # What is not drawn with a probability is not free, whatever stands in that field.
    assert epsilon_of([PrivacyEvent(1.0, "all", 0.0)], 1e-5, "exact") > 4
    assert epsilon_of([PrivacyEvent(2.0, "fixed", 0.0, 9, 9)], 1e-5, "exact") > 4


def test_equal_events_are_one_group() -> None:
    events = [poisson(0.1, 1), everyone(2), poisson(0.1, 1, 3), poisson(0.2, 1), everyone(2, 0)]
    assert set(grouped(events)) == {poisson(0.1, 1, 4), everyone(2), poisson(0.2, 1)}
    assert grouped(events) == grouped(reversed(events))


def test_rounds_cost_what_they_cost_composed_one_by_one() -> None:
    events = [poisson(0.01, 4.0, 4), poisson(0.02, 6.0, 2)]
    split = [poisson(0.01, 4.0)] * 3 + [poisson(0.02, 6.0, 2), poisson(0.01, 4.0)]
    found = epsilon_of(events, 1e-5)
    assert epsilon_of(split, 1e-5) == found  # bit for bit: the same groups
    # 1e-6: the truncated tails of six convolutions against those of two powers
    assert found == pytest.approx(slow.epsilon_by_rounds(events, 1e-5), abs=1e-6)


PROBABILITY = st.floats(0.001, 0.5)
NOISE = st.floats(3.0, 20.0)  # less noise takes longer, and is in the vectors
COUNT = st.integers(1, 500)
LAWS = settings(max_examples=4, deadline=None)


@LAWS
@given(PROBABILITY, NOISE, COUNT, st.floats(1.01, 3.0))
def test_more_rounds_cost_more_and_more_noise_and_rarer_draws_less(
    q: float, z: float, count: int, factor: float
) -> None:
    cost = epsilon_of([poisson(q, z, count)], 1e-5, "rdp")
    assert epsilon_of([poisson(q, z, count + 1)], 1e-5, "rdp") >= cost
    assert epsilon_of([poisson(q, z * factor, count)], 1e-5, "rdp") <= cost
    # rdp only bounds: where its series fails at an order, the bound may move by a thousandth
    assert epsilon_of([poisson(q / factor, z, count)], 1e-5, "rdp") <= cost * 1.001


def test_more_rounds_cost_more_and_more_noise_and_rarer_draws_less_by_pld() -> None:
    cost = epsilon_of([poisson(0.05, 4.0, 50)], 1e-5)
    assert epsilon_of([poisson(0.05, 4.0, 51)], 1e-5) > cost
    assert epsilon_of([poisson(0.05, 4.2, 50)], 1e-5) < cost
    assert epsilon_of([poisson(0.04, 4.0, 50)], 1e-5) < cost
    assert cost <= epsilon_of([poisson(0.05, 4.0, 50)], 1e-5, "rdp")
    assert cost <= epsilon_of([everyone(4.0, 50)], 1e-5, "exact")


@LAWS
@given(st.lists(st.tuples(NOISE, COUNT), min_size=1, max_size=4), st.floats(1e-9, 0.1))
def test_gaussians_compose_to_a_gaussian(parts: list[tuple[float, int]], delta: float) -> None:
    events = [everyone(z, count) for z, count in parts]
    mu = math.sqrt(sum(count / z**2 for z, count in parts))
    found = epsilon_of(events, delta, "exact")
    assert found == pytest.approx(epsilon_of([everyone(1 / mu)], delta, "exact"), rel=1e-9)
    # delta falls steeply where epsilon is large: its error is that of mu times its slope
    assert delta_of(events, found, "exact") == pytest.approx(delta, rel=1e-6)


def test_delta_and_epsilon_are_each_others_inverse() -> None:
    events = [poisson(0.05, 4.0, 50)]
    for accountant in ("pld", "rdp"):
        found = epsilon_of(events, 1e-5, accountant)
        assert delta_of(events, found, accountant) == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize(
    ("epsilon", "expected"),
    [(1, 0.69718), (2, 0.60702), (8, 0.40956)],
)
@pytest.mark.slow
def test_calibration_gives_the_published_multipliers(epsilon: float, expected: float) -> None:
    found = calibrate(epsilon, 1e-6, 1000, lambda z: poisson(0.001, z))
    assert found == pytest.approx(expected, rel=2e-4)  # 1e-4 from above, and five printed digits
    assert epsilon_of([poisson(0.001, found, 1000)], 1e-6) <= epsilon


@LAWS
@given(st.floats(0.05, 200.0), st.floats(1e-9, 0.01), st.integers(1, 10_000))
def test_calibration_is_tight_and_from_above(epsilon: float, delta: float, rounds: int) -> None:
    found = calibrate(epsilon, delta, rounds, everyone, "exact")
    assert epsilon_of([everyone(found, rounds)], delta, "exact") <= epsilon
    assert epsilon_of([everyone(found / (1 + 1.001e-4), rounds)], delta, "exact") > epsilon


@pytest.mark.slow
def test_calibration_for_a_fixed_cohort_counts_twice_the_sensitivity() -> None:
    found = calibrate(14.053751, 1e-5, 100, lambda z: fixed(1000, 100, z))
    assert found == pytest.approx(2.0, rel=2e-4)


def test_a_promise_that_no_noise_keeps_is_refused() -> None:
    with raises(ConfigError, "epsilon: 1e-12 cannot be kept by any noise"):
        calibrate(1e-12, 1e-300, 10_000, everyone, "exact")


def test_a_calibrated_run_never_costs_more_and_has_all_of_its_rounds_and_no_more() -> None:
    found = calibrate(0.2, 1e-5, 20, lambda z: poisson(0.05, z))
    event = poisson(0.05, found)
    assert epsilon_of([replace(event, count=20)], 1e-5) <= 0.2
    assert epsilon_of([poisson(0.05, found / (1 + 1.001e-4), 20)], 1e-5) > 0.2

    # A twentieth more rounds cost more than the ten-thousandth of slack.
    assert epsilon_of([replace(event, count=21)], 1e-5) > 0.2


REFUSED = {
    "unknown accountant": (lambda: epsilon_of([], 1e-5, "prv"), "accountant", "pld, rdp, exact"),
    "delta of zero": (lambda: epsilon_of([], 0.0), "delta", "(0, 1)"),
    "delta of one": (lambda: epsilon_of([], 1.0), "delta", "(0, 1)"),
    "delta nan": (lambda: epsilon_of([], math.nan), "delta", "(0, 1)"),
    "epsilon below zero": (lambda: delta_of([], -1.0), "epsilon", ">= 0"),
    "exact of a drawn cohort": (
        lambda: epsilon_of([poisson(0.1, 1)], 1e-5, "exact"), "exact", "everyone", "0.1",
    ),
    "two relations": (
        lambda: epsilon_of([poisson(0.1, 1), fixed(9, 3, 1)], 1e-5), "one neighboring relation",
    ),
    "two relations, one free": (
        lambda: epsilon_of([poisson(0.1, 1, 0), fixed(9, 3, 1)], 1e-5), "neighboring relation",
    ),
    "no rounds": (lambda: calibrate(1.0, 1e-5, 0, everyone), "rounds", ">= 1"),
    "no epsilon": (lambda: calibrate(0.0, 1e-5, 1, everyone), "epsilon", "> 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused(name: str) -> None:
    call, *texts = REFUSED[name]
    with raises(ConfigError, *texts):
        call()


def test_tiny_noise_ends_in_a_large_number_and_not_in_a_crash() -> None:
    assert accountant_used([poisson(0.01, 1e-5)]) == "exact"
    found = epsilon_of([poisson(0.01, 1e-5)], 1e-5)
    assert found == pytest.approx(0.5e10, rel=1e-3)
    assert calibrate(1e6, 1e-5, 1, everyone, "exact") < 1e-2


def test_rdp_keeps_dp_accountings_warnings_of_single_orders_to_itself(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    accounting._divergence.cache_clear()
    epsilon_of([poisson(0.1, 1.0)], 1e-5, "rdp")
    assert caplog.records == []
    assert capfd.readouterr().err == ""
    with caplog.at_level("WARNING"):  # what it says otherwise
        RdpAccountant().compose(PoissonSampledDpEvent(0.1, GaussianDpEvent(1.0)))
    assert "failed to converge" in caplog.text or "failed to converge" in capfd.readouterr().err


def test_a_negative_divergence_never_passes_for_no_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = epsilon_of([poisson(0.07, 1.3, 9)], 1e-5, "rdp")
    accounting._divergence.cache_clear()
    true = RdpAccountant.rdp.fget

    def broken(self: RdpAccountant) -> Any:
        return np.where(self.orders == 64, -1e-9, true(self))

    monkeypatch.setattr(RdpAccountant, "rdp", property(broken))
    assert epsilon_of([poisson(0.07, 1.3, 9)], 1e-5, "rdp") >= honest > 0.5
    accounting._divergence.cache_clear()
