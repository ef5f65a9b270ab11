"""The one-run bound: the published vectors, the slow twin, and what it says of honest guesses."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import ConfigError
from fedlora.privacy.audit import audited_epsilon
from fedlora.privacy.audit.one_run import p_value
from fedlora.randomness import rng


@pytest.mark.parametrize(
    ("examples", "guesses", "correct", "delta", "expected"),
    [
        (100, 100, 100, 0.0, 3.492965),
        (1000, 100, 95, 1e-5, 2.165176),
        (1000, 1000, 750, 1e-5, 0.976367),
        (5000, 500, 500, 1e-5, 4.977758),
    ],
)
def test_published_values(
    examples: int, guesses: int, correct: int, delta: float, expected: float
) -> None:
    found = audited_epsilon(examples, guesses, correct, delta)
    assert found == pytest.approx(expected, abs=1e-6)  # the values are given to six digits


@settings(max_examples=60, deadline=None)
@given(
    guesses=st.integers(0, 60),
    share=st.floats(0, 1),
    delta=st.sampled_from([0.0, 1e-6, 1e-3]),
    epsilon=st.floats(0, 8),
)
def test_p_value_is_the_sum_written_out(
    guesses: int, share: float, delta: float, epsilon: float
) -> None:
    correct, examples = round(share * guesses), guesses + 7
    expected = p_value_written_out(examples, guesses, correct, delta, epsilon)
    # Both are sums of up to 61 rounded products.
    assert p_value(examples, guesses, correct, delta, epsilon) == pytest.approx(expected, rel=1e-10)


def p_value_written_out(m: int, r: int, v: int, delta: float, epsilon: float) -> float:
    """The formula, term by term."""
    q = 1 / (1 + math.exp(-epsilon))

    def chance(k: int) -> float:
        return math.comb(r, k) * q**k * (1 - q) ** (r - k)

    tail = sum(chance(k) for k in range(v, r + 1))
    means = [sum(chance(v - j) for j in range(1, i + 1)) / i for i in range(1, v + 1)]
    return min(1.0, tail + 2 * m * delta * max(means, default=0.0))


def test_guesses_no_better_than_a_coin_prove_nothing() -> None:
    assert audited_epsilon(1000, 1000, 500, 1e-5) == 0.0
    assert audited_epsilon(1000, 0, 0, 1e-5) == 0.0


def test_it_seldom_exceeds_the_epsilon_of_randomized_response() -> None:
    """Guessers who are right with probability q have epsilon exactly: over it in 5 % at most."""
    epsilon, trials = 1.5, 400
    right = rng(0, "guesses").binomial(300, 1 / (1 + math.exp(-epsilon)), trials)
    over = sum(audited_epsilon(300, 300, int(count), 0.0) > epsilon for count in right)
    assert over <= 0.05 * trials + 3 * math.sqrt(0.05 * 0.95 * trials)  # three deviations


@pytest.mark.parametrize("counts", [(10, 11, 5), (10, 5, 6), (10, 5, -1)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="expected 0 <= correct <= guesses <= examples"):
        audited_epsilon(*counts, 1e-5)
