"""The batched engine without a grid and messages: jobs in, the mean of what they trained out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fedlora.aggregation import method
from fedlora.data import draw_batches
from fedlora.nn.cohort import Job, train_cohort
from fedlora.world import World, shared_world
from simulations.bench.cases import Case
from simulations.bench.flat import Flat, flat_of

__all__ = ["engine_round", "opened_world"]

AT_A_TIME = 1024  # jobs given to the engine in one call


def engine_round(case: Case, world: World, clients: Sequence[str]) -> Flat:
    """Train some clients of `world` in the batched engine; return the mean of their factors.

    Jobs are handed over `AT_A_TIME`, so that results do not pile up. Raises a client's error.
    """
    config = case.experiment("sequential", 1)
    train, rule = config.federation.train, method(config.federation.method).local
    total = np.zeros(len(flat_of(world.initial)))
    for some in _chunks(clients, AT_A_TIME):
        jobs = []
        for client_id in some:
            examples = world.data.client(client_id).train
            jobs.append(
                Job(
                    client_id,
                    world.initial,
                    draw_batches(examples, train, config.seed, client_id, 1),
                    case.steps,
                    train,
                    rule,
                    positions=case.rows * int(examples.lengths.max()),
                )
            )
        for trained in train_cohort(world.model, jobs, world.task):
            if trained.error is not None:
                raise trained.error
            total += trained.row  # all have as many examples
    return (total / len(clients)).astype(np.float32)


def opened_world(case: Case) -> World:
    """Return base, task and data of `case`, the ones that its grids in this process use too."""
    config = case.experiment("sequential", 1)
    return shared_world(config.base, config.data, config.lora, config.seed)


def _chunks(ids: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]
