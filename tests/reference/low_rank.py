"""The SVD of a sum of products as one would write it first: the dense sum, NumPy's dense SVD."""

from __future__ import annotations

import numpy as np


def dense_sum(parts: list[tuple[np.ndarray, np.ndarray, float]]) -> np.ndarray:
    """Sum weight * B @ A, (out, in) float64."""
    total: np.ndarray = np.zeros((parts[0][0].shape[0], parts[0][1].shape[1]))
    for B, A, weight in parts:
        for n in range(A.shape[0]):
            total = total + weight * np.outer(B[:, n].astype(float), A[n].astype(float))
    return total


def best_of_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The nearest matrix of that rank (Eckart-Young)."""
    u, s, vt = np.linalg.svd(matrix)
    nearest = np.zeros(matrix.shape)
    for n in range(min(rank, len(s))):
        nearest += s[n] * np.outer(u[:, n], vt[n])
    return nearest
