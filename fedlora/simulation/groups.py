"""What a group of virtual clients is asked to train, as a value that any worker can carry out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedlora.adapter import Adapter, Array
from fedlora.errors import FedloraError
from fedlora.experiment import EngineConfig
from fedlora.federation import ClientSetup
from fedlora.federation.records import TrainOrder
from fedlora.nn.beside import beside
from fedlora.nn.cohort import Job, Trained, client_job, train_alone, train_group
from fedlora.nn.inject import kept_activations
from fedlora.randomness import rng
from fedlora.world import World, thread_world

__all__ = ["GroupOrder", "Outcome", "job_of", "train_order", "world_of"]


@dataclass(frozen=True, slots=True, eq=False)
class GroupOrder:
    """One group's share of a round."""

    engine: EngineConfig
    setup: ClientSetup
    order: TrainOrder
    clients: tuple[str, ...]
    starts: tuple[Adapter, ...]  # one for everyone, or one each
    frozen: Adapter | None = None  # beside which all of them train
    corrections: tuple[Array, ...] = ()  # one each, where the rule has a correction
    alone: bool = False  # one client at a time, where the model cannot be batched


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """One client's training."""

    row: Array  # (n,) the trained factors one after another, by path, A before B
    loss: float
    steps: int
    num_examples: int
    error: FedloraError | None = None


def train_order(order: GroupOrder) -> list[Outcome]:
    """Train a group in this thread; one outcome a client, in the order of `order.clients`."""
    world = world_of(order.setup, order.engine)
    with beside(world.model, order.frozen):
        trained = _trained(world, order)
    return [Outcome(t.row, t.loss, t.steps, t.job.num_examples, t.error) for t in trained]


def _trained(world: World, order: GroupOrder) -> list[Trained]:
    starts = order.starts * (len(order.clients) if len(order.starts) == 1 else 1)
    jobs = [
        job_of(world, client, start, order.order)
        for client, start in zip(order.clients, starts, strict=True)
    ]
    if order.order.rule.correction is not None:
        pairs = zip(jobs, order.corrections, strict=True)
        jobs = [replace(job, correction=row) for job, row in pairs]
    precision = order.engine.precision
    if not order.alone:
        return train_group(world.model, jobs, world.task, precision=precision)
    seeds = [_dropout_seed(order.order, job.client_id) for job in jobs]
    jobs = [replace(job, seed=seed) for job, seed in zip(jobs, seeds, strict=True)]
    return [train_alone(world.model, job, world.task, precision=precision) for job in jobs]


def world_of(setup: ClientSetup, engine: EngineConfig) -> World:
    """Return this thread's world for a run."""
    world = thread_world(setup.base, setup.data, setup.lora, setup.seed, engine.checkpointing)
    kept_activations(world.model).enabled = engine.prefix_cache
    return world


def job_of(world: World, client: str, start: Adapter, order: TrainOrder) -> Job:
    """Return one client's training in a round."""
    return client_job(
        world.data.client(client).train,
        client,
        start,
        order.train,
        seed=order.seed,
        round=order.round,
        rule=order.rule,
    )


def _dropout_seed(order: TrainOrder, client: str) -> int:
    """The seed that the ClientApp's trainer uses; see `clients.torch_app`."""
    return int(rng(order.seed, "dropout", client, order.round).integers(2**31))
