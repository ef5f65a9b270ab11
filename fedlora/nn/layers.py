"""LoRA around one frozen module: linear, convolution, embedding, each plain or with DoRA.

A wrapper keeps the frozen module as `base_layer` and adds the factors as parameters in the core's
layouts. It computes what the module would compute with the weight ``W + scaling * B @ A`` (LoRA,
arXiv:2106.09685, equation 3), or with DoRA (arXiv:2402.09353, equation 5) ``magnitude * (W +
scaling * B @ A) / norm`` where `norm` is taken per output and treated as a constant (section 4.3).
Outputs, gradients and dropout are PEFT's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.adapter import Array, Kind, LoraLayer
from fedlora.errors import UnsupportedError
from fedlora.targets import LayerSpec

__all__ = [
    "LoraConv",
    "LoraEmbedding",
    "LoraLinear",
    "LoraModule",
    "is_bare_linear",
    "spec_of",
    "wrap",
]

CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the number of the weight's dimensions


class LoraModule(nn.Module):
    """A frozen module with a low-rank adapter beside it.

    lora_A: (rank, in_features), (rank, in_channels, *kernel) or (rank, rows), float32.
    lora_B: (out_features, rank) float32. magnitude: (out_features,) float32 or None.
    Attributes that it does not have itself are the base module's.
    """

    kind: ClassVar[Kind]
    base_layer: Any
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude: nn.Parameter | None

    def __init__(self, base_layer: nn.Module, layer: LoraLayer, dropout: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        device: torch.device = self.base_layer.weight.device
        self.lora_A = nn.Parameter(torch.tensor(layer.A, device=device))
        self.lora_B = nn.Parameter(torch.tensor(layer.B, device=device))
        magnitude = layer.magnitude
        self.register_parameter(
            "magnitude",
            None if magnitude is None else nn.Parameter(torch.tensor(magnitude, device=device)),
        )
        self.scaling = layer.scaling
        self.dropout = dropout
        self.merged = False  # the base's weight already holds the adapter
        self.training = base_layer.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not there yet, or in the middle of a copy
                raise
            return getattr(self.base_layer, name)

    def set_layer(self, layer: LoraLayer, dropout: float) -> None:
        """Take over the factors, scaling and rank; the parameters stay the same objects."""
        _assign(self.lora_A, layer.A)
        _assign(self.lora_B, layer.B)
        if self.magnitude is not None and layer.magnitude is not None:
            _assign(self.magnitude, layer.magnitude)
        self.scaling = layer.scaling
        self.dropout = dropout

    def set_base(self, base_layer: nn.Module) -> None:
        """Put the adapter around another frozen module of the same shape."""
        self.base_layer = base_layer

    def layer(self) -> LoraLayer:
        """Return a copy of the factors as they are now."""
        return LoraLayer(
            A=_array(self.lora_A),
            B=_array(self.lora_B),
            scaling=self.scaling,
            magnitude=None if self.magnitude is None else _array(self.magnitude),
            kind=self.kind,
        )

    def merged_weight(self) -> Tensor:
        """The weight that does alone what base and adapter do, in the base's layout and dtype."""
        with torch.no_grad():
            weight = self._whole_weight()
            if self.magnitude is not None:
                weight = weight * self._dora_scale()[:, None]
            stored: Tensor = self._as_stored(weight).to(self.base_layer.weight.dtype).contiguous()
            return stored

    def weight_norms(self) -> Array:
        """Norm of each output's weights, adapter included: (out_features,) float32."""
        return _array(self._norm())

    def extra_repr(self) -> str:
        dora = "" if self.magnitude is None else ", dora"
        return f"rank={self.lora_A.shape[0]}, scaling={self.scaling:g}{dora}"

    def _dora_scale(self) -> Tensor:
        """(out,) magnitude over norm; only the magnitude gets a gradient."""
        assert self.magnitude is not None  # for mypy: asked for where there is one
        scale: Tensor = self.magnitude / self._norm()
        return scale

    def _norm(self) -> Tensor:
        """(out,) norms of ``W + scaling * B @ A``: DoRA's constant, so no gradient."""
        with torch.no_grad():
            norms: Tensor = torch.linalg.vector_norm(self._whole_weight(), dim=1)
            return norms

    def _whole_weight(self) -> Tensor:
        """``W + scaling * B @ A``, (out, everything else)."""
        flat = self._flat_weight().to(self.lora_A.dtype)
        return torch.addmm(flat, self.lora_B, self.lora_A.flatten(1), alpha=self.scaling)

    def _flat_weight(self) -> Tensor:
        """The base's weight as (out, everything else)."""
        weight: Tensor = self.base_layer.weight
        return weight.flatten(1)

    def _as_stored(self, flat: Tensor) -> Tensor:
        """The reverse of `_flat_weight`."""
        return flat.view_as(self.base_layer.weight)


class LoraLinear(LoraModule):
    """`nn.Linear`, or GPT-2's `Conv1D`, which keeps its weight as (in, out)."""

    kind = "linear"

    def __init__(self, base_layer: nn.Module, layer: LoraLayer, dropout: float) -> None:
        super().__init__(base_layer, layer, dropout)
        self.set_base(base_layer)

    def set_base(self, base_layer: nn.Module) -> None:
        super().set_base(base_layer)
        self.transposed = _is_transposed_linear(base_layer)
        self.is_plain = is_bare_linear(base_layer) and base_layer.weight.dtype == torch.float32

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        # Past `nn.Module.__getattr__`, which would take a third of a small layer's time.
        factors: dict[str, Any] = self._parameters
        A, B, base = factors["lora_A"], factors["lora_B"], self._modules["base_layer"]
        if self.merged:
            return _call(base, x, *args, **kwargs)
        dora, dropping = factors["magnitude"] is not None, self.training and self.dropout > 0
        usual = self.is_plain and x.dtype == torch.float32
        if usual and not (dora and dropping) and not torch.is_autocast_enabled(x.device.type):
            # One product added in place instead of three passes over the output, which the frozen
            # product's gradient does not need. An autograd.Function that fuses the backward
            # too was no faster inside a whole model, and cannot be differentiated twice.
            frozen: dict[str, Any] = base._parameters  # type: ignore[union-attr]
            rows = x.reshape(-1, A.shape[1])
            y = F.linear(rows, frozen["weight"], None if dora else frozen["bias"])
            h = torch.mm(F.dropout(rows, self.dropout) if dropping else rows, A.t())
            y = y.addmm_(h, B.t(), alpha=self.scaling)
            if dora:
                y = y * self._dora_scale()
                y = y if frozen["bias"] is None else y + frozen["bias"]
            return y.view(*x.shape[:-1], B.shape[0])
        result = _call(base, x, *args, **kwargs)
        if dora:
            return self._dora(x, result)
        dropped = F.dropout(x, self.dropout) if dropping else x
        low = F.linear(F.linear(dropped.to(A.dtype), A), B) * self.scaling
        return (result + low).to(result.dtype)

    def _dora(self, x: Tensor, result: Tensor) -> Tensor:
        base, A, B = self.base_layer, self.lora_A, self.lora_B
        weight = self._flat_weight().to(A.dtype)
        inputs = x.to(A.dtype)
        scale = self._dora_scale()
        if self.training and self.dropout:
            # As in PEFT, the part of the base that DoRA rescales sees the dropped input too.
            inputs = F.dropout(inputs, self.dropout)
            plain = F.linear(inputs, weight)
        else:
            plain = result if base.bias is None else result - base.bias
        low = F.linear(F.linear(inputs, A), B) * self.scaling
        return (result + (scale - 1) * plain + scale * low).to(result.dtype)

    def _flat_weight(self) -> Tensor:
        weight: Tensor = self.base_layer.weight
        return weight.t() if self.transposed else weight

    def _as_stored(self, flat: Tensor) -> Tensor:
        return flat.t() if self.transposed else flat


class LoraConv(LoraModule):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: A has the base's kernel, B is a 1x1 convolution.

    A is applied with the base's stride, padding, padding mode and dilation, so that the sum is the
    base with another weight.
    """

    kind = "conv"

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, *size) to (batch, out_channels, *size)."""
        base, A = self.base_layer, self.lora_A
        result: Tensor = base(x)
        if self.merged:
            return result
        dropping = bool(self.training and self.dropout)
        inputs = x.to(A.dtype)
        inputs = F.dropout(inputs, self.dropout) if dropping else inputs
        ones = (1,) * (A.ndim - 2)
        pointwise = self.lora_B.view(*self.lora_B.shape, *ones)
        low: Tensor = CONVOLUTIONS[A.ndim](base._conv_forward(inputs, A, None), pointwise)
        low = low * self.scaling
        if self.magnitude is None:
            return (result + low).to(result.dtype)
        scale = self._dora_scale().view(-1, *ones)
        plain: Tensor
        if dropping:
            plain = base._conv_forward(inputs, base.weight.to(A.dtype), None)
        else:
            plain = result if base.bias is None else result - base.bias.view(-1, *ones)
        return (result + (scale - 1) * plain + scale * low).to(result.dtype)


class LoraEmbedding(LoraModule):
    """`nn.Embedding`: row i gets ``scaling * B @ A[:, i]``. Without dropout, as in PEFT.

    A row that is looked up by `padding_idx` has no gradient. `max_norm` rescales used rows of the
    base in place, with or without LoRA, and of A too.
    """

    kind = "embedding"

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 to (..., dim)."""
        base = self.base_layer
        result: Tensor = base(ids)
        if self.merged:
            return result
        # Before A's look-up, which rescales A where the base has a max_norm.
        scale = None if self.magnitude is None else self._dora_scale()
        rows = F.embedding(
            ids,
            self.lora_A.t(),
            padding_idx=base.padding_idx,
            max_norm=base.max_norm,
            norm_type=base.norm_type,
            scale_grad_by_freq=base.scale_grad_by_freq,
        )
        low = F.linear(rows, self.lora_B) * self.scaling
        embed_scale = getattr(base, "embed_scale", None)  # Gemma multiplies after the look-up
        if embed_scale is not None:
            low = low * embed_scale
        both = result + low
        return (both if scale is None else scale * both).to(result.dtype)

    def _flat_weight(self) -> Tensor:
        weight: Tensor = self.base_layer.weight
        return weight.t()

    def _as_stored(self, flat: Tensor) -> Tensor:
        return flat.t()


WRAPPERS: dict[Kind, type[LoraModule]] = {
    "linear": LoraLinear,
    "conv": LoraConv,
    "embedding": LoraEmbedding,
}


def wrap(
    path: str, base_layer: nn.Module, A: Array, scaling: float, *, dora: bool, dropout: float
) -> LoraModule:
    """Put a new adapter around `base_layer`: the given A, B zero, DoRA's magnitude from its norms.

    Raises `UnsupportedError` for DoRA on a weight with a zero row, whose norm it would divide by.
    """
    spec = spec_of(base_layer)
    assert spec is not None  # the caller has chosen among modules with a spec
    B = np.zeros((spec.out_features, A.shape[0]), np.float32)
    magnitude = np.ones(spec.out_features, np.float32) if dora else None
    layer = LoraLayer(A, B, scaling, magnitude, spec.kind)
    module = WRAPPERS[spec.kind](base_layer, layer, dropout)
    if dora:
        norms = module.weight_norms()
        if not norms.all():
            raise UnsupportedError(
                f"layer {path!r}: DoRA divides by the norm of each output's weights, and "
                f"{np.count_nonzero(norms == 0)} of {norms.size} are zero; leave the layer out of "
                "target_modules, or use variant 'lora'"
            )
        assert module.magnitude is not None
        _assign(module.magnitude, norms)
    return module


def spec_of(module: nn.Module) -> LayerSpec | None:
    """Describe a module that can carry LoRA; None for any other.

    Grouped convolutions cannot: PEFT's B has rank / groups columns there, another layout.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    bias = getattr(module, "bias", None)
    parameters = weight.numel() + (bias.numel() if isinstance(bias, Tensor) else 0)
    if isinstance(module, nn.Linear):
        return LayerSpec("linear", (module.in_features,), module.out_features, False, parameters)
    if _is_transposed_linear(module):
        rows, columns = weight.shape
        return LayerSpec("linear", (rows,), columns, False, parameters)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups > 1:
            return None
        shape = tuple(weight.shape[1:])
        return LayerSpec("conv", shape, module.out_channels, False, parameters)
    if isinstance(module, nn.Embedding):
        rows, columns = weight.shape
        return LayerSpec("embedding", (rows,), columns, False, parameters)
    return None


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`, recognized without importing transformers."""
    weight = getattr(module, "weight", None)
    return (
        any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)
        and isinstance(weight, Tensor)
        and weight.ndim == 2
        and weight.shape[1] == getattr(module, "nf", None)
    )


def is_bare_linear(module: nn.Module) -> bool:
    """Whether calling the module is no more than `F.linear` with its parameters."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)  # accelerate replaces it
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _call(module: Any, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = module(*args, **kwargs)
    return result


def _assign(parameter: nn.Parameter, values: Array) -> None:
    """Copy `values` in; with another shape the parameter gets new memory and loses its gradient."""
    if parameter.shape != values.shape:
        parameter.data = torch.tensor(values, device=parameter.device)
        parameter.grad = None
    elif parameter.device.type == "cpu":  # NumPy copies small arrays several times faster
        np.copyto(parameter.detach().numpy(), values)
    else:
        parameter.data.copy_(torch.tensor(values))


def _array(tensor: Tensor) -> Array:
    """A read-only copy that owns its memory, so that `LoraLayer` need not copy again."""
    array = np.array(tensor.detach().cpu().numpy(), np.float32, order="C")
    array.flags.writeable = False
    return array
