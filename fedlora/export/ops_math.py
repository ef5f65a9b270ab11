"""Arithmetic: one number at a time, comparisons, sums over axes, softmax."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fedlora.export.emitter import Emitter, handles, onnx_type
from fedlora.export.traced import packet_name

__all__: list[str] = []

ONE = {
    "neg": "Neg", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "reciprocal": "Reciprocal",
    "sin": "Sin", "cos": "Cos", "tanh": "Tanh", "erf": "Erf", "sigmoid": "Sigmoid", "relu": "Relu",
    "abs": "Abs", "floor": "Floor", "ceil": "Ceil", "round": "Round", "sign": "Sign",
}  # fmt: skip
TWO = {"mul": "Mul", "maximum": "Max", "minimum": "Min"}
COMPARED = {
    "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual",
}  # fmt: skip
LOGICAL = {
    "logical_and": "And", "bitwise_and": "And", "__and__": "And",
    "logical_or": "Or", "bitwise_or": "Or", "__or__": "Or",
    "logical_xor": "Xor", "bitwise_xor": "Xor",
}  # fmt: skip


@handles(*ONE)
def _one(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    return e.call(ONE[packet_name(node)], e.tensor(a.self, _dtype(node)))


@handles("rsqrt")
def _rsqrt(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    return e.call("Reciprocal", e.call("Sqrt", e.tensor(a.self, _dtype(node))))


@handles("log1p", "expm1")
def _near_zero(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    one, x = e.tensor(1, _dtype(node)), e.tensor(a.self, _dtype(node))
    if packet_name(node) == "log1p":
        return e.call("Log", e.call("Add", x, one))
    return e.call("Sub", e.call("Exp", x), one)


@handles("silu")
def _silu(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    x = e.value(a.self)
    return e.call("Mul", x, e.call("Sigmoid", x))


@handles("gelu")
def _gelu(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    return e.call("Gelu", e.value(a.self), approximate=a.approximate)


@handles("logical_not", "bitwise_not")
def _not(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    return e.call("Not", e.tensor(a.self, torch.bool))


@handles(*TWO)
def _two(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    return e.call(TWO[packet_name(node)], *_pair(e, node, a.self, a.other, _dtype(node)))


@handles("add", "sub", "rsub")
def _sum_of_two(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    dtype = _dtype(node)
    first, second = _pair(e, node, a.self, a.other, dtype)
    name = packet_name(node)
    if a.alpha != 1:
        second = e.call("Mul", second, e.tensor(a.alpha, dtype))
    if name == "rsub":
        first, second = second, first
    return e.call("Add" if name == "add" else "Sub", first, second)


@handles("div")
def _div(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    dtype = _dtype(node)
    mode = getattr(a, "rounding_mode", None)
    if mode is None and isinstance(a.other, int | float) and math.frexp(a.other)[0] == 0.5:
        # A product is several times faster, and by a power of two exactly the same.
        return e.call("Mul", e.tensor(a.self, dtype), e.tensor(1 / a.other, dtype))
    first, second = _pair(e, node, a.self, a.other, dtype)
    if mode == "floor" and not dtype.is_floating_point:
        first = e.call("Sub", first, e.call("Mod", first, second, fmod=0))
    result = e.call("Div", first, second)
    if mode is None or not dtype.is_floating_point:
        return result
    if mode == "floor":
        return e.call("Floor", result)
    return e.call("Mul", e.call("Sign", result), e.call("Floor", e.call("Abs", result)))


@handles("fmod", "remainder")
def _modulo(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    dtype = _dtype(node)
    first, second = _pair(e, node, a.self, a.other, dtype)
    if packet_name(node) == "fmod":
        return e.call("Mod", first, second, fmod=1)
    if not dtype.is_floating_point:
        return e.call("Mod", first, second, fmod=0)
    whole = e.call("Floor", e.call("Div", first, second))
    return e.call("Sub", first, e.call("Mul", whole, second))


@handles("pow")
def _pow(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    """A product for small powers: `Pow` takes a logarithm and an exponential for each number."""
    dtype = _dtype(node)
    base, power = e.tensor(a.self, dtype), a.exponent
    if isinstance(power, fx.Node) or power not in (1, 2, 3, 0.5, -0.5, -1):
        return e.call("Pow", base, e.tensor(power, dtype))
    made = e.graph.maker_of(base)
    if power == 2 and made is not None and made.op_type == "Sqrt":  # a norm's
        return str(made.input[0])
    if power == 2:
        return e.call("Mul", base, base)
    if power == 3:
        return e.call("Mul", e.call("Mul", base, base), base)
    result = e.call("Sqrt", base) if abs(power) == 0.5 else base
    return e.call("Reciprocal", result) if power < 0 else result


@handles(*COMPARED)
def _compared(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    return e.call(COMPARED[packet_name(node)], *_comparable(e, node, a))


@handles("ne")
def _ne(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    return e.call("Not", e.call("Equal", *_comparable(e, node, a)))


@handles(*LOGICAL)
def _logical(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    name = packet_name(node)
    if _dtype(node) != torch.bool:
        raise e.unsupported(f"aten.{name} of integers")
    pair = (e.tensor(part, torch.bool) for part in (a.self, a.other))
    return e.call(LOGICAL[name], *pair)


@handles("where")
def _where(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    condition = e.tensor(a.condition, torch.bool)
    first, second = _pair(e, node, a.self, a.other, _dtype(node))
    return e.call("Where", condition, first, second)


@handles("masked_fill")
def _masked_fill(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    dtype = _dtype(node)
    mask = e.tensor(a.mask, torch.bool)
    return e.call("Where", mask, e.tensor(a.value, dtype), e.tensor(a.self, dtype))


@handles("clamp", "clamp_min", "clamp_max")
def _clamp(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    dtype = _dtype(node)
    limits = (getattr(a, "min", None), getattr(a, "max", None))
    low, high = ("" if limit is None else e.tensor(limit, dtype) for limit in limits)
    return e.call("Clip", e.tensor(a.self, dtype), low, high)


@handles("addcmul")
def _addcmul(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    dtype = _dtype(node)
    product = e.call("Mul", e.tensor(a.tensor1, dtype), e.tensor(a.tensor2, dtype))
    if a.value != 1:
        product = e.call("Mul", product, e.tensor(a.value, dtype))
    return e.call("Add", e.tensor(a.self, dtype), product)


# Over axes.


@handles("sum", "mean", "amax", "amin")
def _reduced(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    op = {"sum": "ReduceSum", "mean": "ReduceMean", "amax": "ReduceMax", "amin": "ReduceMin"}
    return _over(e, op[packet_name(node)], e.tensor(a.self, _dtype(node)), a)


@handles("any", "all")
def _any(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    op = "ReduceMax" if packet_name(node) == "any" else "ReduceMin"
    numbers = e.cast(e.tensor(a.self, torch.bool), torch.bool, torch.int32)
    return e.cast(_over(e, op, numbers, a), torch.int32, torch.bool)


@handles("linalg_vector_norm")
def _norm(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    if a.ord != 2:
        raise e.unsupported(f"a norm of order {a.ord}")
    squares = _over(e, "ReduceSumSquare", e.tensor(a.self, _dtype(node)), a)
    return e.call("Sqrt", squares)


@handles("var", "var_mean")
def _variance(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str | tuple[str, ...]:
    """Mean square of what differs from the mean, times n / (n - correction)."""
    name, keep = e.value(a.self), SimpleNamespace(**{**vars(a), "keepdim": True})
    difference = e.call("Sub", name, _over(e, "ReduceMean", name, keep))
    variance = _over(e, "ReduceMean", e.call("Mul", difference, difference), a)
    correction = getattr(a, "correction", int(getattr(a, "unbiased", True)))
    if correction is None or correction != 0:
        shape, count = e.shape(a.self), 1
        for axis in range(len(shape)) if not a.dim else a.dim:
            count = count * shape[axis]
        n = e.tensor(count, torch.float32)
        less = e.call("Sub", n, e.tensor(1 if correction is None else correction, torch.float32))
        variance = e.call("Mul", variance, e.call("Div", n, less))
    if packet_name(node) == "var":
        return variance
    return variance, _over(e, "ReduceMean", name, a)


@handles("argmax")
def _argmax(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    if a.dim is None:
        raise e.unsupported("aten.argmax over all axes")
    return e.call("ArgMax", e.value(a.self), axis=a.dim, keepdims=int(a.keepdim))


@handles("cumsum")
def _cumsum(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    axis = e.graph.constant(a.dim % max(node.meta["val"].ndim, 1), np.int64)
    return e.call("CumSum", e.tensor(a.self, _dtype(node)), axis)


@handles("_softmax", "softmax")
def _softmax(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    return e.call("Softmax", e.tensor(a.self, _dtype(node)), axis=a.dim)


@handles("_log_softmax", "log_softmax")
def _log_softmax(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    return e.call("LogSoftmax", e.tensor(a.self, _dtype(node)), axis=a.dim)


@handles("_softmax_backward_data")
def _softmax_backward(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    """``y * (g - sum(g * y))`` along the axis, for y = softmax(x)."""
    y, product = e.value(a.output), e.call("Mul", e.value(a.grad_output), e.value(a.output))
    total = e.call("ReduceSum", product, e.graph.axes(a.dim % node.meta["val"].ndim), keepdims=1)
    return e.call("Sub", product, e.call("Mul", y, total))


@handles("_log_softmax_backward_data")
def _log_softmax_backward(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    """``g - exp(y) * sum(g)`` along the axis, for y = log_softmax(x)."""
    gradient = e.value(a.grad_output)
    total = e.call("ReduceSum", gradient, e.graph.axes(a.dim % node.meta["val"].ndim), keepdims=1)
    likely = e.call("Exp", e.value(a.output))
    return e.call("Sub", gradient, e.call("Mul", likely, total))


def _over(e: Emitter, op: str, name: str, a: SimpleNamespace) -> str:
    """Reduce over the axes `a.dim`; none means all."""
    axes, keep = getattr(a, "dim", None), int(getattr(a, "keepdim", False))
    axes = [] if axes is None else [axes] if isinstance(axes, int) else list(axes)
    if not axes:
        return e.call(op, name, keepdims=keep)
    rank = a.self.meta["val"].ndim
    return e.call(op, name, e.graph.axes(*sorted(axis % rank for axis in axes)), keepdims=keep)


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    onnx_type(dtype)
    return dtype


def _comparable(e: Emitter, node: fx.Node, a: SimpleNamespace) -> tuple[str, str]:
    """Both sides in the dtype in which torch compares them."""
    sides = [
        side.meta["val"] if isinstance(side, fx.Node) and "val" in side.meta else side
        for side in (a.self, a.other)
    ]
    sides = [1 if isinstance(side, torch.SymInt) else side for side in sides]
    return _pair(e, node, a.self, a.other, torch.result_type(*sides))


def _pair(
    e: Emitter, node: fx.Node, first: Any, second: Any, dtype: torch.dtype
) -> tuple[str, str]:
    """Two operands in one dtype; an expansion that broadcasting does anyway is left out."""
    return (
        e.tensor(_unexpanded(e, node, first, second), dtype),
        e.tensor(_unexpanded(e, node, second, first), dtype),
    )


def _unexpanded(e: Emitter, node: fx.Node, operand: Any, other: Any) -> Any:
    """The operand, or what it is an expansion of if the other one has the result's shape."""
    if not isinstance(operand, fx.Node) or operand is other or not isinstance(other, fx.Node):
        return operand
    if not isinstance(other.meta.get("val"), Tensor) or e.shape(other) != e.shape(node):
        return operand
    is_expansion = operand.op == "call_function" and packet_name(operand) == "expand"
    return operand.args[0] if is_expansion and operand not in e.simple.constants else operand
