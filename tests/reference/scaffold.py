"""SCAFFOLD (arXiv:1910.06378, algorithm 1, option II) and FedAvg as loops over vectors, float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Vector = np.ndarray
Gradient = Callable[[Vector], Vector]


def scaffold(
    gradients: Sequence[Gradient],
    x: Vector,
    cohorts: Sequence[Sequence[int]],
    steps: int,
    rate: float,
    shares: Sequence[float] | None = None,
) -> tuple[Vector, Vector, list[Vector]]:
    """Return x, c and every c_k after a round a cohort; `shares` of the clients sum to 1.

    The server's own rate is 1. With equal shares each line is the paper's.
    """
    count = len(gradients)
    p = np.full(count, 1 / count) if shares is None else np.asarray(shares)
    c = np.zeros_like(x)
    own = [np.zeros_like(x) for _ in gradients]
    for cohort in cohorts:
        moves, changes = [], []
        for k in cohort:
            y = x.copy()
            for _ in range(steps):
                y = y - rate * (gradients[k](y) - own[k] + c)
            following = own[k] - c + (x - y) / (steps * rate)
            moves.append(y - x)
            changes.append(following - own[k])
            own[k] = following
        drawn = sum(p[k] for k in cohort)
        x = x + sum(p[k] / drawn * move for k, move in zip(cohort, moves, strict=True))
        c = c + sum(p[k] * change for k, change in zip(cohort, changes, strict=True))
    return x, c, own


def fedavg(
    gradients: Sequence[Gradient], x: Vector, rounds: int, steps: int, rate: float
) -> Vector:
    """Return x after `rounds` with every client in each, equally weighted."""
    for _ in range(rounds):
        ends = []
        for gradient in gradients:
            y = x.copy()
            for _ in range(steps):
                y = y - rate * gradient(y)
            ends.append(y)
        x = np.mean(ends, axis=0)
    return x


def quadratics(
    centres: Sequence[Vector], curvatures: Sequence[float]
) -> tuple[list[Gradient], Callable[[Sequence[float]], Vector]]:
    """Return the gradients of ``h_k / 2 |x - m_k|^2``, and the weighted mean of the centres."""

    def gradient(h: float, m: Vector) -> Gradient:
        return lambda x: h * (x - m)

    def centre(weights: Sequence[float]) -> Vector:
        w = np.asarray(weights) / np.sum(weights)
        return sum(share * m for share, m in zip(w, centres, strict=True))

    return [gradient(h, m) for h, m in zip(curvatures, centres, strict=True)], centre
