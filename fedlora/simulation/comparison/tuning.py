"""The learning rate of one method at one grid point: a ladder, and more at its edge.

Every method gets the same budget: the same ladder, and the same number of further values at most,
one at a time, for as long as the best is the first or the last. It is then inside, or the result
says that it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedlora.simulation.comparison.plan import Tuning
from fedlora.simulation.comparison.runs import Result

__all__ = ["Tried", "Tuned", "ladder", "tune"]


@dataclass(frozen=True, slots=True)
class Tried:
    """One learning rate. Without `score` it has diverged, which is the worst."""

    learning_rate: float
    score: float | None = None  # the task's metric on the validation parts, mean over clients
    loss: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Tuned:
    """The best of what was tried, in ascending order; `at_edge`: it is the first or the last."""

    method: str
    point: int
    learning_rate: float
    tried: tuple[Tried, ...]
    at_edge: bool


def ladder(center: float, tuning: Tuning) -> list[float]:
    """Return `tuning.values` learning rates around `center`, ascending, with three digits.

    >>> ladder(5e-3, Tuning(seed=1))
    [0.0005, 0.00158, 0.005, 0.0158, 0.05]
    """
    first = -((tuning.values - 1) // 2)
    return [rounded(center * tuning.factor ** (first + k)) for k in range(tuning.values)]


def rounded(value: float) -> float:
    """Return a learning rate as it is shown."""
    return float(f"{value:.3g}")


def tune(
    method: str,
    point: int,
    center: float,
    tuning: Tuning,
    run: Callable[[float], Result],
) -> Tuned:
    """Return the learning rate whose run has the best metric, and of equal ones the lower loss.

    run: the result of the tuning run with that learning rate. center: the experiment's own.
    """
    results = {rate: run(rate) for rate in ladder(center, tuning)}
    for _ in range(tuning.extra):
        best, rates = _best(results, tuning.on), sorted(results)
        if best not in (rates[0], rates[-1]):
            break
        further = best / tuning.factor if best == rates[0] else best * tuning.factor
        results[rounded(further)] = run(rounded(further))
    best, rates = _best(results, tuning.on), sorted(results)
    return Tuned(
        method,
        point,
        best,
        tuple(_tried(rate, results[rate], tuning.on) for rate in rates),
        at_edge=best in (rates[0], rates[-1]),
    )


def _best(results: Mapping[float, Result], adapter: str) -> float:
    """Return the best rate, the lowest one where all have diverged."""

    def key(rate: float) -> tuple[float, float]:
        result = results[rate]
        if not result.is_done:
            return math.inf, math.inf
        score = result.scores[adapter]
        return (-score.mean if result.higher_is_better else score.mean), score.loss

    return min(sorted(results), key=key)


def _tried(rate: float, result: Result, adapter: str) -> Tried:
    if not result.is_done:
        return Tried(rate, reason=result.reason)
    return Tried(rate, result.scores[adapter].mean, result.scores[adapter].loss)
