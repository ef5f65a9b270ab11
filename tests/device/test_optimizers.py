"""The device's optimizers against torch's, and what becomes of factors without a gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedlora.device.optimizers import AdamW, Sgd, add_proximal, clip, optimizer_of
from fedlora.training import TrainConfig

SHAPES = [(4, 7), (9, 4), (2, 3, 5), (6, 2)]
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)
STEPS = 40


def gradients() -> np.ndarray[Any, Any]:
    """(steps, n), of very different sizes, as the gradients of factors are."""
    random = np.random.default_rng(1)
    sizes = 10.0 ** random.uniform(-6, 1, SIZE)
    return (random.normal(size=(STEPS, SIZE)) * sizes).astype(np.float32)


def start() -> np.ndarray[Any, Any]:
    return np.random.default_rng(2).normal(size=SIZE).astype(np.float32)


def parameters(row: np.ndarray[Any, Any]) -> list[nn.Parameter]:
    cuts = np.cumsum([int(np.prod(shape)) for shape in SHAPES])[:-1]
    parts = zip(np.split(row, cuts), SHAPES, strict=True)
    return [nn.Parameter(torch.tensor(part.reshape(shape))) for part, shape in parts]


def flat(tensors: list[Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([tensor.detach().numpy().reshape(-1) for tensor in tensors])


CASES = [
    TrainConfig(local_steps=1, learning_rate=1e-2),
    TrainConfig(local_steps=1, learning_rate=3e-3, weight_decay=0.1),
    TrainConfig(local_steps=1, learning_rate=1e-3, optimizer="sgd"),
    TrainConfig(local_steps=1, learning_rate=1e-3, optimizer="sgd", weight_decay=0.05),
    TrainConfig(local_steps=1, learning_rate=1e-3, optimizer="sgd", momentum=0.9),
    TrainConfig(
        local_steps=1, learning_rate=1e-3, optimizer="sgd", momentum=0.5, weight_decay=0.01,
        max_grad_norm=0.5,
    ),
    TrainConfig(local_steps=1, learning_rate=1e-2, weight_decay=0.01, max_grad_norm=1.0),
]  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("config", CASES, ids=str)
def test_forty_steps_are_those_of_torch(config: TrainConfig, fused: bool) -> None:
    row, theirs = start(), parameters(start())
    ours = optimizer_of(config, SIZE)
    if config.optimizer == "adamw":
        twin: Any = torch.optim.AdamW(
            theirs, config.learning_rate, weight_decay=config.weight_decay, fused=fused
        )
    else:
        twin = torch.optim.SGD(
            theirs, config.learning_rate, momentum=config.momentum,
            weight_decay=config.weight_decay, fused=fused,
        )  # fmt: skip
    for gradient in gradients():
        mine = gradient.copy()
        for parameter, part in zip(theirs, parameters(gradient), strict=True):
            parameter.grad = part.data.clone()
        if config.max_grad_norm is not None:
            expected = nn.utils.clip_grad_norm_(theirs, config.max_grad_norm)
            assert clip(mine, config.max_grad_norm) == pytest.approx(float(expected), rel=1e-6)
        ours.step(row, mine)
        twin.step()
    # Forty roundings of float32 at numbers of about 1, some of which are multiplied by a fused
    # kernel in one rounding and here in two.
    np.testing.assert_allclose(row, flat(theirs), rtol=0, atol=1e-6)


def test_a_factor_whose_gradient_is_always_zero_stays_exactly_where_it_is() -> None:
    """A graph without the 1e-8 would compute 0 / 0 here."""
    row, still = start(), slice(5, 40)
    before = row[still].copy()
    optimizer = AdamW(SIZE, 1e-2)
    for gradient in gradients():
        gradient = gradient.copy()
        gradient[still] = 0
        optimizer.step(row, gradient)
    np.testing.assert_array_equal(row[still], before)
    assert np.isfinite(row).all()
    assert np.abs(row - start())[40:].min() > 1e-4


def test_gradients_too_small_to_square_do_not_become_nan() -> None:
    """1e-30 squared is 0 in float32: its root is 0, and only eps is left to divide by."""
    row = np.ones(3, np.float32)
    AdamW(3, 1e-2).step(row, np.full(3, 1e-30, np.float32))
    np.testing.assert_array_equal(row, np.ones(3, np.float32))


def test_clipping_leaves_zero_and_small_gradients_as_they_are() -> None:
    zero, small = np.zeros(4, np.float32), np.full(4, 0.1, np.float32)
    assert clip(zero, 1.0) == 0.0
    assert clip(small, 1.0) == pytest.approx(0.2)
    np.testing.assert_array_equal(zero, 0)
    np.testing.assert_array_equal(small, np.full(4, 0.1, np.float32))


def test_the_proximal_term_is_the_distance_from_the_start() -> None:
    gradient = np.array([1.0, 2.0], np.float32)
    add_proximal(gradient, np.array([3.0, 3.0], np.float32), np.array([1.0, 4.0], np.float32), 0.5)
    np.testing.assert_array_equal(gradient, [2.0, 1.5])


def test_steps_work_on_the_row_itself() -> None:
    """The row may be a view of memory that an ONNX Runtime session reads from."""
    whole = np.zeros(10, np.float32)
    Sgd(4, 1.0).step(whole[3:7], np.ones(4, np.float32))
    np.testing.assert_array_equal(whole, [0, 0, 0, -1, -1, -1, -1, 0, 0, 0])
