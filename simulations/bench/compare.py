"""One case, all sides in turn in one process:  python -m simulations.bench.compare CASE …

The sides take turns within each repetition, each time in another order, so that what else the
machine does falls on all of them alike. The last line of stdout is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from itertools import islice
from typing import Any

import numpy as np
import torch

from fedlora.data import draw_batches
from fedlora.simulation.threads import worker_count
from simulations.bench.cases import Case, case_named
from simulations.bench.flat import Flat
from simulations.bench.ray_side import FIRST_SECONDS, ray_rounds
from simulations.bench.rounds import opened_world
from simulations.bench.sides import Side, local_sides
from simulations.bench.spent import Spent, machine_seconds, spent
from simulations.bench.work import Work, gemm_peak, work_of

COUNTED_CLIENTS = 4  # whose batches are counted, for all


def compare(case: Case, repeat: int, with_ray: bool) -> dict[str, Any]:
    """Measure all sides of `case`, `repeat` times in turn; return a table for JSON.

    The environment must hold the case's population (`Shape.environment`), and torch use one thread.
    Raises `RuntimeError` when a side fails.
    """
    peaks = [gemm_peak()]
    others, own = machine_seconds(), 0.0
    with ExitStack() as stack, spent() as whole:
        sides = local_sides(case)
        work = _work(case)
        means = {side.name: side.first() for side in sides}
        more: dict[str, Any] = {}
        if with_ray:
            rounds = stack.enter_context(ray_rounds(case))
            first, mean = rounds.round(FIRST_SECONDS)
            assert mean is not None
            means["flower"] = mean
            sides.insert(
                1,
                Side(
                    "flower",
                    worker_count(case.experiment("sequential", 1)),
                    lambda: rounds.round()[0],
                    lambda: mean,
                ),
            )
            more = {"first_round": first.wall, "idle_cores": rounds.idle_cores()}
            own += first.cpu
        for turn in range(repeat):
            for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
                side.times.append(side.round())
                _say(f"{case.name} {turn + 1}/{repeat} {side.name}: {_shown(side.times[-1])}")
            peaks.append(gemm_peak(0.2))
    own += whole.cpu + sum(t.cpu for side in sides if side.name == "flower" for t in side.times)
    return {
        "case": case.name,
        "clients": case.clients,
        "steps": case.steps,
        "client_steps": case.client_steps,
        "work": work.as_dict(),
        "peak_gflops_one_thread": max(peaks),
        "peak_spread": [min(peaks), max(peaks)],
        "other_cores": max(0.0, machine_seconds() - others - own) / whole.wall,
        "sides": {
            side.name: {
                "threads": side.threads,
                "wall": [t.wall for t in side.times],
                "cpu": [t.cpu for t in side.times],
            }
            for side in sides
        },
        "flower": more,
        "largest_difference_from_peft": _differences(means),
    }


def _work(case: Case) -> Work:
    """Count a round of all clients, from the batches of some."""
    config, world = case.experiment("sequential", 1), opened_world(case)
    total = Work()
    clients = world.data.client_ids[:COUNTED_CLIENTS]
    for client_id in clients:
        examples = world.data.client(client_id).train
        train = config.federation.train
        for batch in draw_batches(examples, train, config.seed, client_id, 1):
            part = work_of(world.model, world.task, batch, case.base.attention)
            total = Work(*(a + b for a, b in zip(_parts(total), _parts(part), strict=True)))
    return Work(*(part * case.clients // len(clients) for part in _parts(total)))


def _parts(work: Work) -> tuple[int, ...]:
    return (work.frozen_forward, work.frozen_backward, work.lora, work.attention)


def _differences(means: dict[str, Flat]) -> dict[str, float]:
    theirs = means["peft"]
    return {
        name: float(np.abs(mean - theirs).max()) for name, mean in islice(means.items(), 1, None)
    }


def _shown(time: Spent) -> str:
    return f"{time.wall:.3f} s wall, {time.cpu:.3f} s CPU"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--clients", type=int)
    parser.add_argument("--no-ray", action="store_true")
    arguments = parser.parse_args()
    case = case_named(arguments.case, arguments.clients)
    os.environ |= case.shape.environment()
    torch.set_num_threads(1)
    print(json.dumps(compare(case, arguments.repeat, not arguments.no_ray)))


if __name__ == "__main__":
    main()
