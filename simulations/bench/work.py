"""How much arithmetic a round is, and how much of it this machine could do.

Multiplications and additions of matrix products, counted from the shapes that reach each layer in
one forward pass over one batch, with P positions (rows x length; a pooled layer sees fewer):

    frozen layer, forward                           2 P in out
    frozen layer, gradient of its inputs            2 P in out   where something below is trained
    LoRA of rank r, forward                         2 P r (in + out)
    LoRA, gradients of A and B                      2 P r (in + out)
    LoRA, gradient of A's output                    2 P r out
    LoRA, gradient of its inputs                    2 P r in     where something below is trained
    attention, apart: forward 4 P T d, backward 8 P T d a layer (T: length, d: features)

Frozen weights have no gradient. This is the work of one client after another. An engine that does
less (because it keeps what no adapter changes, or packs rows without their padding) is credited
with all of it, and its share of the peak is then of useful work and may be over 1.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from fedlora.nn import Batch, Task
from fedlora.nn.inject import lora_modules
from fedlora.nn.layers import LoraModule

__all__ = ["Work", "gemm_peak", "work_of"]

SIDE = 1024  # of the square matrices whose product measures the peak


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations of a batch's forward and backward pass."""

    frozen_forward: int = 0
    frozen_backward: int = 0
    lora: int = 0
    attention: int = 0  # not in `products`

    @property
    def products(self) -> int:
        """Of the layers' matrix products: what is compared with the peak."""
        return self.frozen_forward + self.frozen_backward + self.lora

    def as_dict(self) -> dict[str, int]:
        """The parts and `products`."""
        return asdict(self) | {"products": self.products}


def work_of(model: nn.Module, task: Task, batch: Batch, attention: tuple[int, int]) -> Work:
    """Count one batch by watching the layers of an injected model; `attention`: layers, features.

    A batch that is padded counts with its padding. Raises what `Task.loss` raises.
    """
    counted = {"frozen_forward": 0, "frozen_backward": 0, "lora": 0}
    adapted = {id(layer.base_layer): layer for layer in lora_modules(model).values()}

    def watch(module: Any, inputs: tuple[Any, ...]) -> None:
        if id(module) in adapted:  # counted by its wrapper, which may not call it
            return
        x = inputs[0]
        base = module.base_layer if isinstance(module, LoraModule) else module
        product = 2 * (x.numel() // x.shape[-1]) * base.in_features * base.out_features
        counted["frozen_forward"] += product
        # The head is above every adapter, and so are most layers; those below need no gradient.
        counted["frozen_backward"] += product if x.requires_grad else 0
        if isinstance(module, LoraModule):
            rank, out = module.lora_A.shape[0], base.out_features
            per_rank = 2 * (2 * (base.in_features + out)) + 2 * out
            per_rank += 2 * base.in_features if x.requires_grad else 0
            counted["lora"] += (x.numel() // x.shape[-1]) * rank * per_rank

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | LoraModule)]
    hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        task.loss(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    rows, length = batch["inputs"].shape
    blocks, width = attention
    backward = _adapted_blocks(model, blocks)
    per_block = rows * length * length * width
    return Work(**counted, attention=per_block * (4 * blocks + 8 * backward))


def gemm_peak(seconds: float = 0.5) -> float:
    """Return the best GFLOP/s of float32 products of 1024 x 1024 matrices on one thread.

    The caller's torch must be set to one thread. Best of as many as fit in `seconds`.
    """
    a, b = torch.rand(SIDE, SIDE), torch.rand(SIDE, SIDE)
    out = torch.empty(SIDE, SIDE)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * SIDE**3 / best / 1e9


def _adapted_blocks(model: nn.Module, blocks: int) -> int:
    """Blocks through whose attention a gradient goes: from the lowest adapted one upwards."""
    numbers = [int(p) for path in lora_modules(model) for p in path.split(".") if p.isdigit()]
    return blocks - min(numbers, default=0)
