"""Low-rank algebra on plain float64 matrices: the SVD of a product, and of a sum of products.

Nothing here knows of adapters. A product ``B @ A`` of B (out, n) and A (n, in) is decomposed from
its factors: QR of both leaves a core of (n, n) at most for the SVD, so that no (out, in) matrix is
formed. From ``n >= min(out, in) / 2`` on, the two QRs cost more than they save, and the matrix
itself is smaller than its factors: then it is summed up and decomposed whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Matrix", "ProductSum", "Spectrum", "svd_of_product"]

Matrix: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """The singular value decomposition ``left @ diag(values) @ right``.

    left: (out, n), right: (n, in), orthonormal columns and rows; values: (n,) descending. The sign
    of every pair is fixed: the entry of largest size in a row of `right` is positive. Signs that
    hang on the last bit would send one optimizer two ways.
    """

    left: Matrix
    values: Matrix
    right: Matrix

    @property
    def rank(self) -> int:
        return len(self.values)

    @property
    def energy(self) -> float:
        """The product's squared Frobenius norm."""
        return float(self.values @ self.values)

    @property
    def product(self) -> Matrix:
        """(out, in): the matrix itself."""
        return (self.left * self.values) @ self.right

    def cut(self, rank: int) -> Spectrum:
        """Keep the `rank` largest values: the best approximation (Eckart-Young)."""
        return Spectrum(self.left[:, :rank], self.values[:rank], self.right[:rank])

    def above(self, floor: float) -> Spectrum:
        """Keep the values over `floor`."""
        return self.cut(int(np.count_nonzero(self.values > floor)))

    def rank_for(self, energy: float) -> int:
        """Return the smallest rank that keeps the share `energy` of `energy`; 0 for a zero."""
        if not self.energy:
            return 0
        kept = np.cumsum(self.values**2)
        # The last sum can miss the whole by rounding; all values keep all there is.
        return min(int(np.searchsorted(kept, energy * kept[-1])) + 1, self.rank)

    def energy_beyond(self, rank: int) -> float:
        """Return the share of `energy` that ``cut(rank)`` leaves out; 0 for a zero."""
        left_out = self.values[rank:]
        return float(left_out @ left_out) / self.energy if self.energy else 0.0

    def balanced(self, scaling: float = 1.0) -> tuple[Matrix, Matrix]:
        """Return B, A with ``scaling * B @ A`` the product: ``left √(values / scaling)`` and so on.

        scaling: over 0.
        """
        root = np.sqrt(self.values / scaling)
        return self.left * root, root[:, None] * self.right


def svd_of_product(B: npt.NDArray[Any], A: npt.NDArray[Any]) -> Spectrum:
    """Return the SVD of ``B @ A``, with ``min(out, n, in)`` values, zeros among them.

    B: (out, n), A: (n, in), any real dtype; computed in float64.
    """
    B, A = B.astype(np.float64), A.astype(np.float64)
    if _is_dense(A.shape[0], B.shape[0], A.shape[1]):
        return _signed(*np.linalg.svd(B @ A, full_matrices=False)).cut(A.shape[0])
    q_out, r_out = np.linalg.qr(B)
    q_in, r_in = np.linalg.qr(A.T)
    left, values, right = np.linalg.svd(r_out @ r_in.T, full_matrices=False)
    return _signed(q_out @ left, values, right @ q_in.T)


class ProductSum:
    """A running sum ``Σ w_k B_k A_k``, read from a stream of factors.

    The factors are kept side by side while they are few, and summed up into one (out, in) float64
    matrix from the rank on from which it is smaller: memory ends there however many there are.
    """

    def __init__(self, out_features: int, in_features: int) -> None:
        self.shape = (out_features, in_features)
        self._parts: list[tuple[npt.NDArray[Any], npt.NDArray[Any], float]] = []
        self._rank = 0
        self._dense: Matrix | None = None
        self._size = 0.0  # a bound on the Frobenius norm of what went in, cancelled or not

    @property
    def is_dense(self) -> bool:
        """Whether an (out, in) matrix was formed."""
        return self._dense is not None

    def add(self, B: npt.NDArray[Any], A: npt.NDArray[Any], weight: float = 1.0) -> None:
        """Add ``weight * B @ A``. B: (out, n), A: (n, in); they are kept, so must not change."""
        self._size += abs(weight) * _norm(B) * _norm(A)
        self._rank += A.shape[0]
        self._parts.append((B, A, weight))
        if self._dense is None and _is_dense(self._rank, *self.shape):
            self._dense = np.zeros(self.shape)
        if self._dense is not None:
            for left, right, share in self._parts:
                scaled = left.astype(np.float64) * share
                self._dense += scaled @ right.astype(np.float64)
            self._parts.clear()

    def svd(self, divisor: float = 1.0) -> Spectrum:
        """Return the SVD of the sum over `divisor`, without what is zero.

        Zero is what float64 leaves when products of this size cancel; so a sum that cancels
        altogether has rank 0.
        """
        if self._dense is not None:
            spectrum = _signed(*np.linalg.svd(self._dense / divisor, full_matrices=False))
        elif self._parts:
            # The root of a weight goes to either side, so that no factor is much larger than it
            # was; its sign goes to B.
            roots = [math.sqrt(abs(weight / divisor)) for _, _, weight in self._parts]
            signs = [math.copysign(root, p[2]) for root, p in zip(roots, self._parts, strict=True)]
            B = [p[0].astype(np.float64) * sign for p, sign in zip(self._parts, signs, strict=True)]
            A = [p[1].astype(np.float64) * root for p, root in zip(self._parts, roots, strict=True)]
            spectrum = svd_of_product(np.concatenate(B, axis=1), np.concatenate(A))
        else:
            return Spectrum(np.zeros((self.shape[0], 0)), np.zeros(0), np.zeros((0, self.shape[1])))
        rounding = max(self.shape) * np.finfo(np.float64).eps
        return spectrum.above(rounding * self._size / abs(divisor))


def _is_dense(rank: int, out_features: int, in_features: int) -> bool:
    return 2 * rank >= min(out_features, in_features)


def _norm(array: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))


def _signed(left: Matrix, values: Matrix, right: Matrix) -> Spectrum:
    if not len(values):
        return Spectrum(left, values, right)
    largest = np.take_along_axis(right, np.abs(right).argmax(axis=1)[:, None], axis=1)[:, 0]
    sign = np.where(largest < 0, -1.0, 1.0)
    return Spectrum(left * sign, values, right * sign[:, None])
