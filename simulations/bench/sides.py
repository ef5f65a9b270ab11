"""The sides of a comparison that run in this process; each call is one round of the same work.

    peft        PEFT, one client after another, on one torch thread
    sequential  fedlora's plain engine through ServerApp, Strategy and messages, a thread a core
    cohort      fedlora's batched engine through ServerApp, Strategy and messages, the same
    engine      the batched engine alone, on one thread: jobs in, the mean of their factors out

Every side draws the clients' batches within its time. A round of a grid is the second one of a run,
from the end of the first to the end of the second, its checkpoint on the disk included.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fedlora.errors import ConfigError
from fedlora.simulation.rounds import run_rounds
from fedlora.simulation.threads import worker_count
from simulations.bench.cases import Case
from simulations.bench.flat import Flat, flat_of
from simulations.bench.peft_client import average, peft_client
from simulations.bench.population import synthetic
from simulations.bench.rounds import engine_round, grid_rounds, opened_world
from simulations.bench.spent import Spent, spent

__all__ = ["Side", "local_sides"]


@dataclass(slots=True)
class Side:
    """One way to do the work, and what it took."""

    name: str
    threads: int
    round: Callable[[], Spent]
    first: Callable[[], Flat]  # the mean after round 1, also a warm-up
    times: list[Spent] = field(default_factory=list)


def local_sides(case: Case) -> list[Side]:
    """Return the sides that this version of fedlora has; the baselines come first."""
    found = [_peft_side(case)]
    for kind in ("sequential", "cohort"):
        try:
            case.experiment(kind, 1)
        except ConfigError:  # this version has no such engine
            continue
        found.append(_grid_side(case, kind))
    return [*found, _engine_side(case)]


def _peft_side(case: Case) -> Side:
    client, initial = peft_client(case)
    data, start, config = synthetic(), flat_of(initial), case.experiment("sequential", 1)
    run = partial(average, client, start, data, config, 1)
    return Side("peft", 1, partial(_timed, run), run)


def _grid_side(case: Case, kind: str) -> Side:
    def first() -> Flat:
        with tempfile.TemporaryDirectory(prefix="flb") as folder:
            checkpoint = run_rounds(case.experiment(kind, 1), Path(folder), case.clients)
            return flat_of(checkpoint.state.adapter)

    config = case.experiment(kind, 2)
    return Side(kind, worker_count(config), lambda: grid_rounds(config, case.clients)[1], first)


def _engine_side(case: Case) -> Side:
    def run() -> Flat:
        world = opened_world(case)
        return engine_round(case, world, world.data.client_ids)

    return Side("engine", 1, partial(_timed, run), run)


def _timed(run: Callable[[], object]) -> Spent:
    with spent() as time_spent:
        run()
    return time_spent
