"""Layers whose LoRA factors are arguments of the traced function.

While a graph is recorded, each chosen module stands inside a wrapper that reads its factors from a
list; afterwards the model is what it was. The scaling is folded into B.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.errors import UnsupportedError
from fedlora.nn.layers import CONVOLUTIONS
from fedlora.targets import LayerSpec

__all__ = ["FactorLayer", "exchanged", "with_factors"]


class FactorLayer(nn.Module):
    """A frozen module and what is added to it: ``factors``, pairs (A, B) of any rank."""

    base_layer: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        self.factors: list[tuple[Tensor, Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class _Linear(FactorLayer):
    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features): 2-D products of all rows."""
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor = self.base_layer(rows)
        for A, B in self.factors:
            y = torch.addmm(y, rows @ A.t(), B.t())
        return y.view(*x.shape[:-1], y.shape[-1])


class _Conv(FactorLayer):
    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, *size) to (batch, out_channels, *size)."""
        y: Tensor = self.base_layer(x)
        for A, B in self.factors:
            pointwise = B.view(*B.shape, *(1,) * (A.ndim - 2))
            y = y + CONVOLUTIONS[A.ndim](self.base_layer._conv_forward(x, A, None), pointwise)
        return y


class _Embedding(FactorLayer):
    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 to (..., dim)."""
        base = self.base_layer
        y: Tensor = base(ids)
        scale = getattr(base, "embed_scale", None)
        for A, B in self.factors:
            rows = F.embedding(ids, A.t(), padding_idx=base.padding_idx)
            low = (rows.reshape(-1, A.shape[0]) @ B.t()).view(y.shape)
            y = y + (low if scale is None else low * scale)
        return y


WRAPPERS = {"linear": _Linear, "conv": _Conv, "embedding": _Embedding}


@contextmanager
def with_factors(
    model: nn.Module, specs: Mapping[str, LayerSpec]
) -> Iterator[dict[str, FactorLayer]]:
    """Put wrappers around the modules at these paths for this block; yield them by path.

    Raises `UnsupportedError` for an embedding that rescales its rows while they are read.
    """
    wrappers = {}
    for path, spec in specs.items():
        module = model.get_submodule(path)
        if getattr(module, "max_norm", None) is not None:
            raise UnsupportedError(
                f"export, layer {path!r}: an embedding with max_norm changes its own weight when "
                "it is read, which a graph cannot; leave max_norm out"
            )
        wrappers[path] = WRAPPERS[spec.kind](module)
    with exchanged(model, {layer.base_layer: layer for layer in wrappers.values()}):
        yield wrappers


@contextmanager
def exchanged(model: nn.Module, by: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Exchange modules wherever the model holds them, for this block."""
    ours = set(by.values())
    places: list[tuple[nn.Module, str, nn.Module]] = [
        (parent, name, child)
        for parent in model.modules()
        if parent not in ours
        for name, child in parent._modules.items()
        if child is not None and child in by
    ]
    try:
        for parent, name, child in places:
            parent._modules[name] = by[child]
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def set_factors(
    wrappers: Mapping[str, FactorLayer], groups: Sequence[Mapping[str, tuple[Tensor, Tensor]]]
) -> None:
    """Give every wrapper its pair (A, B) of each group: the adapter, then a frozen one."""
    for path, wrapper in wrappers.items():
        wrapper.factors = [group[path] for group in groups]
