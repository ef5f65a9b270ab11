"""What is between tracing a model and emitting it: a graph of aten operations with named ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

__all__ = ["Traced"]


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
