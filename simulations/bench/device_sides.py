"""Both sides of `simulations.bench.device`, as functions to call; torch is imported for its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlora.adapter import Adapter
from fedlora.device.manifest import Manifest
from fedlora.device.runtime import open_bundle
from fedlora.device.session import Session
from fedlora.device.trainer import Trainer
from fedlora.targets import initial_adapter
from fedlora.training import TrainConfig
from simulations.bench.device_cases import BASES, DeviceBase, random_adapter

__all__ = [
    "MERGED_SEED",
    "Step",
    "TorchSide",
    "adapter_for",
    "device_session",
    "device_step",
    "start_for",
    "train_losses",
]  # fmt: skip

Batch = Mapping[str, npt.NDArray[Any]]
Step = Callable[[Iterable[Batch]], list[float]]  # trains; returns the losses of its steps
MERGED_SEED = 1
RATE = 1e-3


class TorchSide:
    """The base in torch with LoRA on the layers of a bundle; eager, float32."""

    def __init__(self, base: DeviceBase, manifest: Manifest, threads: int) -> None:
        import torch

        from fedlora.nn import inject_lora, load_base

        torch.set_num_threads(threads)
        loaded = load_base(base.id, num_classes=base.classes or None)
        self.base, self.model, self.tokenizer = base, loaded.model, loaded.tokenizer
        inject_lora(self.model, base.lora, base=manifest.base)

    def load(self, adapter: Adapter) -> None:
        from fedlora.nn import load_adapter_into

        load_adapter_into(self.model, adapter)

    def step_from(self, start: Adapter) -> Step:
        """Return what trains `start` on batches with `train_local`."""
        from fedlora.nn import get_task, train_local

        task = get_task(self.base.task)

        def train(batches: Iterable[Batch]) -> list[float]:
            losses: list[float] = []

            def noted(model: Any, batch: Batch) -> Any:
                loss = task.loss(model, dict(batch))
                losses.append(float(loss.detach()))
                return loss

            self.load(start)
            given = [dict(batch) for batch in batches]
            train_local(self.model, given, _config(given), task=replace(task, loss=noted))
            return losses

        return train

    def logits(self, inputs: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        import torch

        from fedlora.nn.outputs import logits_of

        masked = self.base.task == "classification"
        with torch.inference_mode():
            found = logits_of(self.model, torch.from_numpy(inputs), masked=masked)
        return np.asarray(found)


def device_step(folder: Path, start: Adapter, threads: int, *, low_memory: bool = False) -> Step:
    """Return what trains `start` on batches with a `Trainer`."""
    trainer = Trainer(folder, threads=threads, low_memory=low_memory)
    return lambda batches: train_losses(trainer, start, list(batches))


def train_losses(trainer: Trainer, start: Adapter, batches: list[Batch]) -> list[float]:
    losses: list[float] = []
    trainer.fit(batches, _config(batches), init=start, progress=lambda _, loss: losses.append(loss))
    return losses


def device_session(folder: Path, threads: int, *, low_memory: bool = False) -> Session:
    return Session(open_bundle(folder, threads=threads, low_memory=low_memory))


def start_for(manifest: Manifest) -> Adapter:
    """Return the adapter that training starts from."""
    return initial_adapter(manifest.layers, manifest.lora, 0, manifest.base)


def adapter_for(base_name: str, manifest: Manifest, seed: int = MERGED_SEED) -> Adapter:
    """Return the adapter that the merged bundle has in its weights, or another."""
    return random_adapter(manifest.layers, BASES[base_name].lora, seed, manifest.base)


def _config(batches: list[Any]) -> TrainConfig:
    return TrainConfig(local_steps=len(batches), learning_rate=RATE)
