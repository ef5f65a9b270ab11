"""What is between tracing a model and emitting it: a graph of aten operations with named ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["Traced", "bound", "packet_name"]


@dataclass(frozen=True)
class Traced:
    """A traced function.

    module: a graph whose placeholders are `inputs`, in that order, and whose output is a flat tuple
    of `outputs`. Nodes call aten operations (``torch.ops.aten``) and, on symbolic sizes, Python's
    arithmetic; every tensor node has ``meta["val"]``. Weights of the base are ``get_attr`` nodes;
    `weights` names each one's tensor in `BaseWeights`. Any other attribute is a small constant.
    examples: one tensor of each input, with which it was traced.
    axes: of each input the names of its free axes, by index; an axis that is not there is fixed.
    defaults: inputs that need not be fed, with what they are then (LoRA factors: zeros of rank 1).
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, str]  # attribute of the module → tensor of the base
    examples: Mapping[str, Tensor]
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    defaults: Mapping[str, Tensor] = field(default_factory=dict)


def packet_name(node: fx.Node) -> str:
    """Return the aten operation's name; an operation in place has the name of its plain twin."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = target._schema.name.removeprefix("aten::")
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def bound(node: fx.Node) -> SimpleNamespace:
    """Return a call's arguments by name, with the schema's defaults."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found: dict[str, Any] = {}
    for place, argument in enumerate(node.target._schema.arguments):
        if place < len(node.args):
            found[argument.name] = node.args[place]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        else:
            found[argument.name] = argument.default_value if argument.has_default_value() else None
    return SimpleNamespace(**found)
