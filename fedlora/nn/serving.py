"""One adapter served for many passes: its products are added to the frozen weights beforehand.

An adapter beside a layer costs two more products and an addition in every pass, which for a small
model is a tenth of the time and more. Whoever evaluates one adapter on a lot of data adds it up
once. The frozen weights themselves are not touched: other threads may be using them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.adapter import Adapter
from fedlora.nn.inject import load_adapter_into, lora_modules
from fedlora.nn.kept import MERGED_WEIGHTS
from fedlora.nn.layers import LoraConv, LoraLinear, LoraModule
from fedlora.nn.local import evaluating

__all__ = ["can_be_summed", "serving"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def serving(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Let an injected model compute with `adapter` in this block, in evaluation mode.

    Its outputs are those of the adapter beside the base up to rounding, and they have no gradient
    with respect to the factors. The model is left with that adapter. Raises what
    `load_adapter_into` raises.
    """
    load_adapter_into(model, adapter)
    modules = [module for module in lora_modules(model).values() if can_be_summed(module)]
    if sum(module.base_layer.weight.numel() for module in modules) > MERGED_WEIGHTS:
        modules = []
    try:
        for module in modules:
            # On the instance, which `nn.Module.__call__` looks at first.
            object.__setattr__(module, "forward", _forward(module))
        with evaluating(model):
            yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def can_be_summed(module: LoraModule) -> bool:
    """Whether the module computes one product with one float32 weight, and nothing else."""
    base = module.base_layer
    if module.merged or base.weight.dtype != torch.float32:
        return False
    if isinstance(module, LoraLinear):
        return module.is_plain
    return isinstance(module, LoraConv) and type(base) in CONVOLUTIONS


def _forward(module: LoraModule) -> Callable[[Tensor], Tensor]:
    base = module.base_layer
    changes = module.magnitude is not None or bool(module.lora_B.any())
    weight = module.merged_weight() if changes else base.weight
    bias: Tensor | None = base.bias

    def linear(x: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    def convolution(x: Tensor) -> Tensor:
        y: Tensor = base._conv_forward(x, weight, bias)
        return y

    return linear if isinstance(module, LoraLinear) else convolution
