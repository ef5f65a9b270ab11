"""RoLoRA: one factor a round, in turn (arXiv:2502.01755).

    odd rounds    B = Σ p_k B_k, A stays
    even rounds   A = Σ p_k A_k, B stays

One factor is the same at every client, so the mean of the other is the mean of the products: exact
as FFA-LoRA is, but A learns too. Half of the parameters go up in each round.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fedlora.aggregation.averaging import BOTH, ONLY_A, ONLY_B, broadcast_whole, mean_of_factors
from fedlora.aggregation.method import Method, ServerState, Update
from fedlora.training import Factor, LocalRule

__all__ = ["rolora"]


def rolora() -> Method:
    """Return RoLoRA; it begins with B, since A has no gradient while B is zero."""
    return Method(
        name="rolora",
        trained=_trained,
        shared=BOTH,
        aggregate=_aggregate,
        broadcast=broadcast_whole,
        local=LocalRule(trained=BOTH),
        exact=True,
        linear=True,
        continues=True,
        summary="half the upload a round; made for strong drift, see the study",
        paper="2502.01755",
    )


def _trained(round: int) -> frozenset[Factor]:
    return ONLY_B if round % 2 else ONLY_A


def _aggregate(state: ServerState, updates: Iterable[Update]) -> ServerState:
    number = state.round + 1
    adapter = mean_of_factors(state, updates, _trained(number), "rolora")
    return replace(state, round=number, trainable=adapter)
