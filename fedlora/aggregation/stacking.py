"""Exact methods that put what does not fit the rank into a frozen adapter: FLoRA and FedEx-LoRA.

    flora        frozen += Σ p_k s_k B_k A_k; A is drawn anew, B = 0             arXiv:2409.05976
    fedex-lora   A, B as FedIT; frozen += Σ p_k s_k B_k A_k - s B A              arXiv:2410.09432

The papers add these to the base's weights. Here the base never changes: the sum is an adapter that
clients train beside. It is recompressed in each round: without an option nothing is dropped but
directions that are zero, so that a layer has min(out, in) at most; with `rank` or `energy` it is
cut to a budget, and the share of its squared norm that was left out stands in the state
(`fedlora.aggregation.ranks.DISCARDED`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedlora.adapter import Adapter
from fedlora.aggregation.averaging import BOTH, RunningMean, broadcast_whole, no_update
from fedlora.aggregation.method import Method, ServerState, Update, checked
from fedlora.aggregation.ranks import (
    DISCARDED,
    add_products,
    best_cut,
    broadcast_cut,
    fresh_A,
    mean_products,
    products_like,
    side_adapter,
)
from fedlora.errors import ConfigError
from fedlora.low_rank import ProductSum, Spectrum
from fedlora.training import LocalRule

__all__ = ["fedex_lora", "flora"]


def flora(rank: int | None = None, energy: float | None = None) -> Method:
    """Return FLoRA: the stack of all clients' products, exact for any ranks (arXiv:2409.05976).

    rank: directions that the frozen part may have in a layer; energy: the share of its squared
    norm to keep, in (0, 1]. At most one of the two; without either nothing is dropped.
    """
    budget = _Budget.of("flora", rank, energy)

    def aggregate(state: ServerState, updates: Iterable[Update]) -> ServerState:
        sums, total = mean_products(state, updates, "flora")
        return _with_frozen(state, sums, total, fresh_A(state.trainable), budget)

    return Method(
        name="flora",
        trained=lambda round: BOTH,
        shared=BOTH,
        aggregate=aggregate,
        broadcast=broadcast_cut(best_cut),
        local=LocalRule(trained=BOTH),
        exact=budget.is_lossless,
        linear=False,
        any_rank=True,
        summary="mixed ranks and nothing lost, where the download may grow",
        paper="2409.05976",
        noted=(DISCARDED,),
    )


def fedex_lora(rank: int | None = None, energy: float | None = None) -> Method:
    """Return FedEx-LoRA: FedIT, and its error as a frozen adapter (arXiv:2410.09432, equation 6).

    Its clients train averages of factors, so that their ranks and scalings must be equal. `rank`
    and `energy` are FLoRA's.
    """
    budget = _Budget.of("fedex-lora", rank, energy)

    def aggregate(state: ServerState, updates: Iterable[Update]) -> ServerState:
        mean, sums = RunningMean(state.trainable, BOTH), products_like(state.trainable)
        for update in checked(state, updates, "fedex-lora"):
            mean.add(update.adapter, update.num_examples)
            add_products(sums, update.adapter, update.num_examples)
        if not mean.total:
            raise no_update(state, "fedex-lora")
        # The mean before it is rounded: only that leaves (K - 1) r directions, as the formula says.
        means = {(segment.path, segment.factor): value for segment, value in mean.factor_rows()}
        for path, layer in state.trainable.layers.items():
            A = means[path, "A"].reshape(layer.rank, -1)
            sums[path].add(means[path, "B"], A, -mean.total * layer.scaling)
        return _with_frozen(state, sums, mean.total, mean.adapter(), budget)

    return Method(
        name="fedex-lora",
        trained=lambda round: BOTH,
        shared=BOTH,
        aggregate=aggregate,
        broadcast=broadcast_whole,
        local=LocalRule(trained=BOTH),
        exact=budget.is_lossless,
        linear=False,
        summary="FedIT's training without its error, where the download may grow",
        paper="2410.09432",
        noted=(DISCARDED,),
    )


@dataclass(frozen=True, slots=True)
class _Budget:
    """How much of a frozen part is kept; all of it when neither is set."""

    rank: int | None
    energy: float | None

    @classmethod
    def of(cls, method: str, rank: int | None, energy: float | None) -> _Budget:
        if rank is not None and energy is not None:
            raise ConfigError(
                f"{method}: expected at most one of rank and energy, found rank={rank!r} and "
                f"energy={energy!r}"
            )
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ConfigError(f"{method}, rank: expected a whole number >= 1, found {rank!r}")
        number = isinstance(energy, int | float) and not isinstance(energy, bool)
        if energy is not None and not (number and 0 < energy <= 1):
            raise ConfigError(f"{method}, energy: expected a share in (0, 1], found {energy!r}")
        return cls(rank, energy)

    @property
    def is_lossless(self) -> bool:
        return self.rank is None and self.energy is None

    def cut(self, spectrum: Spectrum) -> Spectrum:
        if self.energy is not None:
            return spectrum.cut(spectrum.rank_for(self.energy))
        return spectrum if self.rank is None else spectrum.cut(self.rank)


def _with_frozen(
    state: ServerState,
    sums: Mapping[str, ProductSum],
    total: float,
    trainable: Adapter,
    budget: _Budget,
) -> ServerState:
    """Return the state after a round that adds ``sums / total`` to the frozen part."""
    if state.frozen is not None:
        add_products(sums, state.frozen, total)
    whole = {path: one.svd(total) for path, one in sums.items()}
    kept = {path: budget.cut(spectrum) for path, spectrum in whole.items()}
    method_state = state.method_state
    if not budget.is_lossless:
        shares = [whole[path].energy_beyond(kept[path].rank) for path in sorted(whole)]
        method_state = {**method_state, DISCARDED: np.array(shares)}
    return replace(
        state,
        round=state.round + 1,
        trainable=trainable,
        frozen=side_adapter(trainable, kept),
        method_state=method_state,
    )
