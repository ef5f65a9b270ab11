"""How far updates lie from what was sent and from one another, as changes of s B A. NumPy only.

A client's change of a layer is itself a product of thin factors, with the s of the layer:

    s (B A - B0 A0) = [s (B - B0), s B0] @ [A; A - A0]        (out, 2 r) @ (2 r, in)

so that norms and inner products come from Gram matrices of (2 r, 2 r), never from an (out, in)
matrix. Written so, and not as [s B, -s B0] @ [A; A0], a change that is small beside the adapter
loses no digits, and no change is exactly zero.

What is measured here is more than the norm of that change, which has a blind spot: with B = B0 = 0
every A has the same product, however large, and methods that average A and B apart would put that A
beside the B of others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fedlora.adapter import Adapter, LoraLayer

__all__ = ["Reach", "moved_by", "reach", "squared_distances"]

_Matrix: TypeAlias = npt.NDArray[np.float64]
_Pair: TypeAlias = tuple[Adapter, Adapter]  # what was sent, what came back


@dataclass(frozen=True, slots=True)
class Reach:
    """The most that an update can change the product, alone or averaged with others.

    A client at ``A0 + dA, B0 + dB`` has, per layer,

        line  = |s| (||dB A0|| + ||B0 dA||)              its change to first order
        curve = |s| (||dA||^2 + ||dB||^2) / 2            no less than |s| ||dB dA||

    and over the layers the norm of each. With weights p_k that sum to 1, both the exact mean
    ``sum p_k s B_k A_k`` and the product of the means of A and of B, cross terms of different
    clients included, lie within ``sum p_k (line_k + curve_k)`` of ``s B0 A0``: the triangle
    inequality for the first order, and for the rest ``2 ||mean dB|| ||mean dA|| <= ||mean dB||^2 +
    ||mean dA||^2 <= sum p_k (||dB_k||^2 + ||dA_k||^2)``.
    """

    line: float
    curve: float

    @property
    def whole(self) -> float:
        """In the units of the product's Frobenius norm."""
        return self.line + self.curve

    def share_within(self, bound: float) -> float:
        """Return the largest t in [0, 1] for which ``A0 + t dA, B0 + t dB`` reaches `bound`.

        Its reach is ``t line + t^2 curve``.
        """
        if self.whole <= bound:
            return 1.0
        return 2.0 * bound / (self.line + math.sqrt(self.line**2 + 4.0 * self.curve * bound))


def reach(sent: Adapter, got: Adapter) -> Reach:
    """Return the `Reach` of an update, of the same layout and scalings as what was sent."""
    lines, curves = [], []
    for path, before in sent.layers.items():
        scaling, (a0, b0), (a, b) = abs(before.scaling), _flat(before), _flat(got[path])
        d_a, d_b = a - a0, b - b0
        lines.append(scaling * (_norm_of_product(d_b, a0) + _norm_of_product(b0, d_a)))
        curves.append(scaling * float(np.sum(d_a**2) + np.sum(d_b**2)) / 2.0)
    return Reach(math.hypot(*lines), math.hypot(*curves))


def moved_by(sent: Adapter, got: Adapter, share: float) -> Adapter:
    """Return the adapter at ``X0 + share (X - X0)`` for both factors of every layer; float32."""

    def between(path: str) -> LoraLayer:
        before, (a0, b0), (a, b) = sent[path], _flat(sent[path]), _flat(got[path])
        mixed_a = (a0 + share * (a - a0)).astype(np.float32).reshape(before.A.shape)
        mixed_b = (b0 + share * (b - b0)).astype(np.float32)
        return LoraLayer(mixed_a, mixed_b, before.scaling, before.magnitude, before.kind)

    return Adapter({path: between(path) for path in sent}, got.config, got.base)


def squared_distances(updates: Sequence[_Pair]) -> _Matrix:
    """Return (K, K) squared distances of K updates: of their changes of the product, and of A, B.

    The three parts (the product's, and where all ranks are equal A's and B's) are each divided by
    their median over the pairs that differ, since they have different units, and added. Each part
    is Euclidean, so the sum is the squared distance in one Euclidean space, as Krum needs it. A
    minority cannot choose the medians.

    The product's part sees no difference where a rotation of the rank changed the factors alone;
    A's and B's see what hides from the product (see above). With different ranks there are only
    products, and the methods that take them never look at the factors apart.
    """
    count = len(updates)
    parts = [np.zeros((count, count))]
    paths = list(updates[0][0])
    for path in paths:
        layers = [_change(sent[path], got[path]) for sent, got in updates]
        parts[0] += _inner_products(layers)
    if len({got.ranks for _, got in updates}) == 1:
        for number in (0, 1):  # A, B
            parts.append(np.zeros((count, count)))
            for path in paths:
                rows = np.stack([
                    (_flat(got[path])[number] - _flat(sent[path])[number]).ravel()
                    for sent, got in updates
                ])  # fmt: skip
                parts[-1] += rows @ rows.T
    total = np.zeros((count, count))
    for inner in parts:
        own = np.diag(inner)
        squares = np.maximum(own[:, None] + own[None, :] - 2.0 * inner, 0.0)
        np.fill_diagonal(squares, 0.0)
        positive = squares[np.triu_indices(count, 1)]
        positive = positive[positive > 0]
        if positive.size:
            total += squares / np.median(positive)
    return total


def _change(before: LoraLayer, after: LoraLayer) -> tuple[_Matrix, _Matrix]:
    """Return (2 r, out) and (2 r, in): the transpose of the left factor, and the right one."""
    (a0, b0), (a, b) = _flat(before), _flat(after)
    left = np.concatenate([b - b0, b0], axis=1) * after.scaling
    return left.T, np.concatenate([a, a - a0])


def _inner_products(layers: Sequence[tuple[_Matrix, _Matrix]]) -> _Matrix:
    """Return (K, K) inner products of K products of thin factors; memory K (2 r)^2 at a time."""
    starts = np.cumsum([0, *(len(right) for _, right in layers[:-1])])
    lefts = np.concatenate([left for left, _ in layers])
    rights = np.concatenate([right for _, right in layers])
    return np.stack([
        np.add.reduceat(np.sum((left @ lefts.T) * (right @ rights.T), axis=0), starts)
        for left, right in layers
    ])  # fmt: skip


def _norm_of_product(left: _Matrix, right: _Matrix) -> float:
    """||left @ right|| for (out, r) and (r, in), from two (r, r) matrices."""
    return math.sqrt(max(float(np.sum((left.T @ left) * (right @ right.T))), 0.0))


def _flat(layer: LoraLayer) -> tuple[_Matrix, _Matrix]:
    """A as (rank, in) and B as (out, rank), float64."""
    return layer.A.reshape(layer.rank, -1).astype(np.float64), layer.B.astype(np.float64)
