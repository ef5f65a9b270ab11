"""Methods that take the server's factors from an SVD: FedSVD and FlexLoRA.

    fedsvd     U S Vᵀ = SVD((Σ p_k B_k) A):  A = Vᵀ, B = U S               arXiv:2505.12805
    flexlora   U S Vᵀ = SVD(Σ p_k s_k B_k A_k), cut to rank r:
               B = U √S / √s, A = √S Vᵀ / √s                               arXiv:2402.11505

FedSVD's clients train B beside one A, so its mean is exact, and nothing is lost in an SVD at the
full rank; after a secure or noised sum it is post-processing. FlexLoRA's result is the best that
rank r can be (Eckart-Young): it misses the exact mean by the singular values that are cut off,
whose share stands in the state (`fedlora.aggregation.ranks.DISCARDED`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from fedlora.adapter import LoraLayer
from fedlora.aggregation.averaging import BOTH, ONLY_B, broadcast_whole, running_mean
from fedlora.aggregation.method import Method, ServerState, Update
from fedlora.aggregation.ranks import (
    DISCARDED,
    best_cut,
    broadcast_cut,
    mean_products,
    refactored,
    with_rank,
)
from fedlora.errors import ConfigError
from fedlora.low_rank import Matrix, svd_of_products, zero_of
from fedlora.training import LocalRule

__all__ = ["fedsvd", "flexlora", "orthonormal"]


def fedsvd() -> Method:
    """Return FedSVD: B is averaged, then A becomes an orthonormal basis of what was learned."""

    def aggregate(state: ServerState, updates: Iterable[Update]) -> ServerState:
        mean = running_mean(state, updates, ONLY_B, "fedsvd")
        means = {segment.path: B for segment, B in mean.factor_rows()}
        old = [state.trainable[path] for path in means]
        new = orthonormal([(B, _flat(A)) for B, A in zip(means.values(), old, strict=True)])
        layers = {
            path: refactored(layer, *factors)
            for path, layer, factors in zip(means, old, new, strict=True)
        }
        trainable = replace(state.trainable, layers=layers)
        return replace(state, round=state.round + 1, trainable=trainable)

    return Method(
        name="fedsvd",
        trained=lambda round: ONLY_B,
        shared=ONLY_B,
        aggregate=aggregate,
        broadcast=broadcast_whole,
        local=LocalRule(trained=ONLY_B),
        exact=True,
        linear=True,
        summary="made for tight differential privacy, see the study: exact, half the upload",
        paper="2505.12805",
    )


def orthonormal(factors: Sequence[tuple[Matrix, Matrix]]) -> list[tuple[Matrix, Matrix]]:
    """Return ``U S`` and ``Vᵀ`` of the SVD of each ``B @ A``, without directions that are zero."""
    found = []
    for (B, A), spectrum in zip(factors, svd_of_products(factors), strict=True):
        size = float(np.linalg.norm(B) * np.linalg.norm(A))
        kept = spectrum.above(zero_of((B.shape[0], A.shape[1]), size))
        found.append((kept.left * kept.values, kept.right))
    return found


def flexlora(rank: int | None = None) -> Method:
    """Return FlexLoRA: the best adapter of one rank for the mean of the clients' products.

    rank: of the global adapter; None: what it has at the start. Clients of a smaller rank get the
    best approximation at theirs.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"flexlora, rank: expected a whole number >= 1, found {rank!r}")

    def aggregate(state: ServerState, updates: Iterable[Update]) -> ServerState:
        sums, total = mean_products(state, updates, "flexlora")
        place = state.trainable if rank is None else with_rank(state.trainable, rank)
        layers, left_out = {}, []
        for path, layer in place.layers.items():
            spectrum = sums[path].svd(total)
            left_out.append(spectrum.energy_beyond(layer.rank))
            kept = spectrum.cut(layer.rank)
            layers[path] = refactored(layer, *kept.balanced(layer.scaling))
        return replace(
            state,
            round=state.round + 1,
            trainable=replace(place, layers=layers),
            method_state={**state.method_state, DISCARDED: np.array(left_out)},
        )

    return Method(
        name="flexlora",
        trained=lambda round: BOTH,
        shared=BOTH,
        aggregate=aggregate,
        broadcast=broadcast_cut(best_cut),
        local=LocalRule(trained=BOTH),
        exact=False,
        linear=False,
        any_rank=True,
        summary="mixed ranks, or strong label skew, at an adapter that does not grow",
        paper="2402.11505",
        noted=(DISCARDED,),
    )


def _flat(layer: LoraLayer) -> Matrix:
    return layer.A.reshape(layer.rank, -1).astype(np.float64)
