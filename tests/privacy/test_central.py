"""What a server releases: the noise that the ledger says, whoever answers, and for nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from fedlora.errors import ConfigError
from fedlora.privacy import PrivacyConfig
from fedlora.privacy.central import CentralMechanism, PrivacyState, draw_members, event_of
from fedlora.privacy.local import LocalNoise, NoiseLimits, local_event
from tests.matching import raises

SECRET = bytes(range(32))
N = 100_000


def test_the_noise_of_a_sum_is_z_times_c() -> None:
    mechanism = CentralMechanism(SECRET, 1.3, 0.7, denominator=50)
    noise = mechanism.release(np.zeros(N), 1) * 50
    # The standard error of a standard deviation of 1e5 numbers is 0.22 %.
    assert noise.std() == pytest.approx(1.3 * 0.7, rel=0.01)
    assert abs(noise.mean()) < 4 * 0.91 / N**0.5


def test_an_adaptive_norm_has_more_noise_on_its_sum() -> None:
    mechanism = CentralMechanism(SECRET, 2.0, 0.7, denominator=50, target_quantile=0.5)
    noise = mechanism.release(np.zeros(N), 1, 0) * 50
    expected = (2.0**-2 - 5.0**-2) ** -0.5 * 0.7
    assert noise.std() == pytest.approx(expected, rel=0.01)
    shares = [mechanism.share_below(np.zeros(1), round, 25, 50) for round in range(2000)]
    # Half of the cohort is below; the noise on the count is 50 / 20, so 0.05 on the share.
    # The standard error of a standard deviation of 2,000 numbers is 1.6 %.
    assert np.std(shares) == pytest.approx(0.05, rel=0.07)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.005)


def test_a_round_done_again_has_the_same_noise_and_any_other_has_its_own() -> None:
    mechanism = CentralMechanism(SECRET, 1.0, 1.0, denominator=10)
    total = np.linspace(-1, 1, N)
    first = mechanism.release(total, 3, 4)
    assert np.array_equal(first, mechanism.release(total.copy(), 3, 4))
    nearly = total.copy()
    nearly[0] = np.nextafter(nearly[0], 2)
    others = {
        "round": mechanism.release(total, 4, 4),
        "sum": mechanism.release(nearly, 3, 4),
        "count": mechanism.release(total, 3, 5),
        "norm": CentralMechanism(SECRET, 1.0, 2.0, denominator=10).release(total, 3, 4),
        "secret": CentralMechanism(bytes(32), 1.0, 1.0, denominator=10).release(total, 3, 4),
    }
    noise = first * 10 - total
    for name, other in others.items():
        # The standard error of a correlation of 1e5 pairs is 0.003.
        assert abs(np.corrcoef(noise, other * 10 - total)[0, 1]) < 0.015, name


def test_poisson_draws_everyone_alone_and_fixed_draws_so_many() -> None:
    sizes, times = [], np.zeros(200)
    for round in range(400):
        drawn = draw_members(SECRET, round, 200, 20, "poisson")
        sizes.append(len(drawn))
        times[list(drawn)] += 1
    # Binomial(200, 0.1): mean 20, variance 18; the mean of 400 has a standard error of 0.2.
    assert np.mean(sizes) == pytest.approx(20, abs=1)
    assert np.var(sizes) == pytest.approx(18, rel=0.3)
    # Binomial(400, 0.1) each: 40 +- 6.
    assert times.min() > 15
    assert times.max() < 68
    fixed = [draw_members(SECRET, round, 200, 20, "fixed") for round in range(50)]
    assert all(len(set(drawn)) == 20 and sorted(drawn) == list(drawn) for drawn in fixed)
    assert len(set(fixed)) == 50
    assert draw_members(SECRET, 1, 5, 20, "fixed") == (0, 1, 2, 3, 4)
    assert draw_members(SECRET, 1, 5, 20, "poisson") == (0, 1, 2, 3, 4)
    assert draw_members(SECRET, 1, 0, 20, "poisson") == ()
    assert draw_members(SECRET, 7, 200, 20, "fixed") != draw_members(bytes(32), 7, 200, 20, "fixed")


def test_a_round_costs_what_its_sampling_says() -> None:
    poisson = event_of(1.0, 1000, 100, "poisson")
    assert (poisson.sampling, poisson.sampling_probability) == ("poisson", 0.1)
    assert event_of(1.0, 50, 100, "poisson").sampling_probability == 1.0
    fixed = event_of(1.0, 1000, 100, "fixed")
    assert (fixed.cohort, fixed.population) == (100, 1000)
    assert fixed.neighboring_relation == "replace-one"
    everyone = event_of(1.0, 100, 100, "fixed")
    assert (everyone.sampling, everyone.noise_multiplier) == ("all", 1.0)
    # Once others have joined: nothing is gained by drawing, and one takes another's place.
    joined = event_of(1.0, 120, 100, "fixed", everyone.neighboring_relation)
    assert (joined.sampling, joined.noise_multiplier) == ("all", 0.5)
    # Nobody leaves the population; the relation of a run stays what it was all the same.
    again = event_of(1.0, 90, 100, "fixed", fixed.neighboring_relation)
    assert (again.sampling, again.cohort, again.population) == ("fixed", 90, 90)


def test_a_cohort_too_small_for_an_adaptive_norm_is_refused_before_the_run() -> None:
    config = PrivacyConfig(0.5, noise_multiplier=2.0, target_quantile=0.5)
    with raises(ConfigError, "privacy.target_quantile", "a larger cohort"):
        CentralMechanism.of(SECRET, config, PrivacyState(2.0, 0.5), cohort=10)


def test_a_device_clips_and_noises_its_own_update() -> None:
    noise = LocalNoise(0.5, 2.0)
    update = np.zeros(N)
    update[0] = 1000.0
    found = noise.applied(update, SECRET)
    # One noise number is 1; the first of a thousand is clipped to 0.5.
    assert abs(found[0]) < 6
    assert found[1:].std() == pytest.approx(1.0, rel=0.01)
    event = local_event(2.0, 3)
    assert (event.neighboring_relation, event.sampling_probability) == ("replace-one", 1.0)
    assert event.count == 3


def test_an_owner_gets_no_less_noise_than_the_owner_wants() -> None:
    ordered = LocalNoise(0.5, 1.0)
    assert NoiseLimits().agreed(ordered) == ordered
    assert NoiseLimits().agreed(None) is None
    assert NoiseLimits(2.0, 0.1).agreed(ordered) == LocalNoise(0.1, 2.0)
    assert NoiseLimits(0.5, 3.0).agreed(ordered) == ordered
    for limits in (NoiseLimits(1.0), NoiseLimits(0.0, 0.1)):
        with raises(ConfigError, "this device's owner demands local noise"):
            limits.agreed(None)
