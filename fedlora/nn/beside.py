"""Training beside a frozen adapter: the part of the global adapter that clients do not train.

Some methods keep what the trained factors cannot hold (a stack of old updates, a residual) in a
second adapter, which every client carries along (`fedlora.aggregation.Broadcast.frozen`). To its
training the base then is ``W + scaling * B_F @ A_F``. Here that sum takes the frozen weight's place
in one copy of the model for a while. The base's own weights are not touched: other threads may be
using them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fedlora.adapter import Adapter, LoraLayer
from fedlora.errors import ConfigError, UnsupportedError
from fedlora.nn.inject import lora_modules, require_fitting, summed_weights
from fedlora.nn.kept import SummedWeights
from fedlora.nn.layers import LoraEmbedding, LoraModule
from fedlora.nn.serving import can_be_summed

__all__ = ["beside"]


@contextmanager
def beside(model: nn.Module, frozen: Adapter | None) -> Iterator[None]:
    """Let an injected model's base be base plus `frozen` in this block; None: nothing is added.

    What the model carries as its own adapter is loaded, trained, batched and taken out as ever. Its
    outputs are those of ``stack([own, frozen])`` up to rounding. Where that is one float32 weight
    (linear, convolution), the sum is made once for an adapter and kept (`SummedWeights`), so that a
    step costs what it costs without; anywhere else, a quantized base or an embedding, say, two
    low-rank products are added in each pass.

    Activations that are kept from below the first adapted block (`fedlora.nn.prefix`) stay good:
    `frozen` has the layers of the own adapter, and changes nothing below them. In this block the
    model is not for merging, fingerprinting or copying.

    Raises what `load_adapter_into` raises of an adapter that does not fit, `UnsupportedError` for
    DoRA and for an embedding with a max_norm, and `ConfigError` for a merged model.
    """
    if frozen is None:
        yield
        return
    modules = lora_modules(model)
    require_fitting(model, frozen, "the frozen adapter")
    for path, module in modules.items():
        _require_supported(path, module)
    sums = summed_weights(model)
    summed = {path: module for path, module in modules.items() if can_be_summed(module)}
    # More would not stay from one group of clients to the next.
    if sum(module.base_layer.weight.numel() for module in summed.values()) > sums.limit:
        summed = {}
    name = sums.name_of(frozen)
    before = [(module, module.base_layer) for module in modules.values()]
    try:
        for path, module in modules.items():
            if path in summed:
                module.set_base(_sum(path, module, frozen[path], name, sums))
            else:
                module.set_base(_pair(module, frozen[path]))
        yield
    finally:
        for module, base in before:
            module.set_base(base)


def _require_supported(path: str, module: LoraModule) -> None:
    if module.merged:
        raise ConfigError(
            "the frozen adapter: the model's own is merged into the base; call unmerge_lora first"
        )
    if module.magnitude is not None:
        raise UnsupportedError(
            f"the frozen adapter, layer {path!r}: DoRA normalizes the base's weight, which is not "
            "the base's beside another adapter; use variant 'lora'"
        )
    if isinstance(module, LoraEmbedding) and module.base_layer.max_norm is not None:
        raise UnsupportedError(
            f"the frozen adapter, layer {path!r}: an embedding with a max_norm rescales its rows "
            "in place; leave the layer out of target_modules"
        )


def _sum(
    path: str, module: LoraModule, frozen: LoraLayer, name: str, sums: SummedWeights
) -> nn.Module:
    """Return the base's module with the adapter in its weight; all else of it is shared."""
    base: nn.Module = module.base_layer

    def make() -> nn.Parameter:
        weight = type(module)(base, frozen, 0.0).merged_weight()
        return nn.Parameter(weight, requires_grad=False)

    twin = copy.copy(base)
    weight = sums.of(name, path, module.base_layer.weight, make)
    vars(twin)["_parameters"] = {**base._parameters, "weight": weight}
    return twin


def _pair(module: LoraModule, frozen: LoraLayer) -> nn.Module:
    """Return a module of base and adapter, which has the base's attributes."""
    with torch.no_grad():
        pair = type(module)(module.base_layer, frozen, 0.0)
    return pair.requires_grad_(False)
