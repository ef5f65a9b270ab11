"""Products, convolutions and the normalizations: forward, and backward to inputs and factors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fedlora.export.emitter import Emitter, handles
from fedlora.export.onnx_graph import Size
from fedlora.export.quantized import product
from fedlora.export.traced import packet_name

__all__: list[str] = []


def untransposed(e: Emitter, node: fx.Node) -> tuple[fx.Node, int]:
    """A matrix and 0, or, for a matrix that another one's transposition makes, that one and 1."""
    is_call = node.op == "call_function" and node not in e.simple.constants
    if is_call and packet_name(node) in ("permute", "t", "transpose") and _rank(node) == 2:
        source, turned = untransposed(e, node.args[0])  # type: ignore[arg-type]
        swaps = packet_name(node) == "t" or [a % 2 for a in _order(node)] == [1, 0]
        return source, turned ^ int(swaps)
    return node, 0


def _order(node: fx.Node) -> list[int]:
    if packet_name(node) == "permute":
        return list(node.args[1])  # type: ignore[arg-type]
    return [1, 0] if node.args[1] % 2 != node.args[2] % 2 else [0, 1]  # type: ignore[operator]


@handles("mm")
def _mm(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    (first, turned), (second, other) = untransposed(e, a.self), untransposed(e, a.mat2)
    if (quantized := product(e, a.self, second, other)) is not None:
        return quantized
    if not turned and not other:
        return e.call("MatMul", e.value(first), e.value(second))
    flags = {name: 1 for name, flag in (("transA", turned), ("transB", other)) if flag}
    return e.call("Gemm", e.value(first), e.value(second), **flags)


@handles("addmm")
def _addmm(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    (first, turned), (second, other) = untransposed(e, a.mat1), untransposed(e, a.mat2)
    if a.alpha == 1:
        quantized = product(e, a.mat1, second, other, a.self, beta=float(a.beta))
        if quantized is not None:
            return quantized
    flags: dict[str, Any] = {
        name: 1 for name, flag in (("transA", turned), ("transB", other)) if flag
    }
    flags |= {
        name: float(number)
        for name, number in (("alpha", a.alpha), ("beta", a.beta))
        if number != 1
    }
    return e.call("Gemm", e.value(first), e.value(second), e.value(a.self), **flags)


@handles("bmm", "matmul")
def _bmm(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    other = a.mat2 if packet_name(node) == "bmm" else a.other
    return e.call("MatMul", e.value(a.self), e.value(other))


@handles("baddbmm")
def _baddbmm(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    product = e.call("MatMul", e.value(a.batch1), e.value(a.batch2))
    if a.alpha != 1:
        product = e.call("Mul", product, e.tensor(a.alpha, torch.float32))
    if a.beta == 0:
        return product
    added = e.value(a.self)
    if a.beta != 1:
        added = e.call("Mul", added, e.tensor(a.beta, torch.float32))
    return e.call("Add", added, product)


@handles("convolution")
def _convolution(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    if a.transposed:
        raise e.unsupported("a transposed convolution")
    return _conv(
        e, e.value(a.input), e.value(a.weight), a, "" if a.bias is None else e.value(a.bias)
    )


@handles("convolution_backward")
def _convolution_backward(e: Emitter, node: fx.Node, a: SimpleNamespace) -> tuple[str, ...]:
    """Gradients of a convolution's input, weight and bias, those that are asked for."""
    wanted = a.output_mask
    if a.transposed or (wanted[1] and a.groups != 1):
        raise e.unsupported(
            "the gradient of a transposed convolution, or of a grouped one's kernel"
        )
    to_input = _to_input(e, a) if wanted[0] else ""
    to_weight = _to_weight(e, a) if wanted[1] else ""
    to_bias = ""
    if wanted[2]:
        axes = [axis for axis in range(_rank(a.grad_output)) if axis != 1]
        to_bias = e.call("ReduceSum", e.value(a.grad_output), e.graph.axes(*axes), keepdims=0)
    return to_input, to_weight, to_bias


def _conv(e: Emitter, x: str, weight: str, a: SimpleNamespace, *bias: str) -> str:
    pads = _each(a.padding, a)
    return e.call(
        "Conv", x, weight, *(name for name in bias if name),
        strides=_each(a.stride, a), pads=[*pads, *pads], dilations=_each(a.dilation, a),
        group=int(a.groups),
    )  # fmt: skip


def _to_input(e: Emitter, a: SimpleNamespace) -> str:
    """A transposed convolution of the gradient by the same weight."""
    before = _fixed(e, e.shape(a.input)[2:])
    after = _fixed(e, e.shape(a.grad_output)[2:])
    kernel = _fixed(e, e.shape(a.weight)[2:])
    stride, pads, dilation = _each(a.stride, a), _each(a.padding, a), _each(a.dilation, a)
    # Input positions that no output has seen, at the end: their gradient is zero.
    unseen = [
        size - ((n - 1) * s - 2 * p + d * (k - 1) + 1)
        for size, n, s, p, d, k in zip(before, after, stride, pads, dilation, kernel, strict=True)
    ]
    return e.call(
        "ConvTranspose", e.value(a.grad_output), e.value(a.weight), strides=stride,
        pads=[*pads, *pads], dilations=dilation, output_padding=unseen, group=int(a.groups),
    )  # fmt: skip


def _to_weight(e: Emitter, a: SimpleNamespace) -> str:
    """Rows become channels: the input convolved with the gradient as its kernel.

    ``dW[o, i, k] = sum over rows b and places t of g[b, o, t] * x[b, i, t * stride + k * dilation -
    padding]``: stride and dilation change places.
    """
    kernel = _fixed(e, e.shape(a.weight)[2:])
    swapped = [1, 0, *range(2, _rank(a.input))]
    x, gradient = e.value(a.input), e.value(a.grad_output)
    turned = SimpleNamespace(
        stride=a.dilation, dilation=a.stride, padding=a.padding, groups=1, weight=a.weight
    )
    result = _conv(e, e.graph.transpose(x, swapped), e.graph.transpose(gradient, swapped), turned)
    # With a stride the kernel may fit at more places than the weight has.
    axes = e.graph.axes(*range(2, _rank(a.input)))
    zeros = e.graph.axes(*[0] * len(kernel))
    result = e.call("Slice", result, zeros, e.graph.axes(*kernel), axes)
    return e.graph.transpose(result, swapped)


def _each(values: Any, a: SimpleNamespace) -> list[int]:
    """One number for every spatial axis; torch allows one for all."""
    count = _rank(a.weight) - 2
    numbers = [int(value) for value in values]
    return numbers * count if len(numbers) == 1 else numbers


def _fixed(e: Emitter, sizes: tuple[Size, ...]) -> list[int]:
    if not all(isinstance(size, int) for size in sizes):
        raise e.unsupported("the gradient of a convolution over an axis of free size")
    return list(sizes)


# Normalizations.


@handles("native_layer_norm")
def _layer_norm(e: Emitter, node: fx.Node, a: SimpleNamespace) -> tuple[str, ...]:
    """The result, the mean and the inverse deviation, as ONNX has them too."""
    count = len(a.normalized_shape)
    if a.weight is None:
        weight = e.graph.constant(np.ones([int(size) for size in a.normalized_shape], np.float32))
    else:
        weight = e.value(a.weight)
    bias = () if a.bias is None else (e.value(a.bias),)
    inputs = (e.value(a.input), weight, *bias)
    about = {"axis": -count, "epsilon": a.eps}
    if not any(user.args[1] in (1, 2) for user in node.users):
        return (e.call("LayerNormalization", *inputs, **about), "", "")
    return e.graph.call_many("LayerNormalization", *inputs, outputs=3, **about)


@handles("native_group_norm")
def _group_norm(e: Emitter, node: fx.Node, a: SimpleNamespace) -> tuple[str, ...]:
    """In single steps, as ONNX Runtime has no kernel: rows (b, groups, everything else)."""
    shape = e.shape(a.input)
    rows, groups = shape[0], int(a.group)
    fixed = [size for size in shape[1:] if isinstance(size, int)]
    rest: Size = int(np.prod(fixed)) // groups
    for size in shape[1:]:
        rest = rest if isinstance(size, int) else rest * size
    split = e.reshape(e.value(a.input), (rows, groups, rest))
    last = e.graph.axes(2)
    mean = e.call("ReduceMean", split, last, keepdims=1)
    centred = e.call("Sub", split, mean)
    variance = e.call("ReduceMean", e.call("Mul", centred, centred), last, keepdims=1)
    safe = e.call("Add", variance, e.tensor(a.eps, torch.float32))
    inverse = e.call("Reciprocal", e.call("Sqrt", safe))
    normal = e.call("Mul", centred, inverse)
    e.graph.shapes[normal] = (rows, groups, rest)
    e.graph.shapes[mean] = e.graph.shapes[inverse] = (rows, groups, 1)
    result = e.reshape(normal, shape)
    channels = (shape[1], *(1,) * (len(shape) - 2))
    for op, parameter in (("Mul", a.weight), ("Add", a.bias)):
        if parameter is not None:
            result = e.call(op, result, e.reshape(e.value(parameter), channels))
    return result, e.reshape(mean, (rows, groups)), e.reshape(inverse, (rows, groups))


def _rank(node: fx.Node) -> int:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value.ndim
