"""Making a traced graph smaller before it is emitted, without changing what it computes."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fedlora.errors import UnsupportedError
from fedlora.export.traced import Traced

__all__ = ["Simplified", "simplify"]

aten = torch.ops.aten
FOLDED = 1 << 14  # numbers of a constant that is computed here and not on the device
_VIEWS = {
    "alias", "detach", "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand",
    "unsqueeze", "squeeze", "slice", "select", "split", "split_with_sizes",
}  # fmt: skip


@dataclass(frozen=True)
class Simplified:
    """A copy of a traced graph, and what some of its nodes always are."""

    graph: fx.Graph
    constants: dict[fx.Node, Tensor]


def simplify(traced: Traced) -> Simplified:
    """Return a smaller graph that computes the same; the traced module is left as it is.

    Raises `UnsupportedError` where an operation in place changes what a later one reads under
    another name, since ONNX has no such operations.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced.module.graph, val_map={}))
    _require_functional(graph)
    _drop_copies(graph)
    constants = _folded(graph, traced)
    _drop_dead(graph)
    return Simplified(graph, constants)


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return str(target._schema.name.removeprefix("aten::")) if _is_aten(node) else str(target)


def _is_aten(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def _in_place(node: fx.Node) -> bool:
    return _is_aten(node) and _name(node).endswith("_")


def _require_functional(graph: fx.Graph) -> None:
    """See that each result of an operation in place is read as that operation's result only."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not _in_place(node):
            continue
        root = node.args[0]
        while _name(root) in _VIEWS or _in_place(root):
            root = root.args[0]
        for alias in _aliases(root, without=node):
            late = [user for user in alias.users if order[user] > order[node]]
            if late:
                raise UnsupportedError(
                    f"export: aten.{_name(node)} changes a tensor in place that {late[0].name} "
                    "reads later under another name; use the operation that returns a new tensor"
                )


def _aliases(root: fx.Node, without: fx.Node) -> Iterator[fx.Node]:
    """The nodes that share the root's memory, not counting what is reached through `without`."""
    queue = [root]
    for node in queue:
        yield node
        for user in node.users:
            shares = _name(user) in _VIEWS or (_in_place(user) and user.args[0] is node)
            if shares and user is not without:
                queue.append(user)


def _drop_copies(graph: fx.Graph) -> None:
    """Replace what returns its argument, as far as numbers and shape go, by the argument."""
    for node in list(graph.nodes):
        if _is_aten(node) and _returns_argument(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _returns_argument(node: fx.Node) -> bool:
    name = _name(node)
    if name in ("alias", "detach", "clone", "lift_fresh_copy", "contiguous", "lift_fresh"):
        return True
    if not node.args or not isinstance(node.args[0], fx.Node) or "val" not in node.meta:
        return False
    before, after = node.args[0].meta.get("val"), node.meta["val"]
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    same = before.dtype == after.dtype and _sizes(before) == _sizes(after)
    if name in ("expand", "view", "reshape", "_unsafe_view", "_to_copy", "to"):
        return same
    other = node.args[1] if len(node.args) > 1 else None
    neutral = {"mul": 1, "mul_": 1, "div": 1, "div_": 1, "add": 0, "add_": 0, "sub": 0, "sub_": 0}
    return same and name in neutral and isinstance(other, int | float) and other == neutral[name]


def _sizes(tensor: Tensor) -> list[Any]:
    """A shape of ints and, for what is symbolic, of sympy expressions."""
    found: list[Any] = []
    for size in tensor.shape:
        known: Any = size
        expression = getattr(getattr(known, "node", None), "expr", known)
        fixed = isinstance(expression, int) or expression.is_Integer
        found.append(int(expression) if fixed else expression)
    return found


def _folded(graph: fx.Graph, traced: Traced) -> dict[fx.Node, Tensor]:
    """Compute what depends on no input and no weight: tables of positions, masks, indices."""
    free = _fixed_by_tracing(graph, traced)
    found: dict[fx.Node, Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) not in traced.weights:
            value: Any = operator.attrgetter(str(node.target))(traced.module)
            found[node] = value.detach()
        elif _is_aten(node) and _can_be_folded(node, found, free):
            target: Any = node.target
            args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
            if _in_place(node):
                args = (args[0].clone(), *args[1:])
            with torch.no_grad():
                found[node] = target(*args, **kwargs)
    return found


def _fixed_by_tracing(graph: fx.Graph, traced: Traced) -> set[int]:
    """The sizes of free axes that are numbers in the trace, not symbols."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    sizes = [
        _sizes(node.meta["val"])[axis]
        for name, node in zip(traced.inputs, placeholders, strict=True)
        for axis in traced.axes.get(name, {})
    ]
    return {size for size in sizes if isinstance(size, int)}


def _can_be_folded(node: fx.Node, known: dict[fx.Node, Tensor], free: set[int]) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not all(source in known for source in node.all_input_nodes):
        return False
    sizes = _sizes(value)
    if not all(isinstance(size, int) for size in sizes):
        return False
    if value.numel() > FOLDED:
        return False
    # A size that tracing has fixed, though it is free, must stay one.
    numbers: list[Any] = [*sizes, *_numbers((node.args, node.kwargs))]
    return not free.intersection(n for n in numbers if type(n) is int and n > 1)


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, dict):
        yield from _numbers(tuple(value.values()))
    else:
        yield value


def _drop_dead(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("output", "placeholder"):
            graph.erase_node(node)
