"""Cost and memory of many virtual clients:  python -m simulations.bench.scale SIDE CLIENTS

The tiny base, LoRA on q and v, one step on one row of 32 tokens each. `engine` is the batched
engine alone on one thread; `cohort` and `sequential` are rounds with ServerApp, Strategy and
messages, of which the first also meets the clients. Each size runs in a process of its own, whose
peak of memory is compared with what it held after 64 clients.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from fedlora.experiment import ExperimentConfig
from fedlora.federation import RoundRecord
from fedlora.simulation.rounds import run_rounds
from simulations.bench.cases import Case, case_named
from simulations.bench.engine import engine_round, opened_world
from simulations.bench.population import Shape
from simulations.bench.spent import spent

__all__ = ["measure"]

WARM = 64  # clients


def measure(side: str, clients: int) -> dict[str, Any]:
    """Measure one size; the environment must hold its population, torch use one thread."""
    case = dataclasses.replace(case_named("tiny-b1-qv", clients), steps=1)
    _round(side, case, WARM, 1)
    before = psutil.Process().memory_info().rss
    ends = _round(side, case, clients, 2)
    after = psutil.Process().memory_info().rss
    return {
        "side": side,
        "clients": clients,
        "wall": [wall for wall, _ in ends],
        "cpu": [cpu for _, cpu in ends],
        "rss_before": before,
        "rss_after": after,
        "rss_peak": max(_peak(), after),
    }


def _round(side: str, case: Case, clients: int, rounds: int) -> list[tuple[float, float]]:
    """Run rounds of the first `clients` clients; return (wall, CPU) seconds of each."""
    if side == "engine":
        return [_engine(case, clients) for _ in range(rounds)]
    config = _few(case.experiment(side, rounds), clients, case.clients)
    ends = [(time.perf_counter(), time.process_time())]

    def note(record: RoundRecord) -> None:
        if record.status != "updated" or record.dropped:
            raise RuntimeError(f"round {record.round} {record.status}: {record.dropped[:1]}")
        ends.append((time.perf_counter(), time.process_time()))
        print(f"{side} {clients}: round {record.round}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="flb") as folder:
        run_rounds(config, Path(folder), clients, on_round=note)
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(ends)]


def _engine(case: Case, clients: int) -> tuple[float, float]:
    world = opened_world(case)
    with spent() as time_spent:
        engine_round(case, world, world.data.client_ids[:clients])
    return time_spent.wall, time_spent.cpu


def _few(config: ExperimentConfig, clients: int, all_clients: int) -> ExperimentConfig:
    if clients == all_clients:
        return config
    overrides = {"data.clients": clients, "federation.cohort": clients}
    return ExperimentConfig.from_table(config.to_table(), overrides)


def _peak() -> int:
    """Return this process's largest resident memory so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    side, clients = sys.argv[1], int(sys.argv[2])
    os.environ |= Shape(max(clients, WARM), rows=1, test_rows=0).environment()
    torch.set_num_threads(1)
    print(json.dumps(measure(side, clients)))


if __name__ == "__main__":
    main()
