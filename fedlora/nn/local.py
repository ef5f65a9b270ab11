"""Local training: what one client does in one round, in torch.

The base is frozen and stays in evaluation mode, so that its batch norms and dropout do nothing that
another client would notice; only LoRA's own dropout is active.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fedlora.errors import ConfigError, NonFiniteError
from fedlora.nn.inject import extract_adapter, lora_modules
from fedlora.nn.layers import LoraModule
from fedlora.nn.tasks import Batch, Task, get_task
from fedlora.training import Factor, LocalRule, TrainConfig, TrainResult

__all__ = ["train_local"]


def train_local(
    model: nn.Module,
    batches: Iterable[Batch],
    config: TrainConfig,
    *,
    task: Task | str = "next-token",
    rule: LocalRule = LocalRule(),  # noqa: B008 - frozen
    num_examples: int | None = None,
    seed: int = 0,
) -> TrainResult:
    """Train the adapter that `model` carries, in place, one optimizer step a batch.

    The optimizer starts anew at every call (AdamW with betas 0.9, 0.999 and eps 1e-8, or SGD). Only
    the factors in `rule.trained` move. `num_examples` is what the client has (the sum over
    `batches` if None); `seed` drives dropout. How many batches there are is up to the caller: see
    `TrainConfig.steps_for`.

    Raises `ConfigError` when the model has no LoRA or it is merged, and `NonFiniteError` with the
    step when a loss is not finite.
    """
    task = get_task(task) if isinstance(task, str) else task
    modules = list(lora_modules(model).values())
    if any(module.merged for module in modules):
        raise ConfigError(
            "train_local: the adapter is merged into the base; call unmerge_lora first"
        )
    losses: list[float] = []
    seen = 0
    with _training(model, modules, rule, seed) as parameters:
        optimizer = _optimizer(parameters, config)
        for batch in batches:
            seen += len(batch["inputs"])
            loss = task.loss(model, batch)
            losses.append(_finite(float(loss.detach()), len(losses) + 1))
            loss.backward()  # type: ignore[no-untyped-call]
            if config.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return TrainResult(
        adapter=extract_adapter(model),
        num_examples=seen if num_examples is None else num_examples,
        loss=math.fsum(losses) / len(losses) if losses else math.nan,
        steps=len(losses),
    )


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
    model: nn.Module, modules: list[LoraModule], rule: LocalRule, seed: int
) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters to train; afterwards modes, flags and torch's generator are as before."""
    modes = [(module, module.training) for module in model.modules()]
    factors = [
        (parameter, name in rule.trained)
        for module in modules
        for name, parameter in _factors(module)
    ]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model.eval()
            for module in modules:
                module.training = True
            for parameter, trained in factors:
                parameter.requires_grad_(trained)
            yield [parameter for parameter, trained in factors if trained]
        finally:
            for parameter, _ in factors:
                parameter.requires_grad_(True)
                parameter.grad = None
            for module, mode in modes:
                module.training = mode


def _factors(module: LoraModule) -> list[tuple[Factor, nn.Parameter]]:
    found: list[tuple[Factor, nn.Parameter]] = [("A", module.lora_A), ("B", module.lora_B)]
    if module.magnitude is not None:
        found.append(("magnitude", module.magnitude))
    return found


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"train_local, step {step}: expected a finite loss, found {loss}; lower learning_rate, "
            "set max_grad_norm, or look for NaN in the client's data"
        )
    return loss
