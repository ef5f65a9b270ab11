"""Mistakes that published code makes, each as a method: the laws must tell them from the real ones.

fedex-unscaled     the residual forgets lora_alpha / r
fedex-transposed   the residual of B and A that changed places, (B A) transposed
flexlora-rootless  B = U and A = Vᵀ: the singular values are left out of both
ffa-summed         clients are summed and not averaged
flora-unweighted   the stack's weights are forgotten
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from fedlora.adapter import Adapter
from fedlora.aggregation import Method, ServerState, Update, method
from fedlora.aggregation.ranks import refactored


def _side(state: ServerState, sums: dict[str, np.ndarray]) -> Adapter:
    layers = {}
    for path, delta in sums.items():
        layer = state.trainable[path]
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        A = (s[:, None] * vt).reshape(-1, *layer.in_shape)
        layers[path] = replace(layer, A=A, B=u, scaling=1.0)
    return replace(state.trainable, layers=layers)


def _residual(state: ServerState, updates: list[Update], *, scaled: bool, turned: bool) -> Adapter:
    total = sum(update.num_examples for update in updates)
    result = {}
    for path, layer in state.trainable.layers.items():
        shares = [update.num_examples / total for update in updates]
        a = [u.adapter[path].A.reshape(layer.rank, -1).astype(float) for u in updates]
        b = [u.adapter[path].B.astype(float) for u in updates]
        mean_a = sum(p * x for p, x in zip(shares, a, strict=True))
        mean_b = sum(p * x for p, x in zip(shares, b, strict=True))
        delta = sum(p * y @ x for p, y, x in zip(shares, b, a, strict=True)) - mean_b @ mean_a
        result[path] = (layer.scaling if scaled else 1.0) * (delta.T if turned else delta)
    return _side(state, result)


def _fedex(*, scaled: bool, turned: bool) -> Method:
    def aggregate(state: ServerState, updates: Iterable[Update]) -> ServerState:
        kept = list(updates)
        after = method("fedit").aggregate(state, kept)
        return replace(after, frozen=_residual(state, kept, scaled=scaled, turned=turned))

    return replace(method("fedex-lora"), aggregate=aggregate)


def _flexlora_rootless() -> Method:
    def aggregate(state: ServerState, updates: Iterable[Update]) -> ServerState:
        kept = list(updates)
        total, layers = sum(update.num_examples for update in kept), {}
        for path, layer in state.trainable.layers.items():
            delta = sum(
                u.num_examples / total * u.adapter[path].scaling
                * u.adapter[path].B.astype(float)
                @ u.adapter[path].A.reshape(u.adapter[path].rank, -1)
                for u in kept
            )  # fmt: skip
            u, s, vt = np.linalg.svd(delta, full_matrices=False)
            u, half = u[:, : layer.rank], (np.sqrt(s)[:, None] * vt)[: layer.rank]
            layers[path] = refactored(layer, u, half)
        trainable = replace(state.trainable, layers=layers)
        return replace(state, round=state.round + 1, trainable=trainable)

    return replace(method("flexlora"), aggregate=aggregate)


def _ffa_summed() -> Method:
    def aggregate(state: ServerState, updates: Iterable[Update]) -> ServerState:
        kept = list(updates)
        after = method("ffa-lora").aggregate(state, kept)
        return replace(after, trainable=after.trainable.scaled(len(kept)))

    return replace(method("ffa-lora"), aggregate=aggregate)


def _flora_unweighted() -> Method:
    def aggregate(state: ServerState, updates: Iterable[Update]) -> ServerState:
        kept = list(updates)
        after = method("flora").aggregate(state, kept)
        return replace(after, frozen=after.frozen and after.frozen.scaled(len(kept)))

    return replace(method("flora"), aggregate=aggregate)


WRONG: dict[str, Method] = {
    "fedex-unscaled": _fedex(scaled=False, turned=False),
    "fedex-transposed": _fedex(scaled=True, turned=True),
    "flexlora-rootless": _flexlora_rootless(),
    "ffa-summed": _ffa_summed(),
    "flora-unweighted": _flora_unweighted(),
}
