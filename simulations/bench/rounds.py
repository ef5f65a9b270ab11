"""Rounds of fedlora's engines: through a grid with messages, and the batched engine alone."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from fedlora.data import draw_batches
from fedlora.experiment import ExperimentConfig
from fedlora.federation import RoundRecord
from fedlora.nn.cohort import Job, train_cohort
from fedlora.simulation.rounds import run_rounds
from fedlora.world import World, shared_world
from simulations.bench.cases import Case
from simulations.bench.flat import Flat, flat_of
from simulations.bench.spent import Spent

__all__ = ["engine_round", "grid_rounds", "opened_world"]

AT_A_TIME = 1024  # jobs given to the engine in one call


def grid_rounds(config: ExperimentConfig, clients: int) -> list[Spent]:
    """Run all rounds of an experiment with ServerApp, Strategy and messages; return what each took.

    A round ends when its checkpoint is on the disk; the first also meets the clients. Raises
    `RuntimeError` when a client's update did not count.
    """
    ends = [(time.perf_counter(), time.process_time())]

    def note(record: RoundRecord) -> None:
        if record.status != "updated" or record.dropped:
            raise RuntimeError(f"round {record.round} {record.status}: {record.dropped[:1]}")
        ends.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory(prefix="flb") as folder:
        run_rounds(config, Path(folder), clients, on_round=note)
    return [Spent(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(ends)]


def engine_round(case: Case, world: World, clients: Sequence[str]) -> Flat:
    """Train some clients of `world` in the batched engine; return the mean of their factors.

    Jobs are handed over `AT_A_TIME`, so that results do not pile up. Raises a client's error.
    """
    config = case.experiment("sequential", 1)
    train, rule = config.federation.train, config.federation.build_method().local
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
        for trained in train_cohort(world.model, jobs, world.task, precision=case.precision):
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
