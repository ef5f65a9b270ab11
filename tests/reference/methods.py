"""What every method's adapter must be, as dense matrices: loops and products, all in memory.

Each takes the whole product of the state before, (path -> (out, in) float64), and the updates, and
gives the products after the round. Convolutions are flattened.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedlora.aggregation import ServerState, Update

Products = dict[str, np.ndarray]


def factors(update: Update, path: str) -> tuple[np.ndarray, np.ndarray, float]:
    layer = update.adapter[path]
    return layer.B.astype(float), layer.A.reshape(layer.rank, -1).astype(float), layer.scaling


def mean_products(updates: list[Update]) -> Products:
    """Sum p_k s_k B_k A_k."""
    total = sum(update.num_examples for update in updates)
    sums: Products = {}
    for update in updates:
        for path in update.adapter:
            b, a, s = factors(update, path)
            sums[path] = sums.get(path, 0.0) + update.num_examples / total * s * (b @ a)
    return sums


def frozen_products(state: ServerState) -> Products:
    """What the frozen part adds; nothing without one."""
    if state.frozen is None:
        return {path: np.zeros(1) for path in state.trainable}
    return mean_products([Update(state.frozen, 1.0, "frozen")])


def exact(state: ServerState, updates: list[Update]) -> Products:
    frozen = frozen_products(state)
    return {path: frozen[path] + mean for path, mean in mean_products(updates).items()}


def fedit(state: ServerState, updates: list[Update]) -> Products:
    total = sum(update.num_examples for update in updates)
    result: Products = {}
    for path in state.trainable:
        b, a, s = 0.0, 0.0, 0.0
        for update in updates:
            b_k, a_k, s = factors(update, path)
            b, a = b + update.num_examples / total * b_k, a + update.num_examples / total * a_k
        result[path] = s * (b @ a)
    return result


def fedsa_lora(state: ServerState, updates: list[Update]) -> Products:
    """The mean of A beside the server's own B."""
    total = sum(update.num_examples for update in updates)
    result: Products = {}
    for path, layer in state.trainable.layers.items():
        a = sum(u.num_examples / total * factors(u, path)[1] for u in updates)
        result[path] = layer.scaling * (layer.B.astype(float) @ a)
    return result


def flexlora(state: ServerState, updates: list[Update]) -> Products:
    """The dense SVD of the dense mean, cut."""
    result: Products = {}
    for path, mean in mean_products(updates).items():
        u, s, vt = np.linalg.svd(mean, full_matrices=False)
        rank = state.trainable[path].rank
        result[path] = u[:, :rank] @ np.diag(s[:rank]) @ vt[:rank]
    return result


def hetlora(state: ServerState, updates: list[Update]) -> Products:
    """Pad every client to the global rank and average by the norms of the clients' products."""
    norms = []
    for update in updates:
        squares = [
            np.sum((s * b @ a) ** 2) for b, a, s in (factors(update, p) for p in update.adapter)
        ]
        norms.append(np.sqrt(sum(squares)))
    if not any(norms):
        norms = [1.0] * len(updates)
    result: Products = {}
    for path, layer in state.trainable.layers.items():
        width = layer.A.reshape(layer.rank, -1).shape[1]
        B, A = np.zeros((layer.out_features, layer.rank)), np.zeros((layer.rank, width))
        for norm, update in zip(norms, updates, strict=True):
            b, a, s = factors(update, path)
            share = norm / sum(norms)
            B[:, : b.shape[1]] += share * np.sqrt(s / layer.scaling) * b
            A[: a.shape[0]] += share * np.sqrt(s / layer.scaling) * a
        result[path] = layer.scaling * (B @ A)
    return result


EXPECTED: dict[str, Callable[[ServerState, list[Update]], Products]] = {
    "fedex-lora": exact,
    "fedit": fedit,
    "fedsa-lora": fedsa_lora,
    "fedsvd": exact,
    "ffa-lora": exact,
    "flexlora": flexlora,
    "flora": exact,
    "hetlora": hetlora,
    "rolora": exact,
}
