"""The robust rules as their papers write them: dense products, plain loops."""

from __future__ import annotations

import math
import statistics

import numpy as np

from fedlora.adapter import Adapter


def delta(layer: object) -> np.ndarray:
    """s B A as a matrix, float64."""
    b, a = layer.B.astype(np.float64), layer.A.astype(np.float64)  # type: ignore[attr-defined]
    return np.asarray(layer.scaling * (b @ a.reshape(len(a), -1)))  # type: ignore[attr-defined]


def change_norm(sent: Adapter, got: Adapter) -> float:
    """Frobenius norm of the change of the products over all layers."""
    return math.sqrt(sum(np.sum((delta(got[p]) - delta(sent[p])) ** 2) for p in sent))


def reach(sent: Adapter, got: Adapter) -> tuple[float, float]:
    """First order and the rest of what an update can change, from dense matrices."""
    lines, curves = 0.0, 0.0
    for path in sent:
        before, after = sent[path], got[path]
        a0, a = (x.A.astype(np.float64).reshape(len(x.A), -1) for x in (before, after))
        b0, b = before.B.astype(np.float64), after.B.astype(np.float64)
        line = np.linalg.norm((b - b0) @ a0) + np.linalg.norm(b0 @ (a - a0))
        curve = (np.linalg.norm(a - a0) ** 2 + np.linalg.norm(b - b0) ** 2) / 2
        lines += (abs(before.scaling) * line) ** 2
        curves += (abs(before.scaling) * curve) ** 2
    return math.sqrt(lines), math.sqrt(curves)


def trimmed_mean(values: list[float], cut: int) -> float:
    """The mean without the `cut` smallest and largest."""
    kept = sorted(values)[cut : len(values) - cut]
    return sum(kept) / len(kept)


def squared_distances(sent: Adapter, got: list[Adapter]) -> list[list[float]]:
    """Product, A and B apart, each over the median of its pairs, by dense differences."""
    count = len(got)
    total = [[0.0] * count for _ in got]
    for part in ("product", "A", "B"):
        square = [[0.0] * count for _ in got]
        for i in range(count):
            for j in range(count):
                for path in sent:
                    if part == "product":
                        difference = delta(got[i][path]) - delta(got[j][path])
                    else:
                        mine, theirs = getattr(got[i][path], part), getattr(got[j][path], part)
                        difference = mine.astype(np.float64) - theirs
                    square[i][j] += float(np.sum(difference**2))
        pairs = [square[i][j] for i in range(count) for j in range(i) if square[i][j] > 0]
        if pairs:
            middle = statistics.median(pairs)
            for i in range(count):
                for j in range(count):
                    total[i][j] += square[i][j] / middle
    return total


def krum_scores(squares: list[list[float]], attackers: int) -> list[float]:
    """Each client's sum of squared distances to its K - attackers - 2 nearest others."""
    count = len(squares)
    scores = []
    for i in range(count):
        others = sorted(squares[i][j] for j in range(count) if j != i)
        scores.append(sum(others[: count - attackers - 2]))
    return scores
