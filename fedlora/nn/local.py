"""Local training: what one client does in one round, in torch.

The base is frozen and stays in evaluation mode, so that its batch norms and dropout do nothing that
another client would notice; only LoRA's own dropout is active.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.adapter import Array
from fedlora.errors import ConfigError, ShapeMismatchError
from fedlora.nn.inject import extract_adapter, lora_modules
from fedlora.nn.layers import LoraModule
from fedlora.nn.precision import Precision, computing_in
from fedlora.nn.prefix import Measure, cached_prefix
from fedlora.nn.rows import Batch
from fedlora.nn.tasks import Task, get_task
from fedlora.training import (
    Factor,
    LocalRule,
    TrainConfig,
    TrainResult,
    not_finite,
    require_correction,
)

__all__ = ["evaluating", "seeded", "train_local"]


def train_local(
    model: nn.Module,
    batches: Iterable[Batch],
    config: TrainConfig,
    *,
    task: Task | str = "next-token",
    rule: LocalRule = LocalRule(),  # noqa: B008 - frozen
    correction: Array | None = None,
    num_examples: int | None = None,
    seed: int = 0,
    precision: Precision = "fp32",
) -> TrainResult:
    """Train the adapter that `model` carries, in place, one optimizer step a batch.

    The optimizer starts anew at every call (AdamW with betas 0.9, 0.999 and eps 1e-8, or SGD). Only
    the factors in `rule.trained` move. `correction` goes with `rule.correction`: a row ``(n,)``
    float32 over the trained factors (`fedlora.flat`), which is added to the gradient of every step
    after clipping, so that a client's mean gradient can be read off its factors. `num_examples` is
    what the client has (the sum over `batches` if None); `seed` drives dropout. How many batches
    there are is up to the caller: see `TrainConfig.steps_for`. precision: see
    `fedlora.nn.precision`.

    Raises `ConfigError` when the model has no LoRA, it is merged, there is nothing to train, or a
    correction is missing, not asked for or not for plain SGD; and `NonFiniteError` with the step
    when a loss is not finite.
    """
    task = get_task(task) if isinstance(task, str) else task
    layers = list(lora_modules(model).values())
    if any(layer.merged for layer in layers):
        raise ConfigError(
            "train_local: the adapter is merged into the base; call unmerge_lora first"
        )
    if rule.trained == {"magnitude"} and layers[0].magnitude is None:
        raise ConfigError("train_local: the rule trains magnitude only, and the adapter has none")
    require_correction("train_local", rule, config, correction)
    losses: list[float] = []
    seen = 0

    def measure(some: Sequence[Batch]) -> list[Tensor]:
        loss = task.loss(model, some[0])
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [loss.detach(), *(gradient for gradient in found if gradient is not None)]

    with (
        _training(model, layers, rule, seed) as parameters,
        computing_in(model, precision),
        _prefix(model, measure) as expect,
    ):
        optimizer = _optimizer(parameters, config)
        starts = [p.detach().clone() for p in parameters] if rule.proximal_weight else []
        shifts = [] if correction is None else _shifts(model, rule, correction)
        optimizer.zero_grad()  # of whoever used the model before
        for batch in batches:
            seen += len(batch["inputs"])
            expect([batch])
            loss = task.loss(model, batch)
            if not loss.requires_grad:
                raise ConfigError(
                    f"train_local: the loss of task {task.name!r} does not depend on the adapter; "
                    f"does {type(model).__name__} read its layers' weights without calling them?"
                )
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise not_finite("train_local", losses[-1], len(losses))
            loss.backward()  # type: ignore[no-untyped-call]
            if shifts:
                # What this pass did not call has gradient zero, and is corrected all the same.
                for parameter in parameters:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
            for parameter, start in zip(parameters, starts, strict=False):
                if parameter.grad is not None:
                    parameter.grad += rule.proximal_weight * (parameter.detach() - start)
            if config.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            for parameter, shift in zip(parameters, shifts, strict=False):
                assert parameter.grad is not None
                parameter.grad += shift
            optimizer.step()
            optimizer.zero_grad()
    return TrainResult(
        adapter=extract_adapter(model),
        num_examples=seen if num_examples is None else num_examples,
        loss=math.fsum(losses) / len(losses) if losses else math.nan,
        steps=len(losses),
    )


def _shifts(model: nn.Module, rule: LocalRule, row: Array) -> list[Tensor]:
    """Cut a correction's row, by path, into tensors in the order of the parameters to train."""
    layers = lora_modules(model)
    cut: dict[tuple[str, Factor], Tensor] = {}
    rest = torch.from_numpy(np.array(row, np.float32)).to(next(iter(layers.values())).lora_A.device)
    expected = sum(p.numel() for m in layers.values() for n, p in _factors(m) if n in rule.trained)
    if rest.shape != (expected,):
        raise ShapeMismatchError(
            f"train_local: expected a correction of ({expected},), found {tuple(rest.shape)}"
        )
    for path in sorted(layers):
        for name, parameter in _factors(layers[path]):
            if name in rule.trained:
                cut[path, name] = rest[: parameter.numel()].view_as(parameter)
                rest = rest[parameter.numel() :]
    # As `_training` yields the parameters.
    names = [(path, name) for path, module in layers.items() for name, _ in _factors(module)]
    return [cut[place] for place in names if place in cut]


def _prefix(
    model: nn.Module, measure: Measure
) -> AbstractContextManager[Callable[[Sequence[Batch]], None]]:
    # LoRA's dropout would make two measurements differ; and it is the generator's one user.
    if any(layer.dropout for layer in lora_modules(model).values()):
        return nullcontext(lambda batches: None)
    return cached_prefix(model, measure)


def _optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """One fused kernel a step: on CPU three times as fast as torch's loop over parameters."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
    return torch.optim.SGD(
        parameters,
        config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )


@contextmanager
def _training(
    model: nn.Module, layers: list[LoraModule], rule: LocalRule, seed: int
) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters to train; flags, modes and torch's generator are put back afterwards.

    It runs once a client, which may take no more than a few short steps: so it touches only what
    is not as it should be already.
    """
    factors = [factor for layer in layers for factor in _factors(layer)]
    fixed = [parameter for name, parameter in factors if name not in rule.trained]
    dropping = [layer for layer in layers if layer.dropout]
    with seeded(layers[0].lora_A.device, seed), evaluating(model):
        try:
            for layer in dropping:
                layer.training = True
            for parameter in fixed:
                parameter.requires_grad_(False)
            yield [parameter for name, parameter in factors if name in rule.trained]
        finally:
            for parameter in fixed:
                parameter.requires_grad_(True)
            for layer in dropping:
                layer.training = False


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode for this block."""
    trained: list[nn.Module] = [module for module in model.modules() if module.training]
    try:
        for module in trained:
            module.training = False
        yield
    finally:
        for module in trained:
            module.training = True


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's generator for this block only."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else None):
        if device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # a tenth of the time of torch.manual_seed
        else:
            torch.manual_seed(seed)
        yield


def _factors(layer: LoraModule) -> list[tuple[Factor, nn.Parameter]]:
    found: list[tuple[Factor, nn.Parameter]] = [("A", layer.lora_A), ("B", layer.lora_B)]
    if layer.magnitude is not None:
        found.append(("magnitude", layer.magnitude))
    return found
