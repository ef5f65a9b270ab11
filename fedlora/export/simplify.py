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

    ONNX has no operations in place: they become plain ones. Raises `UnsupportedError` where one
    changes what another view of the same memory shows later.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced.module.graph, val_map={}))
    _make_functional(graph)
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


def _make_functional(graph: fx.Graph) -> None:
    """Let what is read after an operation in place be that operation's result.

    Its result under its own name is read so anyway. A tensor that was changed through a view
    (``x[:, 0] = 1``) becomes one with that part replaced.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    for changing in list(graph.nodes):
        if not _in_place(changing):
            continue
        chain = [changing.args[0]]  # from the tensor that is changed up to the one with the memory
        while _name(chain[-1]) in _VIEWS or _in_place(chain[-1]):
            chain.append(chain[-1].args[0])
        aliases = [n for n in _aliases(chain[-1]) if order[n] < order[changing]]
        late = {
            alias: [user for user in alias.users if order[user] > order[changing]]
            for alias in aliases
        }
        if not any(late.values()):
            continue
        value, place = changing, changing
        for alias in chain:
            for user in late.pop(alias, []):
                user.replace_input_with(alias, value)
            if alias is not chain[-1] and not _in_place(alias):
                value = _replaced_part(graph, alias, value, place)
                order[value], place = order[changing], value
        others = [user for users in late.values() for user in users]
        if others:
            raise UnsupportedError(
                f"export: aten.{_name(changing)} changes a tensor in place that {others[0].name} "
                "reads later under another name; use the operation that returns a new tensor"
            )


def _replaced_part(graph: fx.Graph, view: fx.Node, part: fx.Node, after: fx.Node) -> fx.Node:
    """What a view was taken of, with that view's numbers replaced."""
    whole, more = view.args[0], view.args[1:]
    target: Any = {
        "select": aten.select_scatter.default,
        "slice": aten.slice_scatter.default,
    }.get(_name(view))
    with graph.inserting_after(after):
        if target is not None:
            made = graph.call_function(target, (whole, part, *more))
        elif _name(view) in ("view", "_unsafe_view", "unsqueeze", "squeeze", "alias", "detach"):
            made = graph.call_function(aten.view.default, (part, list(whole.meta["val"].shape)))  # type: ignore[union-attr]
        else:
            raise UnsupportedError(
                f"export: a tensor is changed in place through aten.{_name(view)}; "
                "use the operation that returns a new tensor"
            )
    made.meta = dict(whole.meta)  # type: ignore[union-attr]
    return made


def _aliases(root: fx.Node) -> Iterator[fx.Node]:
    """The nodes that share the root's memory, in no order."""
    queue = [root]
    for node in queue:
        yield node
        queue += [
            user
            for user in node.users
            if _name(user) in _VIEWS or (_in_place(user) and user.args[0] is node)
        ]


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
