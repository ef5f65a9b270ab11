"""A lower bound on epsilon from one run, by guessing who was in it (arXiv:2305.08846, Theorem 5.2).

Each of `examples` canaries was put in or left out by a fair coin. The auditor looks at the result,
guesses about some of them, and abstains from the others. Were the mechanism (epsilon, delta)-DP, so
many right guesses would be unlikely; the largest epsilon for which they are is the bound.
"""

from __future__ import annotations

import math

import numpy as np

from fedlora.errors import ConfigError
from fedlora.low_rank import Matrix

__all__ = ["audited_epsilon", "p_value"]

_STEPS = 60  # halvings of an interval of one: beyond what float64 tells apart


def audited_epsilon(
    examples: int, guesses: int, correct: int, delta: float, *, significance: float = 0.05
) -> float:
    """Return the epsilon that the mechanism has at least, with confidence 1 - `significance`.

    examples: canaries, each put in by a fair coin. guesses: about how many of them the auditor
    spoke. correct: how often it was right. 0.0 where the guesses prove nothing.

    Raises `ConfigError` for counts that cannot be.

    >>> round(audited_epsilon(1000, 100, 95, 1e-5), 6)
    2.165176
    """
    if not 0 <= correct <= guesses <= examples:
        raise ConfigError(
            "examples, guesses, correct: expected 0 <= correct <= guesses <= examples, found "
            f"{examples}, {guesses}, {correct}"
        )
    if not 0 <= delta < 1 or not 0 < significance < 1:
        raise ConfigError(
            "delta, significance: expected 0 <= delta < 1 and 0 < significance < 1, found "
            f"{delta!r} and {significance!r}"
        )
    if not guesses:
        return 0.0
    choices = _log_choices(guesses)

    def refuted(epsilon: float) -> bool:
        return _p_value(choices, examples, correct, delta, epsilon) < significance

    if not refuted(0.0):
        return 0.0
    high = 1.0
    while refuted(high):
        high += 1.0
    low = high - 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def p_value(examples: int, guesses: int, correct: int, delta: float, epsilon: float) -> float:
    """Return how likely so many right guesses are at most, under (epsilon, delta)-DP.

    ``P[Bin(r, q) >= v] + 2 m delta max_i (1/i) sum_{j=1..i} P[Bin(r, q) = v - j]`` with
    ``q = 1 / (1 + exp(-epsilon))``, m examples, r guesses and v of them correct.
    """
    return _p_value(_log_choices(guesses), examples, correct, delta, epsilon)


def _log_choices(guesses: int) -> Matrix:
    """Return ``log(r! / (k! (r - k)!))`` for k = 0..r; they are the same for every epsilon."""
    steps = np.log(np.arange(1, guesses + 1))
    logs = np.concatenate([[0.0], np.cumsum(steps)])
    found: Matrix = logs[-1] - logs - logs[::-1]
    return found


def _p_value(choices: Matrix, examples: int, correct: int, delta: float, epsilon: float) -> float:
    guesses = len(choices) - 1
    right = np.arange(guesses + 1)
    # log q and log(1 - q) without rounding one of them to zero
    log_q, log_rest = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    chances = np.exp(choices + right * log_q + (guesses - right) * log_rest)
    p = float(chances[correct:].sum())
    if delta and correct:
        below = np.cumsum(chances[:correct][::-1])  # P[v - i <= Bin <= v - 1] for i = 1..v
        p += 2 * examples * delta * float((below / np.arange(1, correct + 1)).max())
    return min(p, 1.0)
