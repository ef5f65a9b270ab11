"""The server optimizers as their papers write them: one number after another, in plain Python."""

from __future__ import annotations

import math

# What a server keeps of one coordinate: (x, m, v).
Coordinate = tuple[float, float, float]


def momentum(x: float, m: float, mean: float, lr: float, beta: float) -> Coordinate:
    """FedAvgM (arXiv:1909.06335): v is not used."""
    m = beta * m + (mean - x)
    return x + lr * m, m, 0.0


def adaptive(
    name: str, at: Coordinate, mean: float, lr: float, beta1: float, beta2: float, tau: float
) -> Coordinate:
    """Algorithm 2 of arXiv:2003.00295, lines 10 to 14, for one coordinate."""
    x, m, v = at
    delta = mean - x
    m = beta1 * m + (1 - beta1) * delta
    if name == "adagrad":
        v = v + delta**2
    elif name == "yogi":
        sign = (v > delta**2) - (v < delta**2)
        v = v - (1 - beta2) * delta**2 * sign
    elif name == "adam":
        v = beta2 * v + (1 - beta2) * delta**2
    else:
        raise ValueError(name)
    return x + lr * m / (math.sqrt(v) + tau), m, v
