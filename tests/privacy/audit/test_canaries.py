"""Canaries in the pure mechanism: the estimate where it is right, and where something is broken."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedlora.errors import ConfigError
from fedlora.low_rank import Matrix
from fedlora.privacy.audit import Canaries, Trace, estimate_epsilon
from fedlora.privacy.audit.canaries import OVER
from fedlora.privacy.exact import gaussian_epsilon
from fedlora.randomness import rng

SIZE, COUNT, DELTA, NORM = 8_000, 150, 1e-6, 0.3
CANARIES = Canaries(COUNT, b"secret of a run" * 2)


def clipped(update: Matrix) -> Matrix:
    """What a server makes of an update: at most `NORM` long."""
    length = math.sqrt(np.einsum("i,i->", update, update))
    return update * min(1.0, NORM / length)


def release(
    noise_multiplier: float,
    *,
    rounds: int = 1,
    canaries: Canaries = CANARIES,
    size: int = SIZE,
    kinds: tuple[str, ...] = ("B",),
    clip: bool = True,
    probability: float = 1.0,
    seed: int = 0,
) -> Trace:
    """Run the mechanism with canaries alone; kinds of rows take turns."""
    noise, draws = rng(seed, "noise"), rng(seed, "draws")
    trace, every = Trace({}), {}
    if probability == 1:
        for kind in kinds:
            updates = canaries.updates(canaries.ids, kind, size, NORM)
            every[kind] = sum(map(clipped, updates) if clip else updates, np.zeros(size))
    for round in range(rounds):
        kind = kinds[round % len(kinds)]
        if probability == 1:
            total = every[kind]
        else:
            drawn = [c for c in canaries.ids if draws.random() < probability]
            total = sum(map(clipped, canaries.updates(drawn, kind, size, NORM)), np.zeros(size))
        total = total + noise.normal(0, noise_multiplier * NORM, size)
        trace = trace.after(kind, total, NORM)
    return trace


@pytest.mark.slow  # ten seconds: 1,000 canaries in 50,000 dimensions, as published
@pytest.mark.parametrize(
    ("multiplier", "true", "published", "spread"),
    [(4.22, 1.001, 1.05, 0.14), (1.54, 3.008, 2.96, 0.07), (0.541, 10.002, 9.65, 0.19)],
)
def test_published_estimates(
    multiplier: float, true: float, published: float, spread: float
) -> None:
    assert gaussian_epsilon(1 / multiplier, DELTA) == pytest.approx(true, abs=1e-3)
    canaries = Canaries(1000, b"published")
    trace = release(multiplier, canaries=canaries, size=50_000)
    found = estimate_epsilon(canaries, trace, DELTA)
    # Two of our own deviations, which at epsilon 3 are over the published 0.07: theirs is of few
    # repetitions, 1 / sqrt(k) of the distance alone makes 0.16.
    assert abs(found.epsilon - published) <= 2 * found.spread
    assert spread / 3 < found.spread < 3 * spread


@pytest.mark.parametrize("epsilon_of", [4.22, 1.54, 0.541])
def test_estimate_is_within_its_spread_of_the_exact_epsilon(epsilon_of: float) -> None:
    """Two deviations, and what the canaries themselves add to the length of the sum."""
    found = estimate_epsilon(CANARIES, release(epsilon_of), DELTA)
    lengthened = math.sqrt(1 + COUNT / (epsilon_of**2 * SIZE))
    expected = gaussian_epsilon(1 / epsilon_of / lengthened, DELTA)
    assert abs(found.epsilon - expected) <= 2 * found.spread
    assert (found.canaries, found.size, found.delta) == (COUNT, SIZE, DELTA)


def test_many_rounds_compose() -> None:
    multiplier, rounds = 6.0, 16
    found = estimate_epsilon(CANARIES, release(multiplier, rounds=rounds), DELTA)
    exact = gaussian_epsilon(math.sqrt(rounds) / multiplier, DELTA)
    assert abs(found.epsilon - exact) <= 2 * found.spread + 0.05 * exact  # 0.05: k / (z^2 d)


def test_kinds_of_rows_that_take_turns_are_measured_together() -> None:
    """Six rounds of one factor and three of the other: as nine rounds of one."""
    trace = Trace({})
    for kind, rounds, size in (("A", 6, 15_000), ("B", 3, 5_000)):
        part = release(4.0, rounds=rounds, kinds=(kind,), size=size, seed=rounds)
        trace = Trace({**trace.sums, **part.sums})
    found = estimate_epsilon(CANARIES, trace, DELTA)
    exact = gaussian_epsilon(math.sqrt(9) / 4.0, DELTA)
    assert abs(found.epsilon - exact) <= 2 * found.spread + 0.1 * exact  # 0.1: k / (z^2 d) of B
    assert found.size == 20_000


def test_sampled_cohorts_give_a_lower_estimate() -> None:
    """The sum of the rounds shows a canary q T times, in the noise of T rounds."""
    canaries = Canaries(200, b"sampled")
    trace = release(1.0, rounds=40, canaries=canaries, size=4000, probability=0.1)
    found = estimate_epsilon(canaries, trace, DELTA)
    expected = 0.1 * 40 / math.sqrt(40)
    # 1/sqrt(200) from the noise, and as much again from how often each is drawn; 3 of them.
    assert found.distance == pytest.approx(expected, abs=3 * 0.1)


@pytest.mark.parametrize(
    ("fault", "kwargs"),
    [
        ("noise forgotten", {"noise_multiplier": 0.0}),
        ("noise a tenth", {"noise_multiplier": 0.154}),
        ("noise divided by the cohort", {"noise_multiplier": 1.54 / COUNT}),
        ("clipping forgotten", {"noise_multiplier": 1.54, "clip": False}),
    ],
)
def test_a_broken_mechanism_is_far_over_what_it_promises(
    fault: str, kwargs: dict[str, float | bool]
) -> None:
    promised = gaussian_epsilon(1 / 1.54, DELTA)
    found = estimate_epsilon(CANARIES, release(**kwargs), DELTA)  # type: ignore[arg-type]
    assert found.low > 2 * promised, fault


def test_without_their_updates_canaries_leave_no_trace() -> None:
    noise = Trace({"B": rng(0, "n").normal(size=SIZE)})
    assert abs(estimate_epsilon(CANARIES, noise, DELTA).distance) <= 3 / math.sqrt(COUNT)


def test_another_secret_finds_nothing() -> None:
    other = Canaries(COUNT, b"guessed")
    found = estimate_epsilon(other, release(0.541), DELTA)
    assert abs(found.distance) <= 3 / math.sqrt(COUNT)


def test_trace_survives_a_checkpoint_bit_for_bit() -> None:
    trace = release(1.0, rounds=2, canaries=Canaries(3, b"x"), size=50, kinds=("A", "B"))
    state = {**trace.to_state(), "momentum": np.ones(3)}
    again = Trace.of_state(state)
    assert again.sums.keys() == {"A", "B"}
    assert all(np.array_equal(again.sums[k], trace.sums[k]) for k in trace.sums)


def test_updates_are_of_the_canaries_alone_and_too_long() -> None:
    drawn = ("u1", CANARIES.ids[2], "u2")
    (update,) = CANARIES.updates(drawn, "B", 100, NORM)
    assert np.linalg.norm(update) == pytest.approx(OVER * NORM)
    assert np.allclose(update, OVER * NORM * CANARIES.direction(2, "B", 100))
    assert CANARIES.number_of("u1") is None


@pytest.mark.parametrize(
    ("canaries", "trace"),
    [(Canaries(0, b""), Trace({"B": np.ones(3)})), (CANARIES, Trace({"B": np.zeros(3)}))],
)
def test_nothing_to_estimate_from_is_refused(canaries: Canaries, trace: Trace) -> None:
    with pytest.raises(ConfigError, match="expected at least one, and a round with an update"):
        estimate_epsilon(canaries, trace, DELTA)
