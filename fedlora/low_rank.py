"""Low-rank algebra on plain float64 matrices: the SVD of a product, and of a sum of products.

Nothing here knows of adapters. A product ``B @ A`` of B (out, n) and A (n, in) is decomposed from
its factors: QR of both leaves a core of (n, n) at most for the SVD, so that no (out, in) matrix is
formed. From ``n >= min(out, in) / 2`` on, the two QRs cost more than they save, and the matrix
itself is smaller than its factors: then it is summed up and decomposed whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Matrix", "ProductSum", "Spectrum", "svd_of_product", "svd_of_products", "zero_of"]

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
    return svd_of_products([(B, A)])[0]


def svd_of_products(factors: Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> list[Spectrum]:
    """Return `svd_of_product` of every pair of B and A, with the same bits.

    Pairs of one shape share the calls of NumPy: on the factors of an adapter, whose matrices are
    small, these calls take longer than the arithmetic.
    """
    alike: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for index, (B, A) in enumerate(factors):
        alike.setdefault((B.shape, A.shape), []).append(index)
    found: dict[int, Spectrum] = {}
    for (of_B, of_A), indices in alike.items():
        left, values, right = _svd_of_stacks(
            np.stack([factors[k][0] for k in indices], dtype=np.float64),
            np.stack([factors[k][1] for k in indices], dtype=np.float64),
            dense=_is_dense(of_A[0], of_B[0], of_A[1]),
        )
        for place, index in enumerate(indices):
            spectrum = Spectrum(left[place], values[place], right[place])
            found[index] = spectrum.cut(of_A[0])
    return [found[index] for index in range(len(factors))]


def zero_of(shape: tuple[int, int], size: float) -> float:
    """Return the singular value up to which a matrix made of parts of `size` is zero in float64."""
    return float(max(shape) * np.finfo(np.float64).eps * size)


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
            spectrum = Spectrum(*_signed(*_svd(self._dense / divisor)))
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
        return spectrum.above(zero_of(self.shape, self._size / abs(divisor)))


def _is_dense(rank: int, out_features: int, in_features: int) -> bool:
    return 2 * rank >= min(out_features, in_features)


def _norm(array: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))


def _svd_of_stacks(B: Matrix, A: Matrix, *, dense: bool) -> tuple[Matrix, Matrix, Matrix]:
    """B: (k, out, n), A: (k, n, in); the parts of k spectra along axis 0."""
    if dense:
        return _signed(*_svd(B @ A))
    q_out, r_out = np.linalg.qr(B)
    q_in, r_in = np.linalg.qr(np.swapaxes(A, 1, 2))
    left, values, right = _svd(r_out @ np.swapaxes(r_in, 1, 2))
    return _signed(q_out @ left, values, right @ np.swapaxes(q_in, 1, 2))


def _svd(matrices: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    left, values, right = np.linalg.svd(matrices, full_matrices=False)
    return left, values, right


def _signed(left: Matrix, values: Matrix, right: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """One spectrum, or several along axis 0, with the signs that `Spectrum` tells; in place."""
    if not values.size:
        return left, values, right
    places = np.abs(right).argmax(axis=-1)[..., None]
    sign = np.where(np.take_along_axis(right, places, axis=-1) < 0, -1.0, 1.0)
    left *= np.swapaxes(sign, -1, -2)
    right *= sign
    return left, values, right
