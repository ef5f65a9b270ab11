"""The sizes of a traced graph that are known on the device only, and where they can be read."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import sympy  # type: ignore[import-untyped]  # torch depends on it
import torch
from torch import fx

from fedlora.errors import UnsupportedError
from fedlora.export.traced import Traced

__all__ = ["fixed_symbol", "free_sizes", "near_weights", "nearest_input", "ordered"]


def fixed_symbol(size: int) -> sympy.Symbol:
    """The symbol of a free size that tracing has fixed to this number."""
    return sympy.Symbol(f"size_{size}", integer=True, positive=True)


def free_sizes(traced: Traced) -> dict[sympy.Symbol, dict[str, int]]:
    """For each free size, the inputs that have it, with their axis."""
    found: dict[sympy.Symbol, dict[str, int]] = {}
    taken: dict[int, str] = {}
    placeholders = [node for node in traced.module.graph.nodes if node.op == "placeholder"]
    for name, node in zip(traced.inputs, placeholders, strict=True):
        for axis, size in enumerate(node.meta["val"].shape):
            free = axis in traced.axes.get(name, {})
            symbolic = isinstance(size, torch.SymInt) and not size.node.expr.is_Integer
            if symbolic and isinstance(size.node.expr, sympy.Symbol):
                found.setdefault(size.node.expr, {}).setdefault(name, axis)
            elif not symbolic and free:
                found.setdefault(fixed_symbol(int(size)), {}).setdefault(name, axis)
            elif not symbolic:
                taken.setdefault(int(size), f"{name}, axis {axis}")
    for name in traced.weights:
        weight: Any = operator.attrgetter(name)(traced.module)
        for axis, size in enumerate(weight.shape):
            taken.setdefault(int(size), f"{traced.weights[name]}, axis {axis}")
    for size, where in taken.items():
        if fixed_symbol(size) in found:
            name = next(iter(found[fixed_symbol(size)]))
            raise UnsupportedError(
                f"export: {name} was traced with a free axis of size {size}, which {where} has too;"
                " trace with a size that nothing else has"
            )
    return found


def ordered(size: Any) -> list[Any]:
    """The terms of a sum or product in an order that does not depend on hashes."""
    return sorted(size.args, key=str)


def nearest_input(node: fx.Node, names: Mapping[fx.Node, str], wanted: set[str]) -> str | None:
    """Find one of the wanted inputs among what a node, then its users, are computed from."""
    for start in (node, *node.users):
        queue, seen = [start], {start}
        for found in queue:
            if names.get(found) in wanted:
                return names[found]
            for source in found.all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    queue.append(source)
    return None


def near_weights(node: fx.Node, traced: Traced) -> str:
    """Say where in the model a node is: its module, or the nearest weights before it."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        return f", module {next(reversed(stack.values()))[0]!r}"
    queue, seen = [node], {node}
    for found in queue:
        if found.op == "get_attr" and str(found.target) in traced.weights:
            return f", after {traced.weights[str(found.target)]!r}"
        for source in found.all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return ""
