"""Shapes: views, slices, concatenation, and tensors that are made from sizes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from fedlora.export.emitter import Emitter, handles
from fedlora.export.onnx_graph import Size
from fedlora.export.traced import packet_name

__all__ = ["sliced"]

END = np.iinfo(np.int64).max


@handles("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten")
def _view(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    name = e.value(a.self)
    e.graph.shapes.setdefault(name, e.shape(a.self))
    return e.reshape(name, e.shape(node))


@handles("permute")
def _permute(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    rank = a.self.meta["val"].ndim
    return e.graph.transpose(e.value(a.self), [axis % rank for axis in a.dims])


@handles("transpose")
def _transpose(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    rank = a.self.meta["val"].ndim
    order = list(range(rank))
    order[a.dim0 % rank], order[a.dim1 % rank] = a.dim1 % rank, a.dim0 % rank
    return e.graph.transpose(e.value(a.self), order)


@handles("t")
def _t(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    return e.graph.transpose(e.value(a.self), range(a.self.meta["val"].ndim)[::-1])


@handles("expand")
def _expand(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    if e.shape(a.self) == e.shape(node):
        return e.value(a.self)
    return e.call("Expand", e.value(a.self), e.shape_tensor(e.shape(node)))


@handles("repeat")
def _repeat(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    rank = len(a.repeats)
    shape = e.shape(a.self)
    name = e.reshape(e.value(a.self), (1,) * (rank - len(shape)) + shape)
    return e.call("Tile", name, e.shape_tensor([e.size(times) for times in a.repeats]))


@handles("clone", "alias", "detach", "contiguous", "lift_fresh_copy")
def _same(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    return e.value(a.self)


@handles("_to_copy", "to")
def _to(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    return e.tensor(a.self, node.meta["val"].dtype)


@handles("copy")
def _copy(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    """The result of writing `src` over all of another tensor."""
    name = e.tensor(a.src, node.meta["val"].dtype)
    if e.shape(a.src) == e.shape(node):
        return name
    return e.call("Expand", name, e.shape_tensor(e.shape(node)))


# Parts.


@handles("slice")
def _slice(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    return sliced(e, a.self, a.dim, a.start, a.end, a.step)


@handles("select")
def _select(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    axis = a.dim % a.self.meta["val"].ndim
    index = e.tensor(a.index, torch.int64)
    return e.call("Gather", e.value(a.self), index, axis=axis)


@handles("split_with_sizes", "split", "unbind", "chunk")
def _split(e: Emitter, node: fx.Node, a: SimpleNamespace) -> tuple[str, ...]:
    axis = a.dim % a.self.meta["val"].ndim
    parts = node.meta["val"]
    if packet_name(node) == "unbind":
        places = [e.graph.constant(place, np.int64) for place in range(len(parts))]
        return tuple(e.call("Gather", e.value(a.self), place, axis=axis) for place in places)
    sizes = e.shape_tensor([e.size(part.shape[axis]) for part in parts])
    return e.graph.call_many("Split", e.value(a.self), sizes, outputs=len(parts), axis=axis)


@handles("cat", "concat")
def _cat(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    dtype, rank = node.meta["val"].dtype, node.meta["val"].ndim
    parts = [part for part in a.tensors if part.meta["val"].ndim == rank]  # not torch's empty ones
    return e.call("Concat", *(e.tensor(part, dtype) for part in parts), axis=a.dim % rank)


@handles("stack")
def _stack(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    dtype, axis = node.meta["val"].dtype, a.dim % node.meta["val"].ndim
    parts = [e.call("Unsqueeze", e.tensor(part, dtype), e.graph.axes(axis)) for part in a.tensors]
    return e.call("Concat", *parts, axis=axis)


@handles("flip")
def _flip(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    axes = [axis % node.meta["val"].ndim for axis in a.dims]
    back = e.graph.axes(*[-1] * len(axes))
    ends = e.graph.axes(*[-END] * len(axes))
    return e.call("Slice", e.value(a.self), back, ends, e.graph.axes(*axes), back)


@handles("roll")
def _roll(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    if len(a.dims) != 1:
        raise e.unsupported("aten.roll over several axes")
    axis = a.dims[0] % node.meta["val"].ndim
    size = e.shape(node)[axis]
    if not isinstance(size, int):
        raise e.unsupported("aten.roll over an axis of free size")
    return rolled(e, e.value(a.self), axis, size, -a.shifts[0] % size)


def rolled(e: Emitter, name: str, axis: int, size: int, start: int) -> str:
    """Return a value whose axis begins at `start` and goes on around the end."""
    if start == 0:
        return name
    cut, axes = e.graph.axes(start), e.graph.axes(axis)
    head = e.call("Slice", name, e.graph.axes(0), cut, axes)
    tail = e.call("Slice", name, cut, e.graph.axes(size), axes)
    return e.call("Concat", tail, head, axis=axis)


@handles("constant_pad_nd")
def _pad(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    rank, dtype = node.meta["val"].ndim, node.meta["val"].dtype
    before: list[Size] = [0] * rank
    after: list[Size] = [0] * rank
    for place in range(len(a.pad) // 2):  # torch names the last axis first
        axis = rank - 1 - place
        before[axis], after[axis] = e.size(a.pad[2 * place]), e.size(a.pad[2 * place + 1])
    pads = e.shape_tensor([*before, *after])
    return e.call("Pad", e.value(a.self), pads, e.tensor(a.value, dtype))


@handles("slice_scatter", "select_scatter")
def _slice_scatter(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    """The tensor with a part of one axis replaced: what is before, the new part, what is after."""
    dtype = node.meta["val"].dtype
    axis = a.dim % node.meta["val"].ndim
    size = e.shape(node)[axis]
    part = e.tensor(a.src, dtype)
    if packet_name(node) == "select_scatter":
        start = a.index % size if isinstance(size, int) else a.index
        end, step = start + 1, 1
        part = e.call("Unsqueeze", part, e.graph.axes(axis))
    else:
        start, end, step = a.start or 0, a.end, a.step
    start, end = _place(e, start, size, 0), _place(e, end, size, size)
    name = e.value(a.self)
    if step != 1:
        places = [e.tensor(bound, torch.int64) for bound in (start, end, step)]
        index = e.call("Range", *places)
        index = e.reshape(index, (-1, *(1,) * (node.meta["val"].ndim - 1 - axis)))
        index = e.call("Expand", index, e.shape_tensor(e.shape(a.src)))
        return e.call("ScatterElements", name, index, part, axis=axis)
    parts = []
    if start != 0:
        parts.append(_between(e, name, axis, 0, start))
    parts.append(part)
    if end != size:
        parts.append(_between(e, name, axis, end, END))
    return parts[0] if len(parts) == 1 else e.call("Concat", *parts, axis=axis)


def sliced(e: Emitter, of: fx.Node, dim: int, start: Any, end: Any, step: int) -> str:
    """Return a part of one axis; torch's defaults and negative places included."""
    name, shape = e.value(of), e.shape(of)
    axis = dim % len(shape)
    first, last = _place(e, start, shape[axis], 0), _place(e, end, shape[axis], shape[axis])
    if first == 0 and last == shape[axis] and step == 1:
        return name
    return _between(e, name, axis, first, last, step)


def _place(e: Emitter, place: Any, size: Size, default: Size) -> Size:
    """A start or end, counted from the beginning and inside the axis where that can be known."""
    if place is None:
        return default
    place = e.size(place)
    if not isinstance(place, int):
        return place
    if place < 0:
        return max(place + size, 0) if isinstance(size, int) else place
    if place >= END:
        return size
    return min(place, size) if isinstance(size, int) else place


def _between(e: Emitter, name: str, axis: int, start: Size, end: Size, step: int = 1) -> str:
    bounds = (e.size_tensor(start), e.size_tensor(end), e.graph.axes(axis))
    return e.call("Slice", name, *bounds, *(() if step == 1 else (e.graph.axes(step),)))


# From nothing but sizes.


@handles("full", "new_full", "full_like")
def _full(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    return _filled(e, node, a.fill_value)


@handles("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "empty_strided")
def _zeros(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    return _filled(e, node, 0)


@handles("ones", "ones_like", "new_ones")
def _ones(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    return _filled(e, node, 1)


@handles("scalar_tensor")
def _scalar(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    return e.tensor(a.s, node.meta["val"].dtype)


def _filled(e: Emitter, node: fx.Node, value: Any) -> str:
    number = e.tensor(value, node.meta["val"].dtype)
    shape = e.shape(node)
    return number if not shape else e.call("Expand", number, e.shape_tensor(shape))


@handles("arange")
def _arange(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    dtype = node.meta["val"].dtype
    start, step = getattr(a, "start", 0), getattr(a, "step", 1)
    parts = (0 if start is None else start, a.end, 1 if step is None else step)
    return e.call("Range", *(e.tensor(part, dtype) for part in parts))


@handles("tril", "triu")
def _triangle(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    if node.meta["val"].dtype == torch.bool:
        raise e.unsupported("a triangle of booleans")
    diagonal = e.graph.constant(a.diagonal, np.int64)
    return e.call("Trilu", e.value(a.self), diagonal, upper=int(packet_name(node) == "triu"))


@handles("sym_size", "sym_numel")
def _no_tensor(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    assert not isinstance(node.meta["val"], Tensor)
    raise e.unsupported("a size as a result")
