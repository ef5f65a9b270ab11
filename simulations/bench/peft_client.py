"""A client in real PEFT, as fast as it can fairly be: what the other engines are compared with.

The base is loaded once and never copied. All factors lie in one flat buffer, so that a client
starts with one copy and its result is another. One fused AdamW serves every client; its moments are
views of one buffer, zeroed between clients. PEFT's wrapper around the whole model is left out
(`get_base_model`), its layers are what it made. Where rows have no padding, the loss is computed
straight from the logits; else by fedlora's own loss, which leaves the padding out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.adapter import Adapter
from fedlora.data import FederatedData, draw_batches
from fedlora.experiment import ExperimentConfig
from fedlora.nn import Batch, Task, get_task, load_base
from fedlora.targets import initial_adapter
from fedlora.training import TrainConfig
from simulations.bench.cases import ALPHA, RANK, Case
from simulations.bench.flat import Flat

__all__ = ["PeftClient", "average", "peft_client"]


class PeftClient:
    """A PEFT model that one virtual client after another trains."""

    def __init__(
        self, base: nn.Module, start: Adapter, task: Task, train: TrainConfig, padded: bool
    ) -> None:
        self._model = _with_peft(base, start)
        self._task, self._padded = task, padded
        self._parameters = _factors(self._model, start)
        self._flat = _in_one_buffer(self._parameters)
        self._optimizer = torch.optim.AdamW(
            self._parameters, train.learning_rate, weight_decay=train.weight_decay, fused=True
        )
        self._moments, self._counts = self._moments_in_one_buffer()

    def train(self, start: Flat, batches: Iterable[Batch]) -> Flat:
        """Return the factors (sorted paths, A before B, one after another) after the batches.

        The array is the client's own buffer, which the next call overwrites.
        """
        self._flat.copy_(torch.from_numpy(start))
        self._moments.zero_()
        torch._foreach_zero_(self._counts)
        for batch in batches:
            self._loss(batch).backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._optimizer.zero_grad()
        trained: Flat = self._flat.numpy()
        return trained

    def _loss(self, batch: Batch) -> Tensor:
        if self._padded:
            return self._task.loss(self._model, batch)
        out = self._model(torch.from_numpy(batch["inputs"]))
        logits = out if isinstance(out, Tensor) else out.logits
        return F.cross_entropy(logits.flatten(0, -2), torch.from_numpy(batch["targets"]).flatten())

    def _moments_in_one_buffer(self) -> tuple[Tensor, list[Tensor]]:
        """Let the optimizer make its state, then give it views instead; return (buffer, counts)."""
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad()
        states = [self._optimizer.state[parameter] for parameter in self._parameters]
        buffer = torch.zeros(2 * len(self._flat))
        start = 0
        for name in ("exp_avg", "exp_avg_sq"):
            for state in states:
                size = state[name].numel()
                state[name] = buffer[start : start + size].view_as(state[name])
                start += size
        return buffer, [state["step"] for state in states]


def peft_client(case: Case) -> tuple[PeftClient, Adapter]:
    """Return a client for `case` and the adapter that everyone starts from."""
    config = case.experiment("sequential", 1)
    base = load_base(config.base.id)
    start = initial_adapter(base.card.layers, config.lora, config.seed, base.card.fingerprint)
    task = get_task(config.data.task)
    return PeftClient(base.model, start, task, config.federation.train, case.mixed), start


def average(
    client: PeftClient, start: Flat, data: FederatedData, config: ExperimentConfig, round: int
) -> Flat:
    """Return the mean of all clients' factors after a round, one client after another."""
    train, seed = config.federation.train, config.seed
    total = np.zeros(len(start))
    for client_id in data.client_ids:
        batches = draw_batches(data.client(client_id).train, train, seed, client_id, round)
        total += client.train(start, batches)  # all have as many examples
    return (total / len(data)).astype(np.float32)


def _with_peft(base: nn.Module, start: Adapter) -> nn.Module:
    config = peft.LoraConfig(
        r=RANK, lora_alpha=int(ALPHA), lora_dropout=0.0, target_modules=list(start.layers)
    )
    with warnings.catch_warnings():  # it looks for tied weights and new names of transformers
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(base, config)
    model: nn.Module = wrapped.get_base_model()
    return model.eval()  # the base's own dropout is off on all sides, and LoRA has none


def _factors(model: nn.Module, start: Adapter) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    for path in start.layers:
        layer: Any = model.get_submodule(path)
        found += [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if {id(p) for p in found} != {id(p) for p in trained}:
        raise RuntimeError(f"PEFT trains {len(trained)} tensors, expected the {len(found)} of LoRA")
    return found


def _in_one_buffer(parameters: list[nn.Parameter]) -> Tensor:
    """Make the parameters views of one flat tensor, and return it."""
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return flat
