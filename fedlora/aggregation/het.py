"""HetLoRA: clients of different ranks by padding and truncation (arXiv:2401.06432).

    up      B_k and A_k are padded with zeros to the global rank
    server  A = Σ w_k A_k, B = Σ w_k B_k, w_k = ‖s_k B_k A_k‖_F / Σ_j ‖s_j B_j A_j‖_F
    down    the first r_k directions

It is the published baseline for mixed ranks, and biased: directions that only some clients have
are averaged with zeros. The weights are the paper's and take no account of num_examples; the norm
is over all layers of a client. The paper does not speak of scalings: here either factor takes
``√(s_k / s)`` into the global adapter and gives it back on the way down, so that what a client
learned keeps its size. The paper's self-pruning, by which clients choose their own ranks while they
train, is left out: ranks are given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from fedlora.adapter import Adapter, Array, LoraLayer
from fedlora.aggregation.averaging import BOTH, RunningMean, no_update
from fedlora.aggregation.method import Method, ServerState, Update, checked
from fedlora.aggregation.ranks import broadcast_cut, leading_cut, rounded
from fedlora.errors import FederationError
from fedlora.training import LocalRule

__all__ = ["hetlora", "padded"]


def hetlora() -> Method:
    """Return HetLoRA, without self-pruning."""
    return Method(
        name="hetlora",
        trained=lambda round: BOTH,
        shared=BOTH,
        aggregate=_aggregate,
        broadcast=broadcast_cut(leading_cut),
        local=LocalRule(trained=BOTH),
        exact=False,
        linear=False,
        any_rank=True,
        summary="the published baseline for mixed ranks; padding biases it",
        paper="2401.06432",
    )


def padded(layer: LoraLayer, like: LoraLayer) -> LoraLayer:
    """Return `layer` at the rank and scaling of `like`, the same product; new directions are zero.

    Raises `FederationError` when the rank of `layer` is over that of `like`.
    """
    missing = like.rank - layer.rank
    if missing < 0:
        raise FederationError(
            f"expected a rank of at most {like.rank} as the server has, found {layer.rank}; "
            "raise lora.rank, or use flexlora or flora"
        )
    share = math.sqrt(layer.scaling / like.scaling)
    A, B = layer.A.astype(np.float64), layer.B.astype(np.float64)
    after = [(0, missing)] + [(0, 0)] * (A.ndim - 1)
    return rounded(like, np.pad(share * B, ((0, 0), (0, missing))), np.pad(share * A, after))


def _aggregate(state: ServerState, updates: Iterable[Update]) -> ServerState:
    mean, weighted = RunningMean(state.trainable, BOTH), False
    reached = dict.fromkeys(state.trainable, 0)  # the highest rank of a client in the mean
    for update in checked(state, updates, "hetlora", any_rank=True):
        weight = update.adapter.norm()
        if weight and not weighted:  # those before it had no product: their weight is zero
            mean, weighted = RunningMean(state.trainable, BOTH), True
            reached = dict.fromkeys(state.trainable, 0)
        elif weighted and not weight:
            continue
        # As long as every product is zero, the clients count alike: their A may have moved.
        mean.add(_padded_adapter(state.trainable, update), weight or 1.0)
        for path, layer in update.adapter.layers.items():
            reached[path] = max(reached[path], layer.rank)
    if not mean.total:
        raise no_update(state, "hetlora")
    adapter = mean.adapter()
    layers = {
        path: replace(layer, A=_with_tail(layer.A, state.trainable[path].A, reached[path]))
        for path, layer in adapter.layers.items()
    }
    return replace(state, round=state.round + 1, trainable=replace(adapter, layers=layers))


def _with_tail(A: Array, before: Array, rank: int) -> Array:
    """Return `A` with the rows that no client has as they were.

    Their columns of B are zero. Were the rows zero too, no client of a later round could ever train
    these directions again.
    """
    return A if rank >= len(A) else np.concatenate([A[:rank], before[rank:]])


def _padded_adapter(like: Adapter, update: Update) -> Adapter:
    layers = {}
    for path, layer in update.adapter.layers.items():
        try:
            layers[path] = padded(layer, like[path])
        except FederationError as error:
            raise FederationError(f"client {update.client_id!r}, layer {path!r}: {error}") from None
    return replace(like, layers=layers)
