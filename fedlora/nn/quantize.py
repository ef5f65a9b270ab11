"""A frozen base in fewer bits: NF4 as in QLoRA (arXiv:2305.14314, section 3), or int8.

Weights alone are quantized, once, after LoRA is on the base; activations, gradients and adapters
stay float32. A layer computes ``x @ W.T + bias`` with the W that the stored bits stand for, and its
backward pass multiplies by the same W: what is trained is an adapter of the base with the weights
W, to float32's precision. W exists while it is used and is never kept, in the graph neither.

The layers are fedlora's own, NF4 on the kernels of bitsandbytes, since its layers (0.50.2) do not
keep what fedlora promises:

- LLM.int8 looks for outliers in all rows of a batch together, so that one client's row changes
  another's result; it rounds activations to fp16 and int8, and its gradient is not that of its
  output. Here int8 is a format of weights only, with one scale an output, and needs no package.
- The 4-bit layer repacks its weights in place for a product in bf16 as soon as it sees an input
  without gradient on a processor with AVX512-BF16: evaluation would be of another model than
  training, and another thread may train on the same weights.
- The 4-bit kernel for CPUs reads the wrong scales where a row is not whole blocks (in_features 96:
  an error as large as the weights). So weights are handed to it flat, one block a row.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.errors import ConfigError, MissingExtraError
from fedlora.nn.classifier import NEW_HEAD
from fedlora.nn.inject import QUANTIZED, base_fingerprint, frozen_linears, replace_frozen

__all__ = ["Int8Linear", "Nf4Linear", "Quantize", "QuantizedLinear", "quantize_base", "require"]

Quantize = Literal["nf4", "int8"]
BLOCK = 64  # weights that share a scale in NF4, as in QLoRA
LARGEST = 127  # of int8; symmetric, -128 is not used


def quantize_base(model: nn.Module, kind: Quantize) -> int:
    """Replace the frozen linear layers of `model` by quantized ones, in place; return how many.

    Embeddings, convolutions, the output head, a new zero head, and weights that another module
    shares stay as they are. LoRA on a layer stays on it. It cannot be undone, since the old weights
    are let go; merging an adapter is refused from now on. Load the base again for its own weights.

    `base_fingerprint` of the model, and so of every adapter that comes out of it, stays that of the
    base before: it says which base an adapter is for, and that is the one everyone has. A device
    may run the adapter on the full or the quantized base, and a server, which has a card and no
    weights, knows the former only.

    DoRA's magnitude stays what it was: the norms of the full weights. Raises `ConfigError` for a
    model that is quantized already, holds a merged adapter, or has no linear layer to quantize,
    and `MissingExtraError`.
    """
    require(kind)
    if hasattr(model, QUANTIZED):
        raise ConfigError("base.quantize: this base is quantized already; load it again")
    chosen = {
        path: layer
        for path, layer in frozen_linears(model).items()
        if path.rpartition(".")[2] != NEW_HEAD
    }
    if not chosen:
        raise ConfigError(
            f"base.quantize: {type(model).__name__} has no linear layer below its output; leave "
            "the key out"
        )
    fingerprint = base_fingerprint(model)
    make = LAYERS[kind]
    replace_frozen(model, {layer: make(layer) for layer in chosen.values()})
    setattr(model, QUANTIZED, fingerprint)
    return len(chosen)


def require(kind: Quantize) -> None:
    """Raise `MissingExtraError` when what `kind` needs is not installed, before work is done."""
    if kind == "nf4":
        _bitsandbytes()


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose `weight` is computed from stored bits whenever it is asked for.

    weight: (out_features, in_features) float32, read-only. bias: the old layer's own parameter.
    A row of the output depends on that row of the input only. Made of an `nn.Linear`, or of GPT-2's
    `Conv1D`, which becomes the usual way round.
    """

    def __init__(self, linear: nn.Module) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make a weight
        weight: Tensor = linear.weight  # type: ignore[assignment]
        if not isinstance(linear, nn.Linear):
            weight = weight.t()
        self.out_features, self.in_features = weight.shape
        self.bias = linear.bias  # type: ignore[assignment]
        self.training = linear.training
        self._store(weight.detach().float())

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W as float32, new at every call."""
        return self._weight()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), in x's dtype."""
        out: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def _store(self, weight: Tensor) -> None:
        raise NotImplementedError

    def _weight(self) -> Tensor:
        raise NotImplementedError


class Int8Linear(QuantizedLinear):
    """One byte a weight: ``round(127 w / largest)``, largest = max |w| of each output.

    The format of LLM.int8's weights (arXiv:2208.07339, section 2.1, vector-wise).
    """

    def _store(self, weight: Tensor) -> None:
        largest = weight.abs().amax(1, keepdim=True)
        # A row of zeros has no scale; 1 keeps it zero.
        scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
        self.register_buffer("quantized", torch.round(weight / scale).to(torch.int8))
        self.register_buffer("scale", scale)

    def _weight(self) -> Tensor:
        buffers: Any = self._buffers
        weight: Tensor = buffers["quantized"].float().mul_(buffers["scale"])
        return weight


class Nf4Linear(QuantizedLinear):
    """Half a byte a weight: the nearest of 16 values, times the largest of each block of 64.

    The last block is filled with zeros. Scales are float32: 4.5 bits a weight in all. (QLoRA also
    quantizes the scales, which would save 0.37 more.)
    """

    def _store(self, weight: Tensor) -> None:
        bits = _bitsandbytes()
        blocks = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
        packed, state = bits.quantize_4bit(blocks, blocksize=BLOCK, quant_type="nf4")
        self.register_buffer("packed", packed)
        self.register_buffer("largest", state.absmax)

    def _weight(self) -> Tensor:
        bits, buffers = _bitsandbytes(), self._buffers
        largest: Any = buffers["largest"]
        state = bits.QuantState(
            largest, (len(largest), BLOCK), None, BLOCK, "nf4", dtype=torch.float32
        )
        flat: Tensor = bits.dequantize_4bit(buffers["packed"], state).view(-1)
        return flat[: self.out_features * self.in_features].view(self.out_features, -1)


LAYERS: dict[Quantize, type[QuantizedLinear]] = {"nf4": Nf4Linear, "int8": Int8Linear}


class _Product(torch.autograd.Function):
    """``F.linear`` that computes the frozen weight again for the backward pass.

    Autograd would keep W for it: all layers' float32 weights at once, more than was saved.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.weight.to(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.weight.to(grad.dtype), None


@functools.cache
def _bitsandbytes() -> Any:
    """Return bitsandbytes.functional. Raises `MissingExtraError`."""
    try:
        with _no_kernels_from_the_hub():
            import bitsandbytes.functional as bits
    except ImportError as error:
        raise MissingExtraError("base.quantize = 'nf4'", "quant") from error
    return bits


@contextmanager
def _no_kernels_from_the_hub() -> Iterator[None]:
    """Import bitsandbytes without its import's download of code from the Hugging Face hub.

    It asks the package `kernels` for one, where that is installed, and else logs a warning.
    """
    name = "kernels"
    before, missing = sys.modules.get(name), name not in sys.modules
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    sys.modules[name] = None  # type: ignore[assignment]  # how Python says: cannot be imported
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if missing:
            del sys.modules[name]
        elif before is not None:
            sys.modules[name] = before
