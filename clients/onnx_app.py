"""The trainer in ONNX Runtime, for devices without torch: a bundle instead of a base.

It is interchangeable with `clients.torch_app`: the same batches, steps and errors. The bundle and
the data are opened once in a process and shared; a training keeps nothing in them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from fedlora.adapter import Adapter, Array
from fedlora.aggregation import Broadcast
from fedlora.data import FederatedData, draw_batches, list_data
from fedlora.device.manifest import TOKENIZER, Manifest
from fedlora.device.trainer import Trainer
from fedlora.errors import ConfigError, UnsupportedError
from fedlora.experiment import DataConfig, open_data
from fedlora.federation.client import require_base
from fedlora.federation.owner import (
    owners_bundle,
    owners_client,
    owners_low_memory,
    owners_rank,
    owners_setup,
    owners_threads,
)
from fedlora.federation.records import ClientSetup
from fedlora.targets import initial_adapter
from fedlora.training import LocalRule, TrainConfig, TrainResult


@dataclass(frozen=True, slots=True)
class OnnxTrainer:
    """One client of the data; see `fedlora.federation.Trainer`."""

    trainer: Trainer
    data: FederatedData
    setup: ClientSetup
    client_id: str
    rank: int | None = None

    @property
    def num_examples(self) -> int:
        """Training examples that this client has."""
        return len(self.data.client(self.client_id).train)

    @property
    def initial(self) -> Adapter:
        """A₀ and zero B, on the layers of the experiment."""
        about = self.trainer.manifest
        return initial_adapter(about.layers, self.setup.lora, self.setup.seed, about.base)

    def train(
        self,
        broadcast: Broadcast,
        config: TrainConfig,
        rule: LocalRule,
        round: int | str,
        seed: int,
        correction: Array | None = None,
    ) -> TrainResult:
        """Train the broadcast factors on this client's keyed batches."""
        require_base(broadcast, self.trainer.manifest.base)
        dropout = broadcast.trainable.config.lora_dropout
        if dropout:
            raise UnsupportedError(
                f"lora_dropout: expected 0 for a client that trains in ONNX Runtime, found "
                f"{dropout:g}; its graphs have no dropout, and it would train by another rule than "
                "the others"
            )
        examples = self.data.client(self.client_id).train
        return self.trainer.fit(
            draw_batches(examples, config, seed, self.client_id, round),
            config,
            init=broadcast.trainable,
            frozen=broadcast.frozen,
            rule=rule,
            correction=correction,
            num_examples=len(examples),
        )

    def evaluate(
        self, adapter: Adapter, part: Literal["validation", "test"]
    ) -> Mapping[str, float] | None:
        """Return the measures of an adapter on a part of this client's data; None without any."""
        from fedlora.device.scoring import evaluate  # not needed to train
        from fedlora.device.session import Session

        examples = getattr(self.data.client(self.client_id), part)
        if not len(examples):
            return None
        return evaluate(Session(self.trainer.bundle, adapter=adapter), examples, part)


def open_trainer(setup: ClientSetup, node_config: Mapping[str, object]) -> OnnxTrainer:
    """Return this node's trainer; see `fedlora.federation.owner` for what it may open.

    The bundle is the node config's ``bundle`` or ``FEDLORA_BUNDLE``; what the server calls its base
    opens nothing here: the fingerprint of what it sends has to be the bundle's.
    """
    known = {
        "base": [setup.base.id],
        "data": [data.id for data in list_data()],
        "task": ["classification", "next-token"],
    }
    setup = owners_setup(setup, node_config, os.environ, known)
    trainer = _open_bundle(
        owners_bundle(node_config, os.environ).absolute(),
        owners_threads(node_config),
        owners_low_memory(node_config),
    )
    data = _open_data(setup.data, trainer.bundle.folder, setup.seed)
    _require_task(trainer.manifest, setup.data, data)
    client = owners_client(data.client_ids, node_config)
    return OnnxTrainer(trainer, data, setup, client, owners_rank(node_config))


@lru_cache(maxsize=1)
def _open_bundle(folder: Path, threads: int | None, low_memory: bool) -> Trainer:
    return Trainer(folder, threads=threads, low_memory=low_memory)


@lru_cache(maxsize=1)
def _open_data(config: DataConfig, bundle: Path, seed: int) -> FederatedData:
    tokenizer = bundle / TOKENIZER
    return open_data(config, tokenizer if tokenizer.is_file() else None, seed)


def _require_task(manifest: Manifest, config: DataConfig, data: FederatedData) -> None:
    if manifest.task != config.task:
        raise ConfigError(
            f"task: expected {manifest.task!r}, which this device's bundle is for, found "
            f"{config.task!r}"
        )
    classes = len(data.labels or ())
    if manifest.task == "classification" and classes and classes != manifest.outputs:
        raise ConfigError(
            f"this device's bundle tells {manifest.outputs} classes apart, and {config.id!r} has "
            f"{classes}; install the bundle of the server's base"
        )
