"""FedSA-LoRA: A is shared, every client keeps a B of its own (arXiv:2410.01463).

Clients train both factors and send A. Their B stays with them from round to round
(`fedlora.federation.kept_factors`); the server's B stays as it was at the start, which is zero. So
the global adapter alone changes nothing about the base: it is a common A to learn a B upon, and
what this method is judged by are the personal adapters. For the same reason the mean of the
clients' products is not what the server has, and `exact` is False.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fedlora.aggregation.averaging import BOTH, ONLY_A, broadcast_whole, mean_of_factors
from fedlora.aggregation.method import Method, ServerState, Update
from fedlora.training import LocalRule

__all__ = ["fedsa_lora"]


def fedsa_lora() -> Method:
    """Return FedSA-LoRA: the mean of A alone."""
    return Method(
        name="fedsa-lora",
        trained=lambda round: BOTH,
        shared=ONLY_A,
        aggregate=_aggregate,
        broadcast=broadcast_whole,
        local=LocalRule(trained=BOTH),
        exact=False,
        linear=True,
        continues=True,
        summary="clients whose data contradict one another; the global adapter alone is the base",
        paper="2410.01463",
    )


def _aggregate(state: ServerState, updates: Iterable[Update]) -> ServerState:
    adapter = mean_of_factors(state, updates, ONLY_A, "fedsa-lora")
    return replace(state, round=state.round + 1, trainable=adapter)
