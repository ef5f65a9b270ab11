"""What each person gets: base, own, global and personal adapters on one client's data.

base      no adapter
own       trained alone from zero, for as many steps as the client took in all
global    what the federation made
personal  the global adapter, trained on by the client; whole, and served alone
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from fedlora.adapter import Adapter
from fedlora.data import ClientData, draw_batches
from fedlora.evaluation import evaluate
from fedlora.experiment import ExperimentConfig
from fedlora.nn import Task, load_adapter_into, train_local
from fedlora.training import TrainConfig

__all__ = ["Person", "compare_adapters", "train_adapter"]


@dataclass(frozen=True, slots=True)
class Person:
    """One client's result: `scores` has each adapter's measures on held-out examples."""

    client_id: str
    scores: Mapping[str, Mapping[str, float]]
    own: Adapter
    personal: Adapter


def compare_adapters(
    model: nn.Module,
    data: ClientData,
    task: Task,
    config: ExperimentConfig,
    *,
    initial: Adapter,
    shared: Adapter,
    federated_steps: int,
) -> Person:
    """Train the own and the personal adapter of one client, and evaluate all four.

    model: with `initial`'s layers injected. initial: A₀ and zero B. shared: the global adapter.
    federated_steps: optimizer steps that the client took in the rounds; own takes them too.
    """
    train = _personal_training(config)
    steps = config.personalization.steps
    own = train_adapter(
        model, data, task, initial, replace(train, local_steps=federated_steps + steps),
        seed=config.seed, phase="own",
    )  # fmt: skip
    personal = train_adapter(model, data, task, shared, train, seed=config.seed, phase="personal")
    adapters = {"base": initial, "own": own, "global": shared, "personal": personal}
    scores = {
        name: evaluate(model, adapter, data.test, task, f"client {data.client_id!r}, {name}")
        for name, adapter in adapters.items()
    }
    return Person(data.client_id, scores, own, personal)


def train_adapter(
    model: nn.Module,
    data: ClientData,
    task: Task,
    start: Adapter,
    config: TrainConfig,
    *,
    seed: int,
    phase: str,
) -> Adapter:
    """Train from `start` on the client's own examples and return the whole adapter.

    Batches are keyed by (seed, client, phase). A client without training examples keeps `start`.
    """
    load_adapter_into(model, start)
    batches = draw_batches(data.train, config, seed, data.client_id, phase)
    return train_local(model, batches, config, task=task, seed=seed).adapter


def _personal_training(config: ExperimentConfig) -> TrainConfig:
    own, federated = config.personalization, config.federation.train
    return replace(
        federated,
        local_steps=own.steps,
        local_epochs=None,
        learning_rate=(federated.learning_rate if own.learning_rate is None else own.learning_rate),
        batch_size=federated.batch_size if own.batch_size is None else own.batch_size,
    )
