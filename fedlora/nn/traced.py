"""What the modules of a model were given and what they made of it, call by call, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.nn.inject import lora_modules
from fedlora.nn.layers import LoraModule

__all__ = [
    "Call",
    "first_difference",
    "generator_state",
    "named",
    "near",
    "remove",
    "rows_of",
    "traced",
]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module: copies of the tensors that went in and came out."""

    name: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    drew: bool  # random numbers


def traced(
    model: nn.Module, run: Callable[[], object], device: torch.device
) -> tuple[list[Call], str]:
    """Run a pass through an injected model, whatever it raises, and leave no hooks behind.

    Return the calls in the order in which they returned, and the innermost that did not, or "".
    """
    calls: list[Call] = []
    entered: list[tuple[str, Tensor]] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            entered.append((name, generator_state(device)))

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            drew = not torch.equal(entered.pop()[1], generator_state(device))
            inputs = [*_tensors(args), *_tensors(kwargs)]
            calls.append(Call(name, _copies(inputs), _copies(_tensors(output)), drew))

        return hook

    handles: list[Any] = []
    bases = {id(module.base_layer) for module in lora_modules(model).values()}
    try:
        for path, module in model.named_modules():
            if id(module) in bases:  # a hook there would mean another way through the layer
                continue
            name = named(path, module)
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave(name), with_kwargs=True))
        run()
    except Exception:  # a caller that wants the error has seen it already
        return calls, entered[-1][0] if entered else ""
    finally:
        remove(handles)
    return calls, ""


def first_difference(
    one: list[Call], other: list[Call], same: Callable[[Tensor, Tensor], bool]
) -> str | None:
    """The first call to return that made different outputs of the same inputs."""

    def equal(left: list[Tensor], right: list[Tensor]) -> bool:
        return len(left) == len(right) and all(map(same, left, right))

    for left, right in zip(one, other, strict=False):
        if left.name != right.name:
            return None
        if equal(left.inputs, right.inputs) and not equal(left.outputs, right.outputs):
            return left.name
    return None


def near(one: Tensor, other: Tensor, share: float, floor: float = 0.0) -> bool:
    """Whether two tensors differ by no more than a share of the largest number in `other`."""
    if not other.numel():
        return True
    limit = max(share * float(other.abs().max()), floor)
    # Infinities, such as those of a mask, are equal to themselves, and their difference is NaN.
    difference = torch.where(one == other, 0.0, one - other).abs()
    return bool((difference <= limit).all())


def rows_of(tensor: Tensor, k: int) -> Tensor:
    """One client's half of dimension 0; all where it has no halves."""
    if tensor.ndim == 0 or tensor.shape[0] % 2:
        return tensor
    half = tensor.shape[0] // 2
    return tensor[k * half : (k + 1) * half]


def named(path: str, module: nn.Module) -> str:
    kind = type(module.base_layer if isinstance(module, LoraModule) else module).__name__
    return f"layer {path!r} ({kind})" if path else f"the model itself ({kind})"


def remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def generator_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.default_generator.get_state()


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in arguments or outputs, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        value = tuple(getattr(value, field.name) for field in fields(value))
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """What they hold now: a later module may write into them."""
    return [tensor.detach().clone() for tensor in tensors]
