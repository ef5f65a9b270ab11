"""Each operation alone, emitted and run by ONNX Runtime, against torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.errors import UnsupportedError
from tests.export.traces import emitted_function

Function = Callable[..., Any]


def drawn(*shape: int, positive: bool = False) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return values.abs() + 0.1 if positive else values


def whole(*shape: int, below: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(0, below, shape, generator=generator)


def gradient(function: Function) -> Function:
    """The gradients of a weighted sum of the results by all floating arguments."""

    def backward(*arguments: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [
                a.detach().requires_grad_() if a.is_floating_point() else a for a in arguments
            ]
            result = function(*leaves)
            weights = torch.linspace(0.5, 1.5, result.numel()).view(result.shape)
            asked = [leaf for leaf in leaves if leaf.requires_grad]
            return torch.autograd.grad((result * weights).sum(), asked)

    return backward


def added_in_place(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z.add_(y, alpha=3).pow_(2).div_(4)
    return z.addcmul_(x, y, value=-1)


A, B = drawn(3, 4), drawn(3, 4).roll(5)
IDS = whole(2, 3)
MASK = whole(3, 4, below=2).bool()
POINTWISE: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "add with alpha": (lambda x, y: torch.add(x, y, alpha=2), (A, B)),
    "add a whole number": (lambda x, n: x + n, (A, whole(3, 4))),
    "sub": (lambda x, y: 1 - torch.sub(x, y, alpha=0.5), (A, B)),
    "mul of booleans": (lambda x, m: x * m, (A, MASK)),
    "div": (lambda x, y: x / (y * y + 1) / 3, (A, B)),
    "division of integers": (lambda n: (n // 2).clamp(max=1) + n / 4, (whole(3, 4),)),
    "div by a power of two": (lambda x: x / 8, (A,)),
    "div truncated": (lambda x, y: torch.div(x * 9, y, rounding_mode="trunc"), (A, B)),
    "div floored": (lambda x, y: torch.div(x * 9, y, rounding_mode="floor"), (A, B)),
    "remainder": (lambda x: torch.remainder(x * 5, 3), (A,)),
    "fmod": (lambda x: torch.fmod(x * 5, 3), (A,)),
    "whole modulo": (lambda n: n % 3, (whole(3, 4),)),
    "powers": (lambda x: x**2 + x**3 + x**1 + x**0 + x**4, (A,)),
    "roots": (lambda x: x**0.5 + x**-0.5 + x**-1 + x**1.7 + 2.0**x, (drawn(3, 4, positive=True),)),
    "rsqrt, log": (
        lambda x: x.rsqrt() + x.log() + x.log1p() + x.expm1(),
        (drawn(4, positive=True),),
    ),
    "rounding": (lambda x: x.floor() + x.ceil() + x.sign() + x.abs() + x.round(), (A,)),
    "waves": (lambda x: x.sin() + x.cos() + x.tanh() + x.erf() + x.sigmoid(), (A,)),
    "gelu": (lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"), (A,)),
    "silu, relu": (lambda x: F.silu(x) + F.relu(x), (A,)),
    "comparisons": (lambda x, y: (x < y) & (x <= 1) | (x > 0.5) ^ (y >= 0), (A, B)),
    "equality": (lambda n: (n == 2) | (n != 3) & ~(n == 1), (whole(3, 4),)),
    "whole against float": (lambda n: n > 1.5, (whole(3, 4),)),
    "where": (lambda x, m: torch.where(m, x, -1.0), (A, MASK)),
    "masked_fill": (lambda x, m: x.masked_fill(m, float("-inf")).exp(), (A, MASK)),
    "clamp": (lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0.1) + x.clamp(max=0.2), (A,)),
    "maximum": (lambda x, y: torch.maximum(x, y) - torch.minimum(x, y), (A, B)),
    "in place": (added_in_place, (A, B)),
    "casts": (lambda n: n.float() * 1.5 + n.bool(), (whole(3, 4),)),
}
OVER_AXES: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "sum": (lambda x: x.sum() + x.sum(0) + x.sum(-1, keepdim=True) + x.sum((0, 1)), (A,)),
    "sum of booleans": (lambda m: m.sum(1), (MASK,)),
    "mean": (lambda x: x.mean() + x.mean(1, keepdim=True), (A,)),
    "extremes": (lambda x: x.amax(1) - x.amin(1), (A,)),
    "any, all": (lambda m: (m.any(0), m.all(1), m.any()), (MASK,)),
    "norm": (lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True), (A,)),
    "argmax": (lambda x: x.argmax(-1), (A,)),
    "cumsum": (lambda m: m.cumsum(1), (MASK,)),
    "softmax": (lambda x: x.softmax(-1) + x.log_softmax(0), (A,)),
    "variance": (lambda x: x.var(-1, unbiased=False) + x.var() + x.var(1), (A,)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b), (A, drawn(4), drawn(4) + 1)),
    "layer_norm without weights": (lambda x: F.layer_norm(x, (3, 4)), (drawn(2, 3, 4),)),
    "group_norm": (
        lambda x, w, b: F.group_norm(x, 2, w, b), (drawn(3, 4, 5), drawn(4), drawn(4) + 1),
    ),
}  # fmt: skip
SHAPES: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "view": (lambda x: x.view(2, 6).t().reshape(-1), (A,)),
    "permute": (lambda x: x.permute(2, 0, 1).transpose(0, -1), (drawn(2, 3, 4),)),
    "permutations that cancel": (lambda x: x.permute(2, 0, 1).permute(1, 2, 0), (drawn(2, 3, 4),)),
    "expand": (lambda x: x.unsqueeze(1).expand(-1, 2, -1) + x[None, :2, None, 0], (A,)),
    "squeeze": (lambda x: x.unsqueeze(-1).squeeze(-1).unsqueeze(0).squeeze(), (A,)),
    "slice": (lambda x: x[1:, :-1] + x[:2, 1:4] + x[0:5:2][:, -3:], (A,)),
    "select": (lambda x: x[0] + x[-1] + x[:, 2].sum(), (A,)),
    "split": (lambda x: tuple(p * 2 for p in x.split([1, 3], 1)), (A,)),
    "chunk": (lambda x: tuple(p + 1 for p in x.chunk(2, -1)), (A,)),
    "unbind": (lambda x: tuple(p + 1 for p in x.unbind(0)), (A,)),
    "cat": (lambda x, n: torch.cat([x, n, x], -1), (A, whole(3, 2).float())),
    "stack": (lambda x, y: torch.stack([x, y], 1), (A, B)),
    "flip": (lambda x: x.flip(1), (A,)),
    "roll": (lambda x: x.roll(1, -1) + x.roll(-2, 0), (A,)),
    "repeat": (lambda x: x.repeat(2, 1, 3), (A,)),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), (A,)),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 1), value=3.0), (A,)),
    "triangles": (lambda x: x.tril() + x.triu(1), (A,)),
    "filled": (lambda x: x + torch.full((3, 4), 2.0) * torch.ones_like(x) + torch.zeros(4), (A,)),
    "arange": (lambda x: x + torch.arange(4) + torch.arange(1, 9, 2, dtype=torch.float32), (A,)),
    "slice_scatter": (lambda x, y: torch.slice_scatter(x, y[:, :2], 1, 1, 3), (A, B)),
    "select_scatter": (lambda x, y: torch.select_scatter(x, y[:, 0], 1, -1), (A, B)),
}  # fmt: skip
PRODUCTS: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "mm": (lambda x, y: x @ y.t() + (x.t() @ y).sum() + x @ x.t() @ y @ y.t(), (A, B)),
    "addmm": (lambda b, x, y: torch.addmm(b, x, y.t(), alpha=2, beta=0.5), (drawn(3), A, B)),
    "bmm": (lambda x, y: x @ y.transpose(-1, -2), (drawn(2, 3, 4, 5), drawn(2, 3, 4, 5))),
    "baddbmm": (
        lambda b, x, y: torch.baddbmm(b, x, y, alpha=2, beta=3),
        (drawn(2, 3, 3), drawn(2, 3, 4), drawn(2, 4, 3)),
    ),
    "linear": (lambda x, w, b: F.linear(x, w, b), (drawn(2, 3, 4), drawn(5, 4), drawn(5))),
    "conv1d": (
        lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=3, dilation=2),
        (drawn(2, 3, 20), drawn(4, 3, 5), drawn(4)),
    ),
    "conv1d whose end is not seen": (
        lambda x, w: F.conv1d(x, w, stride=3), (drawn(2, 3, 12), drawn(4, 3, 2)),
    ),
    "conv1d of width one": (lambda x, w: F.conv1d(x, w), (drawn(2, 3, 9), drawn(4, 3, 1))),
    "conv2d": (
        lambda x, w: F.conv2d(x, w, stride=(2, 1), padding=(1, 0)),
        (drawn(2, 3, 7, 6), drawn(4, 3, 3, 2)),
    ),
}  # fmt: skip
INDICES: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "embedding": (lambda w, i: F.embedding(i, w), (drawn(5, 4), IDS)),
    "embedding of columns": (lambda w, i: F.embedding(i, w.t()), (drawn(4, 5), IDS)),
    "embedding with padding": (lambda w, i: F.embedding(i, w, padding_idx=1), (drawn(5, 4), IDS)),
    "index": (lambda x, i: x[i] + x[:, i % 4].sum(), (drawn(5, 4), IDS)),
    "index of two axes": (
        lambda x, i: x[i, i % 4] + x[torch.arange(2)[:, None], i[:1] % 4], (drawn(5, 4), IDS),
    ),
    "negative index": (lambda x, i: x[i - 5], (drawn(5, 4), IDS)),
    "index_select": (lambda x: x.index_select(1, torch.tensor([2, 0])), (A,)),
    "gather": (lambda x, i: x.gather(1, i), (A, whole(3, 2, below=4))),
    "scatter": (lambda x, i: x.scatter(1, i, 2.0), (A, whole(3, 1, below=4))),
    "scatter_add": (lambda x, i, y: x.scatter_add(1, i, y), (A, whole(3, 2, below=4), drawn(3, 2))),
}  # fmt: skip
TARGETS = torch.tensor([1, -100, 3])
LOSSES: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    reduction: (lambda x, t, r=reduction: F.cross_entropy(x, t, reduction=r), (A, TARGETS))
    for reduction in ("mean", "sum", "none")
}
CASES = {**POINTWISE, **OVER_AXES, **SHAPES, **PRODUCTS, **INDICES, **LOSSES}
DIFFERENTIABLE = [
    name
    for name, (function, arguments) in CASES.items()
    if arguments[0].is_floating_point()
    and name not in ("comparisons", "argmax", "any, all", "split", "chunk", "unbind")
]


@pytest.mark.parametrize("name", CASES)
def test_an_operation_is_torchs(name: str, tmp_path: Path) -> None:
    function, arguments = CASES[name]
    check(function, arguments, emitted_function(function, *arguments, folder=tmp_path))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_gradient_of_an_operation_is_torchs(name: str, tmp_path: Path) -> None:
    function, arguments = gradient(CASES[name][0]), CASES[name][1]
    check(function, arguments, emitted_function(function, *arguments, folder=tmp_path))


FREE: dict[str, tuple[Function, tuple[tuple[int, ...], ...]]] = {
    "linear": (lambda x, w: F.linear(x, w), ((2, 3, 4), (5, 4))),
    "heads": (lambda x: x.view(*x.shape[:-1], 2, 4).transpose(1, 2) * 2, ((2, 3, 8),)),
    "attention": (
        lambda q, k: (q @ k.transpose(-1, -2)).softmax(-1) @ k, ((2, 3, 4, 8), (2, 3, 5, 8)),
    ),
    "cache": (lambda x, past: torch.cat([past, x], 1).mean(-1), ((2, 3, 8), (2, 5, 8))),
    "last position": (lambda x: x[:, -1], ((2, 3, 8),)),
    "causal": (
        lambda x: torch.full((x.shape[1],) * 2, -9.0).triu(1) + x.sum(), ((2, 3, 8),),
    ),
    "positions after a cache": (
        lambda x, past: x + torch.arange(past.shape[1], past.shape[1] + x.shape[1])[:, None],
        ((2, 3, 8), (2, 5, 8)),
    ),
    "repeated heads": (lambda x: x.repeat_interleave(3, 1), ((2, 3, 5, 8),)),
    "a size in arithmetic": (lambda x: x / x.shape[1] + x.shape[0] * 2, ((2, 3, 8),)),
    "rows": (lambda x: x.flatten(0, 1) @ torch.ones(8, 2), ((2, 3, 8),)),
}  # fmt: skip


@pytest.mark.parametrize("name", FREE)
def test_sizes_are_free(name: str, tmp_path: Path) -> None:
    function, shapes = FREE[name]
    arguments = [drawn(*shape) for shape in shapes]
    run = emitted_function(function, *arguments, folder=tmp_path, symbolic=True)
    check(function, arguments, run)
    changed = {2: 4, 3: 7, 5: 1}  # by the size in the trace; those of features stay
    others = [
        drawn(*(changed.get(size, size) for size in shape[:-1]), shape[-1]) for shape in shapes
    ]
    check(function, others if name != "linear" else [drawn(4, 7, 4), arguments[1]], run)


def test_an_unknown_operation_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"operator aten\.digamma has no translation"):
        emitted_function(torch.digamma, A, folder=tmp_path)


def test_a_part_is_changed_in_place(tmp_path: Path) -> None:
    def changed(x: Tensor) -> tuple[Tensor, Tensor]:
        used = x > 0
        used[:, 0] = True
        y = x * 2
        y[1:, 1:3].add_(1)
        y.view(-1)[0] = 5.0
        return used, y + 1

    check(changed, (A,), emitted_function(changed, A, folder=tmp_path))


def test_a_change_in_place_that_another_view_sees_is_refused(tmp_path: Path) -> None:
    def hidden_change(x: Tensor) -> Tensor:
        y = x * 2
        row = y[0]
        y.add_(1)
        return row * 1.0

    with pytest.raises(UnsupportedError, match="in place"):
        emitted_function(hidden_change, A, folder=tmp_path)


def test_what_depends_on_no_input_is_computed_before(tmp_path: Path) -> None:
    def table(x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(6.0), 1 / 10_000 ** (torch.arange(4.0) / 4))
        return x + angles.cos()

    run = emitted_function(table, drawn(6, 4), folder=tmp_path)
    check(table, (drawn(6, 4),), run)
    import onnx

    model = onnx.load(tmp_path / "function.onnx")
    assert [node.op_type for node in model.graph.node] == ["Add"]


def check(function: Function, arguments: Any, run: Callable[..., list[Any]]) -> None:
    expected = function(*arguments)
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = run(*arguments)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.numpy().dtype
        # A few roundings in float32 of numbers of about 1 (to 1e2, hence relative too).
        np.testing.assert_allclose(one, other.detach().numpy(), rtol=1e-5, atol=2e-6)
