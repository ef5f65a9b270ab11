"""Plain forms of what traces badly: fused attention, masks that depend on data, fused norms."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedlora.export.layers import exchanged
from fedlora.nn.llama import RMSNorm

__all__ = ["plain_forms"]


@contextmanager
def plain_forms(model: nn.Module) -> Iterator[None]:
    """Let the model compute with plain operations inside this block; the numbers are the same."""
    norms: dict[nn.Module, nn.Module] = {
        module: _Norm(module) for module in model.modules() if isinstance(module, RMSNorm)
    }
    # In evaluation torch's own encoder layer would read its children's weights in one call.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        for module in model.modules():
            if reads_tokens(module):
                hook = module.register_forward_pre_hook(
                    _masked(sees_ahead(module)), with_kwargs=True
                )
                stack.callback(hook.remove)
        stack.enter_context(exchanged(model, norms))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(_PlainFunctions())
        yield


def reads_tokens(module: nn.Module) -> bool:
    """Whether a module is one of transformers' models: ids and a mask go in."""
    arguments = inspect.signature(type(module).forward).parameters
    return hasattr(module, "config") and {"input_ids", "attention_mask"} <= arguments.keys()


@torch.no_grad()
def sees_ahead(model: nn.Module) -> bool:
    """Whether another second token changes the first state: an encoder, and not a causal model."""
    body: Any = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    found = []
    for second in (0, 1):
        ids = torch.tensor([[0, second]], device=device)
        found.append(body(ids, attention_mask=torch.ones_like(ids))[0][0, 0])
    return not torch.equal(*found)


def _masked(ahead: bool) -> Callable[..., Any]:
    """Give a model its mask as numbers to add, (batch, 1, time, time): 0 where visible."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = args[0] if args else kwargs.get("input_ids")
        mask = kwargs.get("attention_mask")
        if not isinstance(ids, Tensor) or (mask is not None and mask.ndim == 4):
            return None
        rows, time = ids.shape
        visible = torch.ones((rows, time), dtype=torch.bool, device=ids.device)
        visible = (visible if mask is None else mask != 0)[:, None, None, :]
        visible = visible.expand(rows, 1, time, time)
        if not ahead:
            places = torch.arange(time, device=ids.device)
            visible = visible & (places[None, :] <= places[:, None])
        return args, kwargs | {"attention_mask": additive(visible)}

    return hook


def additive(visible: Tensor) -> Tensor:
    """0 where visible and the least float32 elsewhere; a row that sees nothing is not NaN."""
    hidden = torch.full((), torch.finfo(torch.float32).min, device=visible.device)
    return torch.where(visible, torch.zeros((), device=visible.device), hidden)


class _PlainFunctions(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # of a base in evaluation mode: none
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` in two products and a softmax."""
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * scale) @ key.transpose(-1, -2)
    if is_causal:
        rows = torch.arange(query.shape[-2], device=query.device)[:, None]
        scores = scores + additive(torch.arange(key.shape[-2], device=query.device) <= rows)
    if attn_mask is not None:
        scores = scores + (additive(attn_mask) if attn_mask.dtype == torch.bool else attn_mask)
    return scores.softmax(-1) @ value


class _Norm(nn.Module):
    """`RMSNorm` beside frozen weights, in operations that change nothing in place."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _norm(x, self.norm.weight, self.norm.eps)
        return result


class _NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
        normalized = x * inverse
        ctx.save_for_backward(normalized, inverse, weight)
        return normalized * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        normalized, inverse, weight = ctx.saved_tensors
        scaled = gradients[0] * weight
        # d x / |x| has nothing along x itself.
        along = (scaled * normalized).mean(-1, keepdim=True)
        return (scaled - normalized * along) * inverse, None, None


_norm: Any = _NormFunction.apply
