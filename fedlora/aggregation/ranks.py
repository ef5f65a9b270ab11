"""Adapters of other ranks: products put back into factors, and cuts for clients of smaller rank.

A client of rank r_k has its own scaling s_k: ``lora_alpha / r_k``, or ``lora_alpha / √r_k`` for
rsLoRA. All that is put into factors here keeps the product ``s B A`` and gives either factor the
same share of a scaling, ``1 / √s``, so that a layer comes to a client as balanced as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np

from fedlora.adapter import Adapter, LoraLayer, stack
from fedlora.aggregation.averaging import no_update
from fedlora.aggregation.method import Broadcast, ClientProfile, ServerState, Update, checked
from fedlora.errors import FederationError
from fedlora.low_rank import Matrix, ProductSum, Spectrum
from fedlora.targets import initial_A

__all__ = [
    "DISCARDED",
    "add_products",
    "best_cut",
    "broadcast_cut",
    "fresh_A",
    "leading_cut",
    "mean_products",
    "products_like",
    "refactored",
    "rounded",
    "scaling_at",
    "side_adapter",
    "with_rank",
]

# Key in a state's `method_state`: one float64 number a layer in the order of paths, the share of
# the squared Frobenius norm that a round's recompression left out.
DISCARDED = "discarded-energy"

Cut = Callable[[LoraLayer, int, bool], LoraLayer]  # (layer, rank, rsLoRA)


def scaling_at(layer: LoraLayer, rank: int, uses_rslora: bool) -> float:
    """Return the scaling that `layer` would have at another rank with its lora_alpha."""
    ratio = layer.rank / rank
    return layer.scaling * (math.sqrt(ratio) if uses_rslora else ratio)


def products_like(adapter: Adapter) -> dict[str, ProductSum]:
    """Return an empty sum of products for each layer; a convolution's kernel is part of `in`."""
    return {
        path: ProductSum(layer.out_features, math.prod(layer.in_shape))
        for path, layer in adapter.layers.items()
    }


def add_products(sums: Mapping[str, ProductSum], adapter: Adapter, weight: float) -> None:
    """Add ``weight`` times every delta_weight of `adapter`; a layer that it lacks adds nothing."""
    for path, layer in adapter.layers.items():
        sums[path].add(layer.B, layer.A.reshape(layer.rank, -1), weight * layer.scaling)


def mean_products(
    state: ServerState, updates: Iterable[Update], method: str
) -> tuple[dict[str, ProductSum], float]:
    """Return ``Σ n_k s_k B_k A_k`` of each layer, and ``Σ n_k``. Ranks and scalings may differ.

    Raises as `checked` does, and `FederationError` without any update.
    """
    sums, total = products_like(state.trainable), 0.0
    for update in checked(state, updates, method, any_rank=True):
        add_products(sums, update.adapter, update.num_examples)
        total += update.num_examples
    if not total:
        raise no_update(state, method)
    return sums, total


def refactored(layer: LoraLayer, B: Matrix, A: Matrix) -> LoraLayer:
    """Return `layer` with factors of at most its rank in its first directions, rounded to float32.

    A direction that is left over adds nothing: its column of B is zero, and its row of A stays what
    it was. Were that row zero too, neither of the two would ever get a gradient again.
    """
    live = A.shape[0]
    if live == layer.rank:
        return rounded(layer, B, A.reshape(layer.A.shape))
    new_B, new_A = np.zeros(layer.B.shape), layer.A.astype(np.float64)
    new_B[:, :live] = B
    new_A[:live] = A.reshape(live, *layer.in_shape)
    return rounded(layer, new_B, new_A)


def rounded(like: LoraLayer, B: Matrix, A: Matrix, scaling: float | None = None) -> LoraLayer:
    """Return `like` with other factors, rounded to float32, and maybe another scaling.

    Raises `NonFiniteError` for what float32 cannot hold.
    """
    with np.errstate(over="ignore"):  # an overflow becomes infinity, which a layer refuses
        new_A, new_B = A.astype(np.float32), B.astype(np.float32)
    return replace(like, A=new_A, B=new_B, scaling=like.scaling if scaling is None else scaling)


def best_cut(layer: LoraLayer, rank: int, uses_rslora: bool) -> LoraLayer:
    """Return the best approximation of `layer` at a smaller `rank`, with that rank's scaling."""
    sums = ProductSum(layer.out_features, math.prod(layer.in_shape))
    sums.add(layer.B, layer.A.reshape(layer.rank, -1))
    spectrum = sums.svd().cut(rank)
    scaling = scaling_at(layer, rank, uses_rslora)
    small = replace(layer, A=layer.A[:rank], B=layer.B[:, :rank], scaling=scaling)
    return refactored(small, *spectrum.balanced(scaling / layer.scaling))


def leading_cut(layer: LoraLayer, rank: int, uses_rslora: bool) -> LoraLayer:
    """Return the first `rank` directions of `layer`, with that rank's scaling."""
    scaling = scaling_at(layer, rank, uses_rslora)
    share = math.sqrt(layer.scaling / scaling)
    A, B = layer.A[:rank].astype(np.float64), layer.B[:, :rank].astype(np.float64)
    return rounded(layer, share * B, share * A, scaling)


def broadcast_cut(cut: Cut) -> Callable[[ServerState, ClientProfile], Broadcast]:
    """Return a `Method.broadcast` that cuts each layer to at most the client's rank.

    Clients of one rank get the same object: cutting, and encoding it for the wire, happen once.
    """
    kept: list[tuple[Adapter, Adapter | None, dict[int, Broadcast]]] = []  # of the last state

    def broadcast(state: ServerState, profile: ClientProfile) -> Broadcast:
        rank = profile.rank
        if rank is None or rank >= max(state.trainable.ranks):
            return state.broadcast
        if rank < 1:
            raise FederationError(
                f"client {profile.client_id!r}: expected a rank >= 1, found {rank}"
            )
        if not kept or kept[0][0] is not state.trainable or kept[0][1] is not state.frozen:
            kept[:] = [(state.trainable, state.frozen, {})]
        by_rank = kept[0][2]
        if rank not in by_rank:
            by_rank[rank] = Broadcast(_cut_adapter(state.trainable, rank, cut), state.frozen)
        return by_rank[rank]

    return broadcast


def _cut_adapter(adapter: Adapter, rank: int, cut: Cut) -> Adapter:
    config, rslora = adapter.config, adapter.config.uses_rslora
    small = adapter.map(lambda layer: layer if layer.rank <= rank else cut(layer, rank, rslora))
    capped = {path: min(value, rank) for path, value in config.rank_pattern.items()}
    return replace(small, config=replace(config, rank=min(config.rank, rank), rank_pattern=capped))


def with_rank(adapter: Adapter, rank: int) -> Adapter:
    """Return a place for products at another rank: that rank's scalings, all of B zero.

    Rows of A are the adapter's own as far as they go, then fresh ones.
    """
    seed, config = _seed_of(adapter), adapter.config
    layers = {}
    for path, layer in adapter.layers.items():
        new = initial_A(path, rank, layer.in_shape, seed)
        layers[path] = replace(
            layer,
            A=np.concatenate([layer.A[:rank], new[layer.rank :]]),
            B=np.zeros((layer.out_features, rank), np.float32),
            scaling=scaling_at(layer, rank, config.uses_rslora),
        )
    return replace(adapter, layers=layers, config=replace(config, rank=rank, rank_pattern={}))


def fresh_A(adapter: Adapter) -> Adapter:
    """Return an adapter like this one with a new random A and a zero B.

    A is drawn as A₀ was, keyed by the fingerprint of `adapter`. So the first A, which came from the
    run's seed, decides all that follow, and a state that was saved has all that is needed.
    """
    seed = _seed_of(adapter)
    layers = {
        path: replace(
            layer,
            A=initial_A(path, layer.rank, layer.in_shape, seed),
            B=np.zeros_like(layer.B),
        )
        for path, layer in adapter.layers.items()
    }
    return replace(adapter, layers=layers)


def side_adapter(like: Adapter, spectra: Mapping[str, Spectrum]) -> Adapter | None:
    """Return products as an adapter of scaling 1 beside `like`; None when all are zero.

    Where only some layers are zero, these have one direction of zeros: what reads a frozen adapter
    finds the layers that the trainable one has.
    """
    if not any(spectrum.rank for spectrum in spectra.values()):
        return None
    layers = {}
    for path, spectrum in spectra.items():
        layer, rank = like[path], max(spectrum.rank, 1)
        B, A = np.zeros((layer.out_features, rank)), np.zeros((rank, *layer.in_shape))
        B[:, : spectrum.rank], right = spectrum.balanced()
        A[: spectrum.rank] = right.reshape(-1, *layer.in_shape)
        layers[path] = rounded(layer, B, A, 1.0)
    # What a stack says of itself: scalings are 1, and ranks are each layer's own.
    return stack([replace(like, layers=layers)])


def _seed_of(adapter: Adapter) -> int:
    return int(adapter.fingerprint()[:16], 16)
