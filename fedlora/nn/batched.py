"""The batched layer: one frozen module with K clients' adapters beside it, in one pass.

Rows are client-major: dimension 0 of the input is K equal blocks. With stacks of A and B, block k
gets ``x W.T + scaling_k * x A_k.T B_k.T``, which is what client k would get alone. Gradients of the
stacks go straight into their buffers, and autograd follows the activations only: while a group
trains, the factors are no parameters of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.adapter import Array, LoraLayer
from fedlora.errors import ConfigError, ShapeMismatchError
from fedlora.nn.layers import LoraEmbedding, LoraLinear, LoraModule, is_bare_linear
from fedlora.training import Factor

__all__ = ["LayerStack", "batched_layers", "why_not_batched"]


class LayerStack:
    """The factors of K clients on one layer, with gradients for those in `trained`.

    A: (K, rank, in_features), B: (K, rank, out_features), that is, transposed; float32, of the
    largest rank among the clients: smaller ones are padded with zeros in both, which training
    leaves exactly zero. A stack of one layer serves any number of rows, all with the same adapter.

    Raises `ShapeMismatchError` when the layers are not of one module: NumPy would broadcast.
    """

    def __init__(
        self, layers: Sequence[LoraLayer], trained: frozenset[Factor], device: torch.device
    ) -> None:
        first, rank = layers[0], max(layer.rank for layer in layers)
        A = torch.zeros(len(layers), rank, *first.in_shape)
        B = torch.zeros(len(layers), rank, first.out_features)
        into_A, into_B = A.numpy(), B.numpy()
        # In a round all clients begin with one adapter, which is copied to all of them at once.
        if all(layer is first for layer in layers):
            into_A[:, : first.rank], into_B[:, : first.rank] = first.A, first.B.T
        else:
            for k, layer in enumerate(layers):
                if layer.A.shape[1:] != A.shape[2:] or len(layer.B) != B.shape[2]:
                    raise ShapeMismatchError(
                        f"expected {first.in_shape} -> {first.out_features} as of the first "
                        f"client, found {layer.in_shape} -> {layer.out_features} of client {k}"
                    )
                into_A[k, : layer.rank], into_B[k, : layer.rank] = layer.A, layer.B.T
        self.ranks = [layer.rank for layer in layers]
        self._all: dict[Factor, Tensor] = {"A": A.to(device), "B": B.to(device)}
        self._all_gradients = {
            name: torch.zeros_like(value) for name, value in self._all.items() if name in trained
        }
        scalings = [layer.scaling for layer in layers]
        # One number costs nothing; where it differs by client it is multiplied into B and h.
        self.scaling = scalings[0]
        self.scalings: Tensor | None = None
        if any(scaling != self.scaling for scaling in scalings):
            self.scaling = 1.0
            self.scalings = torch.tensor(scalings, device=device).view(-1, 1, 1)
        self._filled: set[Factor] = set()
        self._clients = 0
        self.next_step(len(layers))

    def next_step(self, clients: int) -> None:
        """Leave the first `clients` clients active; the next gradients replace the last ones."""
        self._filled.clear()
        if clients == self._clients:
            return
        self._clients = clients
        self.values = {name: value[:clients] for name, value in self._all.items()}
        self.gradients = {name: value[:clients] for name, value in self._all_gradients.items()}
        self._scalings = None if self.scalings is None else self.scalings[:clients]

    def has_gradient(self, name: Factor) -> bool:
        """Whether this step has brought a gradient for a factor."""
        return name in self._filled

    def all(self, name: Factor) -> Tensor:
        """Return a factor of all clients, active or not, as it lies here."""
        return self._all[name]

    @property
    def trained(self) -> tuple[Factor, ...]:
        """The factors that have gradients, A before B."""
        return tuple(self._all_gradients)

    def as_layers(self, name: Factor) -> Tensor:
        """Return a factor of all clients, each in the shape of a `LoraLayer`."""
        value = self._all[name]
        return value if name == "A" else value.transpose(1, 2)

    def of_client(self, k: int, name: Factor) -> Array:
        """Return one client's factor in the shape and rank of a `LoraLayer`: a view."""
        value = self._all[name][k, : self.ranks[k]].cpu().numpy()
        return value if name == "A" else value.T

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A and B in `dtype`; B holds the scalings where they differ by client."""
        A, B = self.values["A"], self.values["B"]
        return A.to(dtype), (B if self._scalings is None else B * self._scalings).to(dtype)

    def add_gradient(self, name: Factor, left: Tensor, right: Tensor) -> None:
        """Add ``scaling * left @ right`` to the gradient of a factor.

        A layer may be called several times in a pass; the first call of a step replaces.
        """
        into = self.gradients[name]
        if name == "B" and self._scalings is not None:
            left = left * self._scalings
        if left.dtype == into.dtype == right.dtype:
            into.baddbmm_(left, right, beta=float(name in self._filled), alpha=self.scaling)
        else:
            # In bfloat16 the product sums in float32 and rounds once. Casting the activations to
            # float32 before it took 1.4 to 3.7 times as long, a fifth of the whole layer.
            if name not in self._filled:
                into.zero_()
            product = torch.bmm(left.to(right.dtype), right)
            into.add_(product, alpha=self.scaling)
        self._filled.add(name)

    def scatter_gradient(self, places: Tensor, values: Tensor) -> None:
        """Add ``scaling * values`` (K, rank, n) to the gradient of A at columns `places` (K, n)."""
        into = self.gradients["A"]
        if "A" not in self._filled:
            into.zero_()
        index = places[:, None].expand(values.shape)
        into.scatter_add_(2, index, values.to(into.dtype) * self.scaling)
        self._filled.add("A")


@contextmanager
def batched_layers(
    modules: Mapping[str, LoraModule], stacks: Mapping[str, LayerStack]
) -> Iterator[None]:
    """Let each module of an injected model serve its stack's clients in place of its own adapter.

    The model's own factors are neither read nor changed. `why_not_batched` says beforehand which
    layers cannot be batched. A layer raises `ConfigError` when it is called on something whose
    dimension 0 cannot be the clients' rows, such as the positions of a whole batch.
    """
    try:
        for path, module in modules.items():
            # On the instance, which `nn.Module.__call__` looks at first.
            object.__setattr__(module, "forward", _forward(path, module, stacks[path]))
        yield
    finally:
        for module in modules.values():
            vars(module).pop("forward", None)


def why_not_batched(modules: Mapping[str, LoraModule]) -> str | None:
    """Return the reason why a model's adapters cannot share a pass; None if they can."""
    for path, module in modules.items():
        base = module.base_layer
        if module.magnitude is not None:
            return f"layer {path!r} has DoRA, whose norms depend on each client's whole weight"
        if module.merged:
            return f"layer {path!r} is merged into the base"
        if not isinstance(module, LoraLinear | LoraEmbedding):
            return f"layer {path!r} is a {module.kind}, and only linear and embedding are batched"
        if isinstance(module, LoraEmbedding) and (base.max_norm or base.scale_grad_by_freq):
            return f"layer {path!r} is an embedding with max_norm or scale_grad_by_freq"
    return None


def _forward(path: str, module: LoraModule, stack: LayerStack) -> Any:
    base = module.base_layer

    def check(x: Tensor) -> None:
        # Its numbers might divide by K all the same, and one client get another's positions.
        clients = stack.values["A"].shape[0]
        if x.ndim == 0 or x.shape[0] % clients:
            raise ConfigError(
                f"layer {path!r}: expected the rows of {clients} clients in dimension 0, found "
                f"shape {tuple(x.shape)}; train one client at a time"
            )

    # Autograd calls a backward only for what comes from a leaf that requires grad. In the lowest
    # adapted layer nothing does: its input is the frozen base's.
    anchor = torch.zeros(0, requires_grad=bool(stack.gradients), device=base.weight.device)

    def linear(x: Tensor) -> Tensor:
        """(K * b, ..., in) to (K * b, ..., out); frozen and low-rank product in one node."""
        check(x)
        y: Tensor = _low_rank(x, anchor, stack, base.weight, base.bias)
        return y

    def beside(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The same around a base of any other type or dtype, which is called as it is."""
        check(x)
        result: Tensor = base(x, *args, **kwargs)
        low: Tensor = _low_rank(x, anchor, stack, None, None)
        return result + low.to(result.dtype)

    def embedding(ids: Tensor) -> Tensor:
        """(K * b, ...) int64 to (K * b, ..., dim)."""
        check(ids)
        result: Tensor = base(ids)
        low: Tensor = _rows(ids, anchor, stack, base.padding_idx, result.dtype)
        scale = getattr(base, "embed_scale", None)  # Gemma multiplies after the look-up
        return result + (low if scale is None else low * scale)

    if isinstance(module, LoraEmbedding):
        return embedding
    return linear if is_bare_linear(base) else beside


class _LowRank(torch.autograd.Function):
    """``scaling_k * x A_k.T B_k.T`` for each client's rows, with ``x W.T + bias`` if W is given.

    Saves x and h = x A.T only, where autograd of the written-out sum would keep three more.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, stack: LayerStack, weight: Any, bias: Any
    ) -> Tensor:
        A, B = stack.factors(x.dtype)
        clients, out = A.shape[0], B.shape[2]
        rows = x.reshape(clients, -1, A.shape[2])
        h = torch.bmm(rows, A.transpose(1, 2))
        if weight is None:
            y = torch.bmm(h, B)
            y = y if stack.scaling == 1.0 else y.mul_(stack.scaling)
        else:
            # Not a view: rows may be of a transposed or expanded tensor.
            y = F.linear(rows.reshape(-1, A.shape[2]), weight, bias).view(clients, -1, out)
            y.baddbmm_(h, B, alpha=stack.scaling)
        ctx.save_for_backward(rows, h, weight)
        ctx.stack, ctx.shape = stack, x.shape
        return y.view(*x.shape[:-1], out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        rows, h, weight = ctx.saved_tensors
        stack: LayerStack = ctx.stack
        A, B = stack.factors(rows.dtype)
        y = gradient.reshape(A.shape[0], -1, B.shape[2])
        if "B" in stack.gradients:
            stack.add_gradient("B", h.transpose(1, 2), y)
        wants_input = ctx.needs_input_grad[0]
        if not wants_input and "A" not in stack.gradients:
            return None, None, None, None, None
        low = torch.bmm(y, B.transpose(1, 2))  # of h, without the one scaling
        if "A" in stack.gradients:
            stack.add_gradient("A", low.transpose(1, 2), rows)
        if not wants_input:
            return None, None, None, None, None
        if weight is None:
            x = torch.bmm(low, A)
            x = x if stack.scaling == 1.0 else x.mul_(stack.scaling)
        else:
            x = torch.mm(y.reshape(-1, B.shape[2]), weight).view(rows.shape)
            x.baddbmm_(low, A, alpha=stack.scaling)
        return x.view(ctx.shape), None, None, None, None


class _Rows(torch.autograd.Function):
    """``scaling_k * B_k A_k[:, id]`` for each client's ids."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        anchor: Tensor,
        stack: LayerStack,
        padding: int | None,
        dtype: torch.dtype,
    ) -> Tensor:
        A, B = stack.factors(dtype)
        places = ids.reshape(A.shape[0], -1)
        h = A.gather(2, places[:, None].expand(-1, A.shape[1], -1)).transpose(1, 2)
        y = torch.bmm(h, B)
        ctx.save_for_backward(places, h)
        ctx.stack, ctx.padding = stack, padding
        return y.mul_(stack.scaling).view(*ids.shape, B.shape[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None, None]:
        places, h = ctx.saved_tensors
        stack: LayerStack = ctx.stack
        A, B = stack.factors(h.dtype)
        y = gradient.reshape(A.shape[0], -1, B.shape[2])
        if "B" in stack.gradients:
            stack.add_gradient("B", h.transpose(1, 2), y)
        if "A" in stack.gradients:
            low = torch.bmm(y, B.transpose(1, 2))
            if ctx.padding is not None:  # as in torch, a padding row has no gradient
                low = low * (places != ctx.padding)[..., None]
            stack.scatter_gradient(places, low.transpose(1, 2))
        return None, None, None, None, None


_low_rank: Any = _LowRank.apply
_rows: Any = _Rows.apply
