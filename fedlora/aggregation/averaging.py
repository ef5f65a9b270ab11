"""Methods that average factors: FedIT and FFA-LoRA.

    fedit      A = Σ p_k A_k, B = Σ p_k B_k           arXiv:2305.05644
    ffa-lora   A = A₀ stays frozen, B = Σ p_k B_k      arXiv:2403.12313

FedIT averages the two factors apart, so its product misses the true mean by exactly
``Σ p_k s (B_k - B)(A_k - A)``. FFA-LoRA shares one A and is therefore exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from fedlora.adapter import Adapter
from fedlora.aggregation.method import (
    Broadcast,
    ClientProfile,
    Method,
    ServerState,
    Update,
    checked,
)
from fedlora.errors import FederationError
from fedlora.flat import RowForm, RowReader
from fedlora.training import Factor, LocalRule

__all__ = ["broadcast_whole", "fedit", "ffa_lora", "mean_of_factors"]

_BOTH: frozenset[Factor] = frozenset({"A", "B"})
_ONLY_B: frozenset[Factor] = frozenset({"B"})


def fedit() -> Method:
    """Return FedIT: the weighted mean of A and of B, each on its own (arXiv:2305.05644)."""
    return _averaging("fedit", _BOTH, exact=False)


def ffa_lora() -> Method:
    """Return FFA-LoRA: A stays as it was drawn from the seed, B is averaged (arXiv:2403.12313)."""
    return _averaging("ffa-lora", _ONLY_B, exact=True)


def mean_of_factors(
    state: ServerState, updates: Iterable[Update], factors: frozenset[Factor], method: str
) -> Adapter:
    """Return the trainable adapter with ``Σ p_k X_k`` in place of each of `factors`.

    One float64 sum over flat rows is kept, so that memory does not grow with the number of clients,
    and the result is rounded to float32 once. ``p_k`` are the clients' num_examples over their sum.
    """
    row_of = RowReader(state.trainable, factors)
    sums = np.zeros(row_of.size)
    weighted = np.empty_like(sums)
    total = 0.0
    for update in checked(state, updates, method):
        np.multiply(row_of(update.adapter), update.num_examples, out=weighted, dtype=np.float64)
        sums += weighted
        total += update.num_examples
    if total == 0.0:
        raise FederationError(f"round {state.round + 1}: {method} got no update to average")
    mean = (sums / total).astype("<f4").tobytes()
    # A copy does not say what it was made of: else it would keep the adapters of all rounds alive.
    return replace(RowForm.of(state.trainable, factors).read(mean))


def _averaging(name: str, factors: frozenset[Factor], *, exact: bool) -> Method:
    def aggregate(state: ServerState, updates: Iterable[Update]) -> ServerState:
        adapter = mean_of_factors(state, updates, factors, name)
        return replace(state, round=state.round + 1, trainable=adapter)

    return Method(
        name=name,
        trained=lambda round: factors,
        shared=factors,
        aggregate=aggregate,
        broadcast=broadcast_whole,
        local=LocalRule(trained=factors),
        exact=exact,
        linear=True,
        continues=True,
    )


def broadcast_whole(state: ServerState, profile: ClientProfile) -> Broadcast:
    """Send every client the same, whatever rank it would like."""
    return state.broadcast
