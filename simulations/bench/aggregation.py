"""What aggregation costs the server: bytes a second of the linear methods, and FlexLoRA's SVD.

    python -m simulations.bench aggregation [--clients 1000] [--repeat 5] [--json FILE]

The linear methods read prepared updates of SmolLM2-135M's size (q and v of 30 blocks at rank 8:
460,800 numbers, 1.84 MB), one after another as a round streams them. Beside each of their turns the
same bytes are read by the plainest loop there is, a dot product of every row with itself: the
machine's memory-read bandwidth. The check is what a server does to every reply before it adds it
up: cut the row into factors, and look for a number that is not finite. FlexLoRA cuts one layer of
4096 x 4096 from 32 clients of rank 8, against the SVD of the summed matrix. One BLAS thread, CPU
and wall time, peak of memory.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when NumPy loads its BLAS: imports come after it

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import fedlora
from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.aggregation import Method, ServerState, Update
from fedlora.flat import RowForm
from fedlora.targets import LayerSpec, initial_adapter
from fedlora.training import Factor
from simulations.bench.resident import peak_bytes
from simulations.bench.tables import spread, table

__all__ = ["main", "measure_flexlora", "measure_linear"]

BLOCKS, WIDTH, KEY_WIDTH, RANK = 30, 576, 192, 8
DISTINCT = 200  # prepared rows, 369 MB: far more than any cache, and then again from the first
BOTH: frozenset[Factor] = frozenset({"A", "B"})


@dataclass(frozen=True, slots=True)
class Spent:
    """One turn."""

    wall: float
    cpu: float


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print the table as Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench aggregation", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--distinct", type=int, default=DISTINCT, help="prepared updates")
    parser.add_argument("--width", type=int, default=4096, help="of FlexLoRA's layer")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    linear = measure_linear(options.clients, options.distinct, options.repeat)
    flexlora = measure_flexlora(options.width, options.repeat)
    if options.json is not None:
        figures = {"linear": linear, "flexlora": flexlora}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(_linear_table(linear), _flexlora_table(flexlora), sep="\n\n")
    return 0


def measure_linear(clients: int, distinct: int, repeat: int) -> dict[str, Any]:
    """GB/s of every linear method and of a plain read, turn by turn, and the memory on top."""
    specs = {
        f"model.layers.{block}.self_attn.{name}": LayerSpec("linear", (WIDTH,), width)
        for block in range(BLOCKS)
        for name, width in (("q_proj", WIDTH), ("v_proj", KEY_WIDTH))
    }
    start = initial_adapter(specs, LoraConfig(rank=RANK), 0, None)
    found: dict[str, Any] = {"clients": clients, "methods": {}}
    for name, method in fedlora.methods().items():
        if not method.linear:
            continue
        factors = method.uploaded(1)
        form = RowForm.of(start, factors)
        rng = np.random.default_rng(0)
        rows = [rng.normal(size=form.size).astype(np.float32).tobytes() for _ in range(distinct)]
        num_bytes = 4 * form.size * clients
        before = peak_bytes() / 2**20
        sides = _sides(method, form, rows, clients)
        turns: dict[str, list[Spent]] = {side: [] for side in sides}
        for _ in range(repeat):
            for side, work in sides.items():
                turns[side].append(_spent(work))
        reads = [spent.cpu for spent in turns["read"]]
        found["methods"][name] = {
            "mb_a_client": 4 * form.size / 1e6,
            "extra_mb": peak_bytes() / 2**20 - before,
            "wall": [spent.wall for spent in turns["sum"]],
            **{
                f"{side}_gb_per_cpu_s": [num_bytes / spent.cpu / 1e9 for spent in spents]
                for side, spents in turns.items()
            },
            **{
                f"{side}_share": [r / s.cpu for r, s in zip(reads, turns[side], strict=True)]
                for side in ("sum", "check")
            },
        }
    return found


def _sides(
    method: Method, form: RowForm, rows: list[bytes], clients: int
) -> dict[str, Callable[[], object]]:
    """Return what takes turns: to read the rows, to add them up, and to check them as well."""
    state = ServerState.start(form.like)
    ready = [form.read(row) for row in rows]

    def add(adapters: Iterable[Adapter]) -> ServerState:
        return method.aggregate(state, _updates(adapters, clients))

    return {
        "read": lambda: _read_all(rows, clients),
        "sum": lambda: add(itertools.cycle(ready)),
        "check": lambda: add(form.read(row) for row in itertools.cycle(rows)),
    }


def _updates(adapters: Iterable[Adapter], clients: int) -> Iterator[Update]:
    """Yield as many updates as there are clients, of the adapters in turn."""
    for number, adapter in enumerate(itertools.islice(adapters, clients)):
        yield Update(adapter, 10.0 + number % 90, f"c{number}")


def _read_all(rows: list[bytes], clients: int) -> None:
    total = 0.0
    for number in range(clients):
        row = np.frombuffer(rows[number % len(rows)], np.float32)
        total += float(np.dot(row, row))
    if not np.isfinite(total):
        raise ValueError("the prepared rows are not finite")


def measure_flexlora(width: int, repeat: int, clients: int = 32) -> dict[str, Any]:
    """Seconds for one layer by factors, and (once: it takes long) of the SVD of the whole."""
    rng = np.random.default_rng(0)

    def adapter(b: bool) -> Adapter:
        B = rng.normal(size=(width, RANK)) if b else np.zeros((width, RANK))
        layer = LoraLayer(
            rng.normal(size=(RANK, width)).astype(np.float32), B.astype(np.float32), 2.0
        )
        return Adapter({"fc": layer}, LoraConfig(rank=RANK, lora_alpha=2 * RANK))

    state = ServerState.start(adapter(False))
    updates = [Update(adapter(True), 1.0 + k, f"c{k}") for k in range(clients)]
    method = fedlora.method("flexlora")
    by_factors = [_spent(lambda: method.aggregate(state, updates)) for _ in range(repeat)]
    result = method.aggregate(state, updates).adapter.delta_weight("fc")
    found: dict[str, Any] = {}

    def dense() -> None:
        total = sum(update.num_examples for update in updates)
        whole = np.zeros((width, width))
        for update in updates:
            layer = update.adapter["fc"]
            share = update.num_examples / total * layer.scaling
            whole += share * (layer.B.astype(np.float64) @ layer.A.astype(np.float64))
        left, values, right = np.linalg.svd(whole, full_matrices=False)
        found["cut"] = (left[:, :RANK] * values[:RANK]) @ right[:RANK]

    slow = _spent(dense)
    difference = float(np.linalg.norm(result - found["cut"]) / np.linalg.norm(found["cut"]))
    return {
        "width": width,
        "clients": clients,
        "factors_cpu": [spent.cpu for spent in by_factors],
        "factors_wall": [spent.wall for spent in by_factors],
        "dense_cpu": slow.cpu,
        "dense_wall": slow.wall,
        "difference": difference,
    }


def _linear_table(found: dict[str, Any]) -> str:
    rows = [
        (
            name,
            f"{figures['mb_a_client']:.2f}",
            spread(figures["sum_gb_per_cpu_s"]),
            spread(figures["read_gb_per_cpu_s"]),
            _percent(figures["sum_share"]),
            _percent(figures["check_share"]),
            spread(figures["wall"]),
            f"{figures['extra_mb']:.0f}",
        )
        for name, figures in found["methods"].items()
    ]
    header = (
        "method", "MB a client", "GB a CPU s", "plain read, GB a CPU s", "share of it",
        "with the check of every number", f"wall s, {found['clients']} clients", "MB on top",
    )  # fmt: skip
    return table(header, rows)


def _flexlora_table(found: dict[str, Any]) -> str:
    ratio = found["dense_cpu"] / median(found["factors_cpu"])
    row = (
        f"{found['width']} x {found['width']}, {found['clients']} clients of rank {RANK}",
        spread(found["factors_cpu"]),
        f"{found['dense_cpu']:.2f}",
        f"{ratio:.0f}",
        f"{found['difference']:.1e}",
    )
    header = ("FlexLoRA", "by factors, CPU s", "dense SVD, CPU s", "times", "relative difference")
    return table(header, [row])


def _percent(shares: list[float]) -> str:
    return f"{median(shares):.0%} ({min(shares):.0%}–{max(shares):.0%})"


def _spent(work: Callable[[], object]) -> Spent:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


if __name__ == "__main__":
    raise SystemExit(main())
