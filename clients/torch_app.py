"""The trainer in torch. One base, its LoRA and the data are opened once in a process and shared.

In a simulation every virtual client of a process uses the same model: its factors are loaded from
the message before each training, and nothing else of it changes. The number of torch's threads is
left to the process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedlora.adapter import Adapter, Array
from fedlora.aggregation import Broadcast
from fedlora.bases import list_bases
from fedlora.data import draw_batches, list_data
from fedlora.federation.client import require_base
from fedlora.federation.owner import (
    owners_checkpointing,
    owners_client,
    owners_rank,
    owners_setup,
)
from fedlora.federation.records import ClientSetup
from fedlora.nn import beside, load_adapter_into, train_local
from fedlora.randomness import rng
from fedlora.training import LocalRule, TrainConfig, TrainResult
from fedlora.world import World, thread_world

_TASKS = ("classification", "next-token")


@dataclass(frozen=True, slots=True)
class TorchTrainer:
    """One client of the data; see `fedlora.federation.Trainer`."""

    world: World
    client_id: str
    rank: int | None = None

    @property
    def num_examples(self) -> int:
        """Training examples that this client has."""
        return len(self.world.data.client(self.client_id).train)

    @property
    def initial(self) -> Adapter:
        """A₀ and zero B."""
        return self.world.initial

    def train(
        self,
        broadcast: Broadcast,
        config: TrainConfig,
        rule: LocalRule,
        round: int | str,
        seed: int,
        correction: Array | None = None,
    ) -> TrainResult:
        """Load the broadcast factors, and train on this client's keyed batches."""
        require_base(broadcast, self.world.initial.base)
        examples = self.world.data.client(self.client_id).train
        load_adapter_into(self.world.model, broadcast.trainable)
        with beside(self.world.model, broadcast.frozen):
            return train_local(
                self.world.model,
                draw_batches(examples, config, seed, self.client_id, round),
                config,
                task=self.world.task,
                rule=rule,
                correction=correction,
                num_examples=len(examples),
                seed=int(rng(seed, "dropout", self.client_id, round).integers(2**31)),
            )

    def evaluate(
        self, adapter: Adapter, part: Literal["validation", "test"]
    ) -> Mapping[str, float] | None:
        """Return the measures of an adapter on a part of this client's data; None without any."""
        from fedlora.evaluation import evaluate  # not needed to train

        examples = getattr(self.world.data.client(self.client_id), part)
        if not len(examples):
            return None
        return evaluate(self.world.model, adapter, examples, self.world.task, part)


def open_trainer(setup: ClientSetup, node_config: Mapping[str, object]) -> TorchTrainer:
    """Return this node's trainer; see `fedlora.federation.owner` for what it may open."""
    known = {
        "base": [base.id for base in list_bases()],
        "data": [data.id for data in list_data()],
        "task": _TASKS,
    }
    setup = owners_setup(setup, node_config, os.environ, known)
    checkpointing = owners_checkpointing(node_config, os.environ)
    world = thread_world(setup.base, setup.data, setup.lora, setup.seed, checkpointing)
    client = owners_client(world.data.client_ids, node_config)
    return TorchTrainer(world, client, owners_rank(node_config))
