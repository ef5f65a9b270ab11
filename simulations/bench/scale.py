"""Cost and memory of many virtual clients:  python -m simulations.bench.scale SIDE CLIENTS

The tiny base, LoRA on q and v, one step on one row of 32 tokens each. `engine` is the batched
engine alone on one thread; `cohort` and `sequential` are rounds with ServerApp, Strategy and
messages, of which the first also meets the clients. Each size runs in a process of its own, whose
peak of memory is compared with what it held after 64 clients: an upper bound of what more took.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from fedlora.experiment import ExperimentConfig
from simulations.bench.cases import Case, case_named
from simulations.bench.population import Shape
from simulations.bench.resident import peak_bytes
from simulations.bench.rounds import engine_round, grid_rounds, opened_world
from simulations.bench.spent import Spent, spent

__all__ = ["measure"]

WARM = 64  # clients


def measure(side: str, clients: int) -> dict[str, Any]:
    """Measure one size; the environment must hold its population, torch use one thread."""
    case = dataclasses.replace(case_named("tiny-b1-qv", clients), steps=1)
    _rounds(side, case, WARM, 1)
    before = psutil.Process().memory_info().rss
    times = _rounds(side, case, clients, 2)
    after = psutil.Process().memory_info().rss
    return {
        "side": side,
        "clients": clients,
        "wall": [time.wall for time in times],
        "cpu": [time.cpu for time in times],
        "rss_before": before,
        "rss_after": after,
        "rss_peak": max(peak_bytes(), after),
    }


def _rounds(side: str, case: Case, clients: int, rounds: int) -> list[Spent]:
    """Run rounds of the first `clients` clients; return what each took."""
    if side != "engine":
        config = _few(case.experiment(side, rounds), clients, case.clients)
        return grid_rounds(config, clients)
    world, times = opened_world(case), []
    for _ in range(rounds):
        with spent() as time_spent:
            engine_round(case, world, world.data.client_ids[:clients])
        times.append(time_spent)
    return times


def _few(config: ExperimentConfig, clients: int, all_clients: int) -> ExperimentConfig:
    if clients == all_clients:
        return config
    overrides = {"data.clients": clients, "federation.cohort": clients}
    return ExperimentConfig.from_table(config.to_table(), overrides)


def main() -> None:
    side, clients = sys.argv[1], int(sys.argv[2])
    os.environ |= Shape(max(clients, WARM), rows=1, test_rows=0).environment()
    torch.set_num_threads(1)
    print(json.dumps(measure(side, clients)))


if __name__ == "__main__":
    main()
