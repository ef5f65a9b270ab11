"""Local training written out: one weight W + s·B·A a layer, the optimizers as formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedlora.training import TrainConfig

Factors = dict[str, Tensor]  # "layer.A" and "layer.B"


def train(
    base: nn.Module,
    factors: Mapping[str, Tensor],
    scaling: float,
    batches: Sequence[Mapping[str, np.ndarray]],
    config: TrainConfig,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    trained: Sequence[str] = ("A", "B"),
    correction: Mapping[str, Tensor] | None = None,
) -> tuple[Factors, float]:
    """Return the factors after one step a batch, and the mean loss. Float64 throughout.

    correction: by factor, added to the gradient after clipping.
    """
    base = base.double()
    now = {name: value.detach().double() for name, value in factors.items()}
    moving = [name for name in now if name.rpartition(".")[2] in trained]
    first = {name: torch.zeros_like(now[name]) for name in moving}
    second = {name: torch.zeros_like(now[name]) for name in moving}
    losses = []
    for step, batch in enumerate(batches, start=1):
        leaves = {name: value.clone().requires_grad_(name in moving) for name, value in now.items()}
        weights = {
            f"{path}.weight": base.get_submodule(path).weight + scaling * (leaves[f"{path}.B"] @ A)
            for path, A in ((n.removesuffix(".A"), v) for n, v in leaves.items() if n.endswith("A"))
        }
        logits = functional_call(base, weights, torch.tensor(batch["inputs"]).double())
        loss = loss_of(logits, torch.tensor(batch["targets"]))
        losses.append(float(loss.detach()))
        found = torch.autograd.grad(loss, [leaves[name] for name in moving])
        gradients = dict(zip(moving, found, strict=True))
        if config.max_grad_norm is not None:
            norm = sum(float((g**2).sum()) for g in found) ** 0.5
            factor = min(1.0, config.max_grad_norm / (norm + 1e-6))
            gradients = {name: factor * g for name, g in gradients.items()}
        if correction is not None:
            gradients = {name: g + correction[name].double() for name, g in gradients.items()}
        for name, g in gradients.items():
            update = _adamw if config.optimizer == "adamw" else _sgd
            now[name] = update(now[name], g, first, second, name, step, config)
    return now, sum(losses) / len(losses)


def _adamw(
    value: Tensor, g: Tensor, first: Factors, second: Factors, name: str, step: int, c: TrainConfig
) -> Tensor:
    """Decoupled weight decay (arXiv:1711.05101, algorithm 2)."""
    first[name] = 0.9 * first[name] + 0.1 * g
    second[name] = 0.999 * second[name] + 0.001 * g**2
    mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
    decayed = value * (1 - c.learning_rate * c.weight_decay)
    return decayed - c.learning_rate * mean / (square.sqrt() + 1e-8)


def _sgd(
    value: Tensor, g: Tensor, first: Factors, second: Factors, name: str, step: int, c: TrainConfig
) -> Tensor:
    """Momentum without dampening; weight decay is part of the gradient."""
    first[name] = c.momentum * first[name] + g + c.weight_decay * value
    return value - c.learning_rate * first[name]
