"""The graphs of a base: inputs to logits, and one training step's loss and gradients.

A graph's inputs and outputs are those that `fedlora.device.manifest` describes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedlora.device.manifest import factor_names
from fedlora.errors import ConfigError, UnsupportedError
from fedlora.export.capture import capture
from fedlora.export.layers import FactorLayer, set_factors, with_factors
from fedlora.export.plain import plain_forms
from fedlora.export.traced import Traced
from fedlora.nn.inject import layer_specs
from fedlora.nn.layers import is_bare_linear
from fedlora.nn.outputs import hidden_and_head, logits_of
from fedlora.nn.rows import NOT_COUNTED
from fedlora.targets import LayerSpec

__all__ = [
    "Subject",
    "by_path",
    "example",
    "factor_inputs",
    "infer_graph",
    "subject_of",
    "train_graph",
]

# Sizes of free axes while a graph is recorded: such as no layer of a model has.
BATCH, TIME, PAST, RANK, FROZEN_RANK = 3, 11, 17, 29, 31


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What is traced: a base, the layers whose factors its graphs take, and what goes in.

    input_shape: of one example: () for token ids, whose length is free.
    """

    model: nn.Module
    layers: Mapping[str, LayerSpec]
    task: Literal["next-token", "classification"]
    input_shape: tuple[int, ...] = ()
    input_dtype: torch.dtype = torch.int64
    names: Mapping[int, str] = field(default_factory=dict)  # of each tensor, by its id

    @property
    def is_text(self) -> bool:
        return self.input_shape == ()


def subject_of(
    model: nn.Module,
    paths: Sequence[str],
    task: Literal["next-token", "classification"],
    input_shape: tuple[int, ...] = (),
) -> Subject:
    """Describe a frozen model without LoRA; features are float32 unless `input_shape` is ().

    Raises `ConfigError` for a path that is no layer of the model.
    """
    specs = layer_specs(model)
    if missing := sorted(set(paths) - specs.keys()):
        raise ConfigError(f"export: expected a layer that can carry LoRA, found {missing[0]!r}")
    names: dict[int, str] = {}
    for module_path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                names.setdefault(id(tensor), f"{module_path}.{name}" if module_path else name)
    return Subject(
        model,
        {path: specs[path] for path in sorted(paths)},
        task,
        input_shape,
        torch.float32 if input_shape else torch.int64,
        names,
    )


@dataclass(frozen=True, slots=True)
class Factors:
    """The factor inputs of a graph: examples, free axes, defaults, in the order of the inputs."""

    examples: Mapping[str, Tensor]
    axes: Mapping[str, Mapping[int, str]]
    defaults: Mapping[str, Tensor]


def factor_inputs(subject: Subject, *, frozen: bool = False) -> Factors:
    """Return A (rank, *in_shape) and B (out_features, rank) of every layer."""
    examples: dict[str, Tensor] = {}
    axes: dict[str, Mapping[int, str]] = {}
    defaults: dict[str, Tensor] = {}
    word, rank = ("frozen_rank", FROZEN_RANK) if frozen else ("rank", RANK)
    for path, spec in subject.layers.items():
        name_A, name_B = factor_names(path, frozen=frozen)
        for name, axis, before, after in (
            (name_A, 0, (), spec.in_shape),
            (name_B, 1, (spec.out_features,), ()),
        ):
            examples[name] = torch.zeros((*before, rank, *after))
            defaults[name] = torch.zeros((*before, 1, *after))
            axes[name] = {axis: f"{path}.{word}"}
    return Factors(examples, axes, defaults)


def infer_graph(subject: Subject) -> Traced:
    """Trace inputs (batch, time) int64 or (batch, *input_shape) float32 to the logits."""
    factors = factor_inputs(subject)
    inputs = example(subject, BATCH, TIME)
    free = {0: "batch", 1: "time"} if subject.is_text else {0: "batch"}
    with with_factors(subject.model, subject.layers) as wrappers, plain_forms(subject.model):

        @torch.no_grad()
        def function(inputs: Tensor, *values: Tensor) -> list[Tensor]:
            set_factors(wrappers, [by_path(subject, values)])
            return [_logits(subject, inputs)]

        return capture(
            function,
            subject.model,
            subject.names,
            {"inputs": inputs, **factors.examples},
            {"inputs": free, **factors.axes},
            ["logits"],
            factors.defaults,
        )


def train_graph(subject: Subject, rows: int, positions: int | None = None) -> Traced:
    """Trace `rows` inputs and targets to the mean loss and the factors' gradients.

    positions: tokens of a row; None for inputs of a fixed shape. Targets are -100 where they do
    not count; with none that counts, loss and gradients are 0.
    """
    model, factors = subject.model, factor_inputs(subject)
    frozen = factor_inputs(subject, frozen=True)
    inputs = example(subject, rows, positions or 0)
    shape = inputs.shape if subject.task == "next-token" else inputs.shape[:1]
    targets = torch.zeros(shape, dtype=torch.int64)
    if subject.task == "next-token":
        hidden_and_head(model, inputs, {})  # tries once whether the head comes off, with numbers
    with with_factors(model, subject.layers) as wrappers, plain_forms(model):

        def function(inputs: Tensor, targets: Tensor, *values: Tensor) -> list[Tensor]:
            count = len(factors.examples)
            trained = [value.detach().requires_grad_() for value in values[:count]]
            groups = [by_path(subject, trained), by_path(subject, values[count:])]
            set_factors(wrappers, groups)
            with torch.enable_grad():
                loss = _loss(subject, inputs, targets)
            found = torch.autograd.grad(loss, trained, allow_unused=True)
            _require_gradients(subject, found, wrappers)
            return [loss.detach(), *(g for g in found if g is not None)]

        return capture(
            function,
            model,
            subject.names,
            {"inputs": inputs, "targets": targets, **factors.examples, **frozen.examples},
            {**factors.axes, **frozen.axes},
            ["loss", *(f"{name.removesuffix('.weight')}.grad" for name in factors.examples)],
            {**factors.defaults, **frozen.defaults},
        )


def example(subject: Subject, rows: int, positions: int) -> Tensor:
    """Return inputs such as the graphs of a subject take, of ones or zeros."""
    if subject.is_text:
        return torch.ones((rows, positions), dtype=torch.int64)
    return torch.zeros((rows, *subject.input_shape), dtype=subject.input_dtype)


def by_path(subject: Subject, values: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    pairs = zip(values[::2], values[1::2], strict=True)
    return dict(zip(subject.layers, pairs, strict=True))


def _logits(subject: Subject, inputs: Tensor) -> Tensor:
    # A language model is padded on the right, where it does not look: no mask.
    return logits_of(subject.model, inputs, masked=subject.task == "classification")


def _loss(subject: Subject, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean nats over the targets that are not -100, 0 without any."""
    counted = targets.reshape(-1) != NOT_COUNTED
    wanted = torch.where(counted, targets.reshape(-1), 0)
    shares = counted / counted.sum().clamp(min=1)
    split = hidden_and_head(subject.model, inputs, {}) if subject.task == "next-token" else None
    loss: Tensor
    if split is not None and is_bare_linear(split[1]):
        hidden, head = split
        loss = _head_loss(hidden.flatten(0, -2), head.weight, head.bias, wanted, shares)
        return loss
    logits = _logits(subject, inputs)
    loss = _logits_loss(logits.reshape(-1, logits.shape[-1]), wanted, shares)
    return loss


def _require_gradients(
    subject: Subject, found: Sequence[Tensor | None], wrappers: Mapping[str, FactorLayer]
) -> None:
    for path, gradient in zip(wrappers, found[::2], strict=True):
        if gradient is None:
            raise UnsupportedError(
                f"export, layer {path!r}: the loss does not depend on its adapter; does "
                f"{type(subject.model).__name__} read the layer's weights without calling it? "
                "Leave it out of target_modules"
            )


class _HeadLoss(torch.autograd.Function):
    """Nats under a frozen linear head, weighted and added up.

    With z the logits, p = softmax(z) and y the targets, the gradient of the states is
    ``(p W - W[y]) * share``: W's rows take the place of a one-hot matrix as large as the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, shares: Tensor
    ) -> Tensor:
        likely = torch.log_softmax(nn.functional.linear(states, weight, bias), -1)
        ctx.save_for_backward(likely, weight, y, shares)
        return -(likely.gather(1, y[:, None])[:, 0] * shares).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        likely, weight, y, shares = ctx.saved_tensors
        by_states = likely.exp() @ weight - weight[y]
        return by_states * (shares * gradients[0])[:, None], None, None, None, None


class _LogitsLoss(torch.autograd.Function):
    """Nats of logits (n, classes), weighted and added up."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor, shares: Tensor) -> Tensor:
        likely = torch.log_softmax(logits, -1)
        ctx.save_for_backward(likely, y, shares)
        return -(likely.gather(1, y[:, None])[:, 0] * shares).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        likely, y, shares = ctx.saved_tensors
        p = likely.exp()
        is_target = torch.arange(p.shape[-1], device=p.device) == y[:, None]
        by_logits = torch.where(is_target, p - 1, p) * (shares * gradients[0])[:, None]
        return by_logits, None, None


_head_loss: Any = _HeadLoss.apply
_logits_loss: Any = _LogitsLoss.apply
