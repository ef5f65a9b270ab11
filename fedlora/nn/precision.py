"""Training in bfloat16: the frozen base and the activations; all that is learned stays float32.

It is inexact and opt-in. Factors, their gradients' sums, the optimizer, losses and attention are in
float32. The float32 base stays in memory beside its bfloat16 twin (half as much again), because
evaluation is always in float32: the numbers that are reported are those of the base that ships.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedlora.nn.inject import half_weights
from fedlora.nn.layers import LoraModule

__all__ = ["Precision", "computing_in"]

Precision = Literal["fp32", "bf16"]
ATTENTION = "fedlora_sdpa_fp32"  # the name under which transformers knows our attention


@contextmanager
def computing_in(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Let an injected model compute in this precision within this block; "fp32" does nothing.

    Only frozen floating-point tensors are exchanged, on this copy of the model alone: copies in
    other threads that share its weights are not affected. LoRA's factors stay as they are. The
    rotary frequencies of transformers' models (`inv_freq`) stay float32. Features are cast on
    entry.

    Attention is float32 in transformers' models that run `sdpa`, in `fedlora.nn.llama.Llama`, and
    wherever `F.scaled_dot_product_attention` is called by name. `nn.MultiheadAttention` calls it
    out of sight: it is right there, but slow (bfloat16's backward on CPU took 6 times as long).
    """
    if precision == "fp32":
        yield
        return
    with _half_tensors(model), _float_inputs(model), _float_attention(model):
        yield


@contextmanager
def _half_tensors(model: nn.Module) -> Iterator[None]:
    halves = half_weights(model)
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in model.modules():
            holders: list[dict[str, Any]] = [module._buffers]
            if not isinstance(module, LoraModule):
                holders.append(module._parameters)
            for holder in holders:
                for name, tensor in holder.items():
                    if tensor is not None and _is_cast(name, tensor):
                        before.append((holder, name, tensor))
        for holder, name, tensor in before:
            holder[name] = halves.of(tensor)
        yield
    finally:
        for holder, name, tensor in before:
            holder[name] = tensor


def _is_cast(name: str, tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and not tensor.requires_grad and "inv_freq" not in name


@contextmanager
def _float_inputs(model: nn.Module) -> Iterator[None]:
    """Cast the model's floating-point arguments."""
    forward, own = model.forward, vars(model).get("forward")

    def cast(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.dtype == torch.float32
        return value.to(torch.bfloat16) if is_float else value

    def entered(*args: Any, **kwargs: Any) -> Any:
        return forward(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    try:
        object.__setattr__(model, "forward", entered)
        yield
    finally:
        vars(model).pop("forward", None)
        if own is not None:
            object.__setattr__(model, "forward", own)


@contextmanager
def _float_attention(model: nn.Module) -> Iterator[None]:
    """Run attention in float32: on the CPU, its backward in bfloat16 is several times as slow."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {
        id(config): config
        for config in found
        if getattr(config, "_attn_implementation", None) == "sdpa"
    }
    if not configs:
        if any("attention" in type(m).__name__.lower() for m in model.modules()):
            with _CastsAttention():
                yield
        else:
            yield
        return
    _register()
    try:
        for config in configs.values():
            config._attn_implementation = ATTENTION
        yield
    finally:
        for config in configs.values():
            config._attn_implementation = "sdpa"


def _register() -> None:
    """Make our attention known to transformers, whose public registry this is."""
    from transformers import AttentionInterface, AttentionMaskInterface

    known = AttentionInterface()  # type: ignore[no-untyped-call]
    if ATTENTION in known:
        return
    plain = known["sdpa"]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        wide = (tensor.float() for tensor in (query, key, value))
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        mixed, weights = plain(module, *wide, mask, **options)
        return mixed.to(query.dtype), weights

    AttentionInterface.register(ATTENTION, attention)
    masks = AttentionMaskInterface()  # type: ignore[no-untyped-call]
    AttentionMaskInterface.register(ATTENTION, masks["sdpa"])


class _CastsAttention(TorchFunctionMode):
    """The same for models of another make, in this thread only."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)

        def wide(value: Any) -> Any:
            is_half = isinstance(value, Tensor) and value.dtype == torch.bfloat16
            return value.float() if is_half else value

        out: Tensor = func(*map(wide, args), **{name: wide(v) for name, v in kwargs.items()})
        return out.to(args[0].dtype)
