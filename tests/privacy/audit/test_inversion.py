"""What a single step's change says of its inputs; gradients by their formula, no torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.privacy.audit import best_match, leading_inputs, seen_through, share_in_span
from fedlora.randomness import rng

IN, OUT, RANK = 128, 32, 8


def step(count: int, *, B: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """Return inputs, A, and the changes of A and of B after one step on so many inputs."""
    draws = rng(0, "step", count)
    x, g = draws.normal(size=(count, IN)), draws.normal(size=(count, OUT))
    A = draws.normal(size=(RANK, IN))
    B = draws.normal(size=(OUT, RANK)) if B is None else B
    return x, A, (g @ B).T @ x, g.T @ (x @ A.T)


def test_one_input_is_the_top_singular_vector() -> None:
    x, _, dA, _ = step(1)
    assert best_match(leading_inputs(dA), x) == pytest.approx(1.0, abs=1e-12)  # exact algebra


def test_zero_b_says_nothing() -> None:
    x, _, dA, _ = step(1, B=np.zeros((OUT, RANK)))
    assert not dA.any()
    assert leading_inputs(dA).shape == (0, IN)
    assert best_match(leading_inputs(dA), x) == 0.0
    assert share_in_span(dA, x) == 0.0


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, RANK))
def test_up_to_rank_inputs_lie_in_the_row_space(count: int) -> None:
    x, _, dA, _ = step(count)
    assert share_in_span(dA, x) == pytest.approx(1.0, abs=1e-6)  # but for small singular values


def test_more_inputs_than_the_rank_do_not() -> None:
    x, _, dA, _ = step(10 * RANK)
    # The row space has RANK directions; the inputs made it, so a little over chance.
    assert math.sqrt(RANK / IN) < share_in_span(dA, x) < 0.5


def test_frozen_a_leaks_what_it_lets_through() -> None:
    x, A, _, dB = step(1)
    recovered = seen_through(A, leading_inputs(dB))
    through = np.linalg.pinv(A) @ (A @ x[0])
    assert best_match(recovered, through[None]) == pytest.approx(1.0, abs=1e-9)
    expected = np.linalg.norm(through) / np.linalg.norm(x)
    assert best_match(recovered, x) == pytest.approx(expected, abs=1e-9)
    assert 0.1 < expected < 0.45  # sqrt(8 / 128) = 0.25 on average


def test_noise_over_the_update_hides_the_input() -> None:
    x, _, dA, _ = step(1)
    noisy = dA / np.linalg.norm(dA) + rng(0, "noise").normal(0, 1.0, dA.shape)
    assert best_match(leading_inputs(noisy), x) < 4 / math.sqrt(IN)  # four deviations of chance


def test_rows_without_direction_are_left_out() -> None:
    assert best_match(np.zeros((1, 3)), np.ones((1, 3))) == 0.0
    assert share_in_span(np.ones((1, 3)), np.zeros((2, 3))) == 0.0
