"""Optimizers over one flat float32 row of all trained factors, in place. NumPy only.

Formulas and order of operations are those of torch's, so that a device and a client in torch take
the same steps: `torch.optim.AdamW` (arXiv:1711.05101, algorithm 2), `torch.optim.SGD` and
`torch.nn.utils.clip_grad_norm_`. Scalars are Python's double precision until they meet the row.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from fedlora.adapter import Array
from fedlora.training import TrainConfig

__all__ = ["AdamW", "Optimizer", "Sgd", "add_proximal", "clip", "optimizer_of"]

BETAS, EPS = (0.9, 0.999), 1e-8
_CLIP_EPS = 1e-6  # clip_grad_norm_'s, which keeps a zero gradient from dividing by zero


class Optimizer(Protocol):
    """Steps a row; both arguments are (n,) float32, always of the same n."""

    def step(self, row: Array, gradient: Array) -> None:
        """Change `row` in place. `gradient` may be used as scratch memory."""


class AdamW:
    """Adam with decoupled weight decay: betas 0.9 and 0.999, eps 1e-8.

    eps is added to the root and not inside it, and a factor whose gradient has always been zero
    divides 0 by eps: it stays where it is, up to its weight decay.
    """

    def __init__(self, size: int, learning_rate: float, weight_decay: float = 0.0) -> None:
        self._rate, self._decay, self._steps = learning_rate, weight_decay, 0
        self._first = np.zeros(size, np.float32)
        self._second = np.zeros(size, np.float32)
        self._scratch = np.empty(size, np.float32)

    def step(self, row: Array, gradient: Array) -> None:
        """Change `row` in place; `gradient` is overwritten."""
        self._steps += 1
        first, second, scratch = self._first, self._second, self._scratch
        if self._decay:
            row *= np.float32(1 - self._rate * self._decay)
        # first.lerp_(gradient, 1 - beta1)
        np.subtract(gradient, first, out=scratch)
        scratch *= np.float32(1 - BETAS[0])
        first += scratch
        # second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        second *= np.float32(BETAS[1])
        np.multiply(gradient, gradient, out=scratch)
        scratch *= np.float32(1 - BETAS[1])
        second += scratch
        # row.addcdiv_(first, second.sqrt() / sqrt(1 - beta2 ** t) + eps, value=-step size)
        np.sqrt(second, out=scratch)
        scratch /= np.float32(math.sqrt(1 - BETAS[1] ** self._steps))
        scratch += np.float32(EPS)
        np.divide(first, scratch, out=gradient)
        gradient *= np.float32(self._rate / (1 - BETAS[0] ** self._steps))
        row -= gradient


class Sgd:
    """Stochastic gradient descent; weight decay is added to the gradient, momentum as torch's."""

    def __init__(
        self, size: int, learning_rate: float, weight_decay: float = 0.0, momentum: float = 0.0
    ) -> None:
        self._rate, self._decay, self._momentum = learning_rate, weight_decay, momentum
        # Without momentum there is nothing to remember.
        self._velocity = np.zeros(size, np.float32) if momentum else None
        self._scratch = np.empty(size, np.float32)

    def step(self, row: Array, gradient: Array) -> None:
        """Change `row` in place; `gradient` is overwritten with weight decay only."""
        if self._decay:
            np.multiply(row, np.float32(self._decay), out=self._scratch)
            gradient += self._scratch
        if self._velocity is not None:
            # From zero, so that the first step is the gradient itself, as torch's is.
            self._velocity *= np.float32(self._momentum)
            self._velocity += gradient
            gradient = self._velocity
        np.multiply(gradient, np.float32(self._rate), out=self._scratch)
        row -= self._scratch


def optimizer_of(config: TrainConfig, size: int) -> Optimizer:
    """Return a new optimizer for a row of `size` numbers."""
    if config.optimizer == "adamw":
        return AdamW(size, config.learning_rate, config.weight_decay)
    return Sgd(size, config.learning_rate, config.weight_decay, config.momentum)


def add_proximal(gradient: Array, row: Array, start: Array, weight: float) -> None:
    """Add ``weight * (row - start)`` to `gradient` in place (arXiv:1812.06127, equation 2)."""
    difference = row - start
    difference *= np.float32(weight)
    gradient += difference


def clip(gradient: Array, most: float) -> float:
    """Scale `gradient` in place to an L2 norm of at most `most`; return the norm it had.

    The norm is summed in float64, so that it does not depend on how many factors there are.
    """
    norm = math.sqrt(float(np.einsum("i,i->", gradient, gradient, dtype=np.float64)))
    scale = most / (norm + _CLIP_EPS)
    if scale < 1:
        gradient *= np.float32(scale)
    return norm
