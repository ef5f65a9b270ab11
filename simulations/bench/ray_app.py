"""Flower's Ray simulation with PEFT clients: a process that runs a round whenever it is told to.

    python -m simulations.bench.ray_app CASE CLIENTS TEMPORARY_FOLDER

A line on stdin starts a round; each answer is a line of JSON on stdout. At the end of stdin the
ServerApp returns, and Flower stops Ray.

It is as fast as it can fairly be: an actor with one torch thread a core, which keeps base, data and
optimizer (`peft_client`); one flat array a message; a plain mean on the server.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedlora.data import FederatedData, draw_batches
from fedlora.experiment import ExperimentConfig
from fedlora.simulation.threads import worker_count
from simulations.bench.cases import case_named
from simulations.bench.flat import Flat, flat_of
from simulations.bench.peft_client import PeftClient, peft_client
from simulations.bench.population import synthetic

MARK = "bench-round "  # before each answer: Ray and Flower write to stdout too
OBJECT_STORE = 200 * 2**20  # bytes; messages are far smaller

client_app, server_app = ClientApp(), ServerApp()


@functools.cache
def opened(name: str, clients: int) -> tuple[PeftClient, FederatedData, ExperimentConfig]:
    """Return what an actor needs for all of its clients, opened once in its process."""
    torch.set_num_threads(1)
    case = case_named(name, clients)
    return peft_client(case)[0], synthetic(), case.experiment("sequential", 1)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train one client on its keyed batches."""
    content: Any = message.content
    work = content["work"]
    client, data, config = opened(str(work["case"]), _number(context, "num-partitions"))
    client_id = data.client_ids[_number(context, "partition-id")]
    start = content["factors"]["flat"].numpy()
    examples = data.client(client_id).train
    batches = draw_batches(
        examples, config.federation.train, config.seed, client_id, int(work["round"])
    )
    trained = client.train(start, batches)
    answer = RecordDict(
        {
            "factors": ArrayRecord({"flat": Array(trained)}),
            "work": MetricRecord({"num-examples": len(examples)}),
        }
    )
    return Message(answer, reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a round for every line of stdin."""
    name, clients = sys.argv[1], int(sys.argv[2])
    nodes = _nodes(grid, clients)
    factors = flat_of(peft_client(case_named(name, clients))[1])
    for round, _ in enumerate(sys.stdin, 1):
        start = time.perf_counter()
        factors = _round(grid, nodes, factors, name, round)
        seconds = time.perf_counter() - start
        # Only the first: what the others are compared with, and up to megabytes.
        mean = factors.tolist() if round == 1 else None
        print(MARK + json.dumps({"round": round, "wall": seconds, "mean": mean}), flush=True)


def _round(grid: Grid, nodes: list[int], factors: Flat, name: str, round: int) -> Flat:
    arrays = ArrayRecord({"flat": Array(factors)})
    messages = [
        Message(
            RecordDict({"factors": arrays, "work": ConfigRecord({"case": name, "round": round})}),
            node,
            "train",
        )
        for node in nodes
    ]
    total, weights = np.zeros(len(factors)), 0.0
    for reply in grid.send_and_receive(messages):
        if reply.has_error():
            raise RuntimeError(f"a client failed: {reply.error.reason}")
        content: Any = reply.content
        weight = float(content["work"]["num-examples"])
        total += weight * content["factors"]["flat"].numpy()
        weights += weight
    return (total / weights).astype(np.float32)


def _number(context: Context, key: str) -> int:
    return int(str(context.node_config[key]))


def _nodes(grid: Grid, clients: int) -> list[int]:
    while len(nodes := list(grid.get_node_ids())) < clients:
        time.sleep(0.05)
    return nodes


def _simulate() -> None:
    from flwr.simulation import run_simulation

    # Under `python -m` this file is __main__, which no actor could import.
    from simulations.bench import ray_app

    config = case_named(sys.argv[1]).experiment("sequential", 1)
    run_simulation(
        server_app=ray_app.server_app,
        client_app=ray_app.client_app,
        num_supernodes=int(sys.argv[2]),
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0},
            "init_args": {
                "num_cpus": worker_count(config),
                "_temp_dir": sys.argv[3],
                "object_store_memory": OBJECT_STORE,
            },
        },
    )


if __name__ == "__main__":
    _simulate()
