"""What one adapter for everyone could gain at most: trained on all clients' messages in one pool.

    python -m simulations.studies.pooled [--rank 8] [--targets all-linear] [--learning-rate 4e-3]
                                         [--share 1.0] [--threads 2]

No federation: random messages of the keyboard's 94 sampled people, 64 a step, AdamW with a cosine
schedule. After each quarter the gain over the base in nats a token is printed, on the people's
validation parts: the mean and the median over people, and the mean without the one who gains most.
A federation that has seen as many messages should not be expected to do better.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from fedlora.adapter import Adapter
from fedlora.data import Examples, collate
from fedlora.evaluation import Trial, evaluate_many
from fedlora.experiment import ExperimentConfig, find_experiment
from fedlora.federation.sampling import draw_held_out
from fedlora.nn import Batch, extract_adapter, load_adapter_into
from fedlora.nn.inject import lora_modules
from fedlora.randomness import rng
from fedlora.world import World, open_world

__all__ = ["main"]

STEP, PASS = 64, 16  # messages a step, and at once
WARM_UP = 20  # steps


def main(arguments: list[str] | None = None) -> int:
    """Train, and print a line a quarter."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.studies.pooled", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--experiment", default="keyboard")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument(
        "--targets", default="all-linear", help="'.*': the head and the embedding too"
    )
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--share", type=float, default=1.0, help="of the messages, each used once")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    config = ExperimentConfig.from_toml(
        find_experiment(options.experiment),
        {
            "data.validation_share": 0.1,
            "lora.rank": options.rank,
            "lora.lora_alpha": 2 * options.rank,
            "lora.target_modules": options.targets,
        },
    )
    world = open_world(config.base, config.data, config.lora, config.seed)
    everyone = world.data.client_ids
    away = set(draw_held_out(everyone, config.data.held_out_clients, config.seed))
    people = [client for client in everyone if client not in away]
    before = _losses(world, world.initial, people)
    print(f"{len(people)} people, base {before.mean():.4f} nats a token", flush=True)
    started = time.monotonic()
    for messages, adapter in _quarters(world, people, options.learning_rate, options.share):
        gains = before - _losses(world, adapter, people)
        print(
            f"{messages:6d} messages: mean {gains.mean():.4f}, median {np.median(gains):.4f}, "
            f"without the best {np.sort(gains)[:-1].mean():.4f}, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )
    return 0


def _quarters(
    world: World, people: Sequence[str], learning_rate: float, share: float
) -> Iterator[tuple[int, Adapter]]:
    """Train on a share of the pool, and yield after each quarter: messages so far, the adapter."""
    pool = [world.data.client(client).train for client in people]
    pairs = [(who, k) for who, examples in enumerate(pool) for k in range(len(examples))]
    order = rng(0, "pool").permutation(len(pairs))
    steps = int(share * len(pairs)) // STEP
    load_adapter_into(world.model, world.initial)
    factors = [
        factor
        for module in lora_modules(world.model).values()
        for factor in (module.lora_A, module.lora_B)
    ]
    optimizer = torch.optim.AdamW(factors, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(steps):
        rate = learning_rate * min(1.0, (step + 1) / WARM_UP) * _cosine(step / steps)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        mine = [pairs[k] for k in order[step * STEP : (step + 1) * STEP]]
        for start in range(0, STEP, PASS):
            loss = world.task.loss(world.model, _batch(pool, mine[start : start + PASS]))
            (loss * PASS / STEP).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        if (step + 1) * 4 // steps > step * 4 // steps:
            adapter = extract_adapter(world.model)
            yield (step + 1) * STEP, adapter
            load_adapter_into(world.model, adapter)  # evaluation has loaded others


def _cosine(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


def _batch(pool: Sequence[Examples], pairs: Sequence[tuple[int, int]]) -> Batch:
    """Put messages of several people in one batch, padded on the right."""
    parts = [collate(pool[who], np.array([k])) for who, k in pairs]
    width = max(part["inputs"].shape[1] for part in parts)
    inputs = np.zeros((len(parts), width), np.int64)
    targets = np.full((len(parts), width), -100)
    for row, part in enumerate(parts):
        size = part["inputs"].shape[1]
        inputs[row, :size], targets[row, :size] = part["inputs"][0], part["targets"][0]
    return {"inputs": inputs, "targets": targets}


def _losses(world: World, adapter: Adapter, people: Sequence[str]) -> np.ndarray:
    trials = [Trial(adapter, world.data.client(c).validation, f"client {c!r}") for c in people]
    found = evaluate_many(world.model, trials, world.task)
    losses = []
    for scores in found:
        if isinstance(scores, Exception):
            raise scores
        losses.append(scores["loss"])
    return np.array(losses)


if __name__ == "__main__":
    raise SystemExit(main())
