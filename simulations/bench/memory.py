"""What a quantized base and gradient checkpointing save, and what they cost.

    python -m simulations.bench memory quantize --base tiny-chat
    python -m simulations.bench memory checkpointing --base smollm2-135m --rows 8 --length 128

Memory is that of a process of its own for each case: the bytes that the model holds, how much the
process has grown once it is open, and the peak of one training step over that (Linux only). Times
are CPU seconds of one step on one thread, all cases in turn in one process; the ratio is the
median over the turns. One JSON line a case on the standard output.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlora.adapter import LoraConfig
from fedlora.data import draw_batches
from fedlora.evaluation import evaluate
from fedlora.experiment import BaseConfig, DataConfig
from fedlora.nn import extract_adapter, load_adapter_into, train_local
from fedlora.nn.rows import Batch
from fedlora.training import TrainConfig
from fedlora.world import World, open_world

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "quantize": {"full": {}, "int8": {"quantize": "int8"}, "nf4": {"quantize": "nf4"}},
    "checkpointing": {"off": {}, "on": {"checkpointing": True}},
}
STEP = TrainConfig(local_steps=1, learning_rate=1e-3)
OWN = TrainConfig(local_steps=24, batch_size=8, learning_rate=1e-3)
MEBI = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=CASES)
    parser.add_argument("--base", default="tiny-chat")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--clients", type=int, default=0, help="train and evaluate so many")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        print(json.dumps(memory(options)))
        return
    rows = {name: measured_alone(name) for name in CASES[options.what]}
    worlds = {name: opened(options, name) for name in rows}
    for name, seconds in times(worlds, options).items():
        rows[name] |= seconds
    for name, found in differences(worlds, options).items():
        rows[name] |= found
    for name, found in rows.items():
        case = {"what": options.what, "base": options.base, "case": name}
        print(json.dumps(case | {"rows": options.rows, "length": options.length} | found))


def opened(options: argparse.Namespace, name: str) -> World:
    case = CASES[options.what][name]
    base = BaseConfig(options.base, quantize=case.get("quantize"))
    data = DataConfig("chitchat", "next-token", max(options.clients, 2), max_length=options.length)
    return open_world(base, data, LoraConfig(rank=8), 0, case.get("checkpointing", False))


def batch(options: argparse.Namespace) -> Batch:
    ids = np.random.default_rng(0).integers(1, 2000, (options.rows, options.length + 1))
    return {"inputs": ids[:, :-1].copy(), "targets": ids[:, 1:].copy()}


def measured_alone(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "simulations.bench.memory", *sys.argv[1:], "--memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def memory(options: argparse.Namespace) -> dict[str, Any]:
    world = opened(options, options.memory_of)  # warm: packages that are imported, caches
    train_local(world.model, [batch(options)], STEP)
    del world
    before = resident()
    world = opened(options, options.memory_of)
    open_ = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    train_local(world.model, [batch(options)], STEP)
    return {
        "held_mb": held(world.model) / MEBI,
        "process_mb": (open_ - before) / MEBI,
        "step_peak_mb": (status("VmHWM") - open_) / MEBI,
    }


def held(model: nn.Module) -> int:
    """Bytes of parameters and buffers; shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def resident() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return status("VmRSS")


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def times(worlds: dict[str, World], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    found: dict[str, list[float]] = {name: [] for name in worlds}
    given = batch(options)
    for turn in range(options.turns + 2):
        for name, world in worlds.items():
            start = time.process_time()
            train_local(world.model, [given], STEP)
            if turn >= 2:
                found[name].append(time.process_time() - start)
    first = next(iter(found.values()))
    return {
        name: {
            "step_cpu_ms": 1000 * statistics.median(seconds),
            "ratio": statistics.median(s / f for s, f in zip(seconds, first, strict=True)),
        }
        for name, seconds in found.items()
    }


def differences(worlds: dict[str, World], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """How far the outputs and the results are from those of the first case."""
    names = list(worlds)
    for world in worlds.values():
        load_adapter_into(world.model, world.initial)
    ids = torch.from_numpy(batch(options)["inputs"])
    with torch.no_grad():
        logits = {name: logits_of(worlds[name].model, ids) for name in names}
    full = logits[names[0]]
    found: dict[str, dict[str, Any]] = {
        name: {"logits_off": float((logits[name] - full).norm() / full.norm())} for name in names
    }
    for name in names if options.clients else ():
        found[name] |= {"clients": options.clients, **trained(worlds[name], worlds[names[0]])}
    return found


def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def trained(world: World, full: World) -> dict[str, float]:
    """Mean loss of each client's held-out messages before and after 24 steps of its own.

    `own_on_full`: the same adapters on the full base, beside whose weights they were not trained.
    """
    sums = {"base_loss": 0.0, "own_loss": 0.0, "own_on_full": 0.0}
    for client_id in world.data.client_ids:
        client = world.data.client(client_id)
        load_adapter_into(world.model, world.initial)
        train_local(world.model, draw_batches(client.train, OWN, 0, client_id, 1), OWN)
        own = extract_adapter(world.model)
        for key, where, adapter in (
            ("base_loss", world, world.initial),
            ("own_loss", world, own),
            ("own_on_full", full, own),
        ):
            scores = evaluate(where.model, adapter, client.test, where.task, client_id)
            sums[key] += scores["loss"] / len(world.data)
    return sums


if __name__ == "__main__":
    main()
