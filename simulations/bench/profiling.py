"""Where the time of a round goes, by kind of operation:  python -m simulations.bench.profiling CASE

One thread; the plain engine beside the batched one. Shares are of the time under torch's profiler,
which makes small operations look a little more expensive than they are. What is in no
operation of torch is Python, the autograd engine and drawing batches.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from fedlora.data import draw_batches
from fedlora.nn import load_adapter_into, train_local
from fedlora.world import World
from simulations.bench.cases import RANK, Case, case_named
from simulations.bench.rounds import engine_round, opened_world
from simulations.bench.tables import table

__all__ = ["KINDS", "kind_of", "profile_table", "shares"]

PLAIN_CLIENTS = 8  # whose shares stand for all: the profiler keeps every single operation
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addbmm", "linear")
# By parts of an operation's name, in this order.
PARTS = (
    ("optimizer", ("fused_adamw", "fused_sgd", "_foreach", "clip_grad")),
    ("loss", ("log_softmax", "nll_loss", "cross_entropy", "logsumexp")),
    ("attention", ("scaled_dot_product", "flash_attention", "softmax")),
    ("normalization", ("layer_norm", "rms_norm", "rsqrt", "square", "mean")),
    ("activation", ("gelu", "silu", "relu", "tanh", "sigmoid")),
    ("copies", ("copy_", "clone", "contiguous", "cat", "stack", "index", "gather", "fill_",
                "zero", "embedding", "empty", "ones", "repeat", "roll", "nonzero", "arange")),
    ("elementwise", ("add", "mul", "div", "sub", "neg", "sum", "pow", "where", "masked", "cos",
                     "sin", "triu", "ne", "sqrt", "norm")),
)  # fmt: skip
KINDS = ("GEMM frozen", "GEMM LoRA", *(kind for kind, _ in PARTS), "other", "outside")


def kind_of(name: str, shapes: Sequence[Sequence[int]], rank: int = RANK) -> str:
    """Return the kind of an operation by its name and the shapes of its inputs.

    A matrix product is LoRA's when one side of a matrix is the rank; otherwise one over a batch of
    matrices is attention's (the models here have no side of 8 but that), and any other is frozen.

    >>> kind_of("aten::mm", [[96, 64], [64, 8]]), kind_of("aten::mm", [[96, 64], [64, 64]])
    ('GEMM LoRA', 'GEMM frozen')
    """
    if not name.startswith("aten::"):
        return "other"
    short = name.removeprefix("aten::")
    if short.rstrip("_") in PRODUCTS:
        matrices = [shape[-2:] for shape in shapes if len(shape) >= 2]
        if any(rank in matrix for matrix in matrices):
            return "GEMM LoRA"
        return "attention" if "bmm" in short else "GEMM frozen"
    for kind, parts in PARTS:
        if any(part in short for part in parts):
            return kind
    return "other"


def shares(run: Callable[[], object]) -> tuple[dict[str, float], float]:
    """Return each kind's share of a call's time, and the CPU seconds it takes unprofiled.

    `run` is called three times: to warm up, to be timed, and under the profiler.
    """
    run()
    start = time.process_time()
    run()
    seconds = time.process_time() - start
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        start = time.perf_counter()
        run()
        profiled = time.perf_counter() - start
    found: Counter[str] = Counter()
    for event in profiler.key_averages(group_by_input_shape=True):
        found[kind_of(event.key, event.input_shapes)] += event.self_cpu_time_total / 1e6
    found["outside"] = max(0.0, profiled - sum(found.values()))  # type: ignore[assignment]
    total = sum(found.values())
    return {kind: found[kind] / total for kind in KINDS}, seconds


def profile_table(case: Case) -> str:
    """Return the shares of the plain engine and of the batched one."""
    world = opened_world(case)
    columns = {
        "plain engine": shares(lambda: _plain(case, world, world.data.client_ids[:PLAIN_CLIENTS])),
        "cohort engine": shares(lambda: engine_round(case, world, world.data.client_ids)),
    }
    rows = [(kind, *(f"{found[kind]:.1%}" for found, _ in columns.values())) for kind in KINDS]
    counts = (min(PLAIN_CLIENTS, case.clients), case.clients)
    milliseconds = [
        seconds / (count * case.steps) * 1e3
        for count, (_, seconds) in zip(counts, columns.values(), strict=True)
    ]
    rows.append(("CPU ms a client step", *(f"{value:.2f}" for value in milliseconds)))
    return table((case.name, *columns), rows)


def _plain(case: Case, world: World, clients: Sequence[str]) -> None:
    config = case.experiment("sequential", 1)
    train = config.federation.train
    for client_id in clients:
        client = world.data.client(client_id)
        load_adapter_into(world.model, world.initial)
        batches = draw_batches(client.train, train, config.seed, client.client_id, 1)
        train_local(world.model, batches, train, task=world.task, num_examples=len(client.train))


def main() -> None:
    case = case_named(sys.argv[1])
    os.environ |= case.shape.environment()
    torch.set_num_threads(1)
    print(profile_table(case))


if __name__ == "__main__":
    main()
