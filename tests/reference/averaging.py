"""FedIT and FFA-LoRA as the papers write them: dense products, plain loops, all in memory."""

from __future__ import annotations

import numpy as np

from fedlora.aggregation import Update

Factors = dict[str, tuple[np.ndarray, np.ndarray]]


def fedit(updates: list[Update]) -> Factors:
    """A = sum p_k A_k and B = sum p_k B_k, as path -> (A, B) in float64 (arXiv:2305.05644)."""
    total = sum(update.num_examples for update in updates)
    means: Factors = {}
    for path in updates[0].adapter:
        a = np.zeros(updates[0].adapter[path].A.shape)
        b = np.zeros(updates[0].adapter[path].B.shape)
        for update in updates:
            share = update.num_examples / total
            a = a + share * np.array(update.adapter[path].A, dtype=np.float64)
            b = b + share * np.array(update.adapter[path].B, dtype=np.float64)
        means[path] = (a, b)
    return means


def mean_delta_weights(updates: list[Update]) -> dict[str, np.ndarray]:
    """The exact target: sum p_k s_k B_k A_k, as path -> (out, in...) float64."""
    total = sum(update.num_examples for update in updates)
    sums: dict[str, np.ndarray] = {}
    for update in updates:
        for path, layer in update.adapter.layers.items():
            b, a = layer.B.astype(np.float64), layer.A.astype(np.float64)
            delta = layer.scaling * np.tensordot(b, a, axes=(1, 0))
            sums[path] = sums.get(path, 0.0) + update.num_examples / total * delta
    return sums
