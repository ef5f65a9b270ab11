"""Looking up and adding up by index: embeddings, gather, scatter, the loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from fedlora.export.emitter import Emitter, handles
from fedlora.export.ops_linear import untransposed
from fedlora.export.ops_shape import rolled
from fedlora.export.quantized import is_quantized, looked_up
from fedlora.export.traced import packet_name

__all__: list[str] = []


@handles("embedding")
def _embedding(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    table, turned = untransposed(e, a.weight)
    ids, count = e.value(a.indices), a.indices.meta["val"].ndim
    if not turned and is_quantized(e, table):
        return looked_up(e, table, ids, count)
    if not turned:
        return e.call("Gather", e.value(table), ids, axis=0)
    # LoRA's A (rank, rows): only the columns that are looked up are turned.
    columns = e.call("Gather", e.value(table), ids, axis=1)
    return e.graph.transpose(columns, [*range(1, count + 1), 0])


@handles("embedding_dense_backward")
def _embedding_backward(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    if a.scale_grad_by_freq:
        raise e.unsupported("an embedding with scale_grad_by_freq")
    ids, gradient = e.value(a.indices), e.value(a.grad_output)
    if a.padding_idx >= 0:
        counted = e.call("Not", e.call("Equal", ids, e.tensor(a.padding_idx, torch.int64)))
        mask = e.call("Unsqueeze", e.cast(counted, torch.bool, torch.float32), e.graph.axes(-1))
        gradient = e.call("Mul", gradient, mask)
    return _added_rows(e, node, ids, gradient)


@handles("index_put", "_unsafe_index_put")
def _index_put(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    """Rows, replaced or added to, by index tensors on one axis or on the first several."""
    places = _index_places(e, a.indices)
    dtype, shape = _dtype(node), e.shape(node)
    indices = [a.indices[place] for place in places]
    if len(places) == 1:
        axis, common = places[0], e.shape(indices[0])
        index = e.call("Unsqueeze", _as_int64(e, indices[0]), e.graph.axes(-1))
    else:
        common = e.shape(a.values)[: a.values.meta["val"].ndim - (len(shape) - len(places))]
        axis, index = 0, _points(e, indices, common)
    whole = (*shape[:axis], *common, *shape[axis + len(places) :])
    values = e.tensor(a.values, dtype)
    if e.shape(a.values) != whole:
        values = e.call("Expand", values, e.shape_tensor(whole))
    if a.accumulate and axis == 0 and len(places) == 1 and _is_zero(e, a.self):
        return _added_rows(e, node, _as_int64(e, indices[0]), values)
    # ScatterND writes rows of the first axis: the indexed one goes there, and back.
    order = [axis, *(other for other in range(len(shape)) if other != axis)]
    inner = range(axis, axis + len(common))
    first = [*inner, *(other for other in range(len(whole)) if other not in inner)]
    reduction = "add" if a.accumulate else "none"
    result = e.call(
        "ScatterND", e.graph.transpose(e.tensor(a.self, dtype), order), index,
        e.graph.transpose(values, first), reduction=reduction,
    )  # fmt: skip
    return e.graph.transpose(result, [order.index(place) for place in range(len(order))])


def _added_rows(e: Emitter, node: fx.Node, ids: str, values: str) -> str:
    """Zeros of the node's shape with rows of `values` added at `ids`."""
    shape = e.shape(node)
    if len(shape) == 2 and isinstance(shape[0], int) and not isinstance(shape[1], int):
        # The rank of this very layer: other layers may have another.
        width = e.call("Shape", values, start=-1)
        sizes = e.call("Concat", e.graph.axes(shape[0]), width, axis=0)
    else:
        sizes = e.shape_tensor(shape)
    zeros = e.call("Expand", e.tensor(0, _dtype(node)), sizes)
    places = e.call("Unsqueeze", ids, e.graph.axes(-1))
    return e.call("ScatterND", zeros, places, values, reduction="add")


def _is_zero(e: Emitter, node: fx.Node) -> bool:
    if node in e.simple.constants:
        return not bool(e.simple.constants[node].any())
    if node.op != "call_function":
        return False
    name, filled = packet_name(node), node.args[1] if len(node.args) > 1 else None
    return name in ("zeros", "zeros_like", "new_zeros") or (
        name in ("full", "full_like") and isinstance(filled, int | float) and filled == 0
    )


@handles("index", "_unsafe_index")
def _index(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    """Index tensors on one axis, or on the first several together."""
    places = _index_places(e, a.indices)
    indices = [a.indices[place] for place in places]
    if len(places) == 1:
        index = _as_int64(e, indices[0])
        return _gathered(e, e.value(a.self), places[0], indices[0], index, e.shape(a.self))
    unindexed = a.self.meta["val"].ndim - len(places)
    common = e.shape(node)[: node.meta["val"].ndim - unindexed]
    return e.call("GatherND", e.value(a.self), _points(e, indices, common))


def _index_places(e: Emitter, indices: list[Any]) -> list[int]:
    """The axes that have an index tensor: one, or the first ones."""
    places = [place for place, index in enumerate(indices) if index is not None]
    if any(_dtype(indices[place]) == torch.bool for place in places):
        raise e.unsupported("an index that is a mask: how many it selects is not known before")
    if len(places) != 1 and places != list(range(len(places))):
        raise e.unsupported("index tensors on axes that are not the first")
    return places


def _points(e: Emitter, indices: list[fx.Node], shape: tuple[Any, ...]) -> str:
    """Index tensors, broadcast to one shape, as the coordinates of points (*shape, n)."""
    parts = []
    for index in indices:
        name = _as_int64(e, index)
        if e.shape(index) != shape:
            name = e.call("Expand", name, e.shape_tensor(shape))
        parts.append(e.call("Unsqueeze", name, e.graph.axes(-1)))
    return e.call("Concat", *parts, axis=-1)


@handles("index_select")
def _index_select(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    axis = a.dim % a.self.meta["val"].ndim
    return _gathered(e, e.value(a.self), axis, a.index, _as_int64(e, a.index), e.shape(a.self))


def _gathered(
    e: Emitter, name: str, axis: int, index: fx.Node, ids: str, shape: tuple[Any, ...]
) -> str:
    """Take places of one axis; places in a row, as `roll` takes them, by slices."""
    known = e.simple.constants.get(index)
    if known is not None and known.ndim == 1 and len(known) and isinstance(shape[axis], int):
        size, start = shape[axis], int(known[0])
        if len(known) == size and torch.equal(known, (torch.arange(size) + start) % size):
            return rolled(e, name, axis, size, start)
    return e.call("Gather", name, ids, axis=axis)


@handles("gather")
def _gather(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    axis = a.dim % max(node.meta["val"].ndim, 1)
    return e.call("GatherElements", e.value(a.self), _as_int64(e, a.index), axis=axis)


@handles("scatter", "scatter_add")
def _scatter(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    dtype, axis = _dtype(node), a.dim % node.meta["val"].ndim
    if hasattr(a, "src"):
        values = e.tensor(a.src, dtype)
        if e.shape(a.src) != e.shape(a.index):
            raise e.unsupported("aten.scatter of a part of the source")
    else:
        values = e.call("Expand", e.tensor(a.value, dtype), e.shape_tensor(e.shape(a.index)))
    reduction = "add" if packet_name(node) == "scatter_add" else "none"
    return e.call(
        "ScatterElements", e.tensor(a.self, dtype), _as_int64(e, a.index), values,
        axis=axis, reduction=reduction,
    )  # fmt: skip


# The loss.


@handles("nll_loss_forward")
def _nll_loss(e: Emitter, node: fx.Node, a: SimpleNamespace) -> tuple[str, ...]:
    """(loss, how many are counted) of log-likelihoods (n, classes)."""
    if a.weight is not None:
        raise e.unsupported("a loss with weights for the classes")
    counted, wanted, _ = _targets(e, a)
    nats = e.call("GatherElements", e.value(a.self), wanted, axis=1)
    nats = e.call("Neg", e.call("Squeeze", nats, e.graph.axes(1)))
    nats = e.call("Where", counted, nats, e.tensor(0, torch.float32))
    total = e.call("ReduceSum", e.cast(counted, torch.bool, torch.float32), keepdims=0)
    if a.reduction == 0:
        return nats, total
    loss = e.call("ReduceSum", nats, keepdims=0)
    return (e.call("Div", loss, total) if a.reduction == 1 else loss), total


@handles("nll_loss_backward")
def _nll_loss_backward(e: Emitter, node: fx.Node, a: SimpleNamespace) -> str:
    """-gradient at each counted target, divided by how many there are; (n, classes)."""
    if a.weight is not None:
        raise e.unsupported("a loss with weights for the classes")
    counted, wanted, _ = _targets(e, a)
    gradient = e.value(a.grad_output)
    if a.reduction == 1:
        gradient = e.call("Div", gradient, e.value(a.total_weight))
    each = e.call("Where", counted, e.call("Neg", gradient), e.tensor(0, torch.float32))
    each = e.call("Unsqueeze", each, e.graph.axes(1))
    zeros = e.call("Expand", e.tensor(0, torch.float32), e.shape_tensor(e.shape(node)))
    return e.call("ScatterElements", zeros, wanted, each, axis=1)


def _targets(e: Emitter, a: SimpleNamespace) -> tuple[str, str, str]:
    """(n,) whether counted; (n, 1) targets with 0 where not; (n,) the same."""
    if a.self.meta["val"].ndim != 2:
        raise e.unsupported("a loss of other than (n, classes)")
    target = e.value(a.target)
    counted = e.call("Not", e.call("Equal", target, e.tensor(a.ignore_index, torch.int64)))
    safe = e.call("Where", counted, target, e.tensor(0, torch.int64))
    return counted, e.call("Unsqueeze", safe, e.graph.axes(1)), safe


def _as_int64(e: Emitter, index: fx.Node) -> str:
    return e.tensor(index, torch.int64)


def _dtype(node: fx.Node) -> torch.dtype:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value.dtype
