"""What adapters cost a session: changing to one, reading one, and serving two in turn."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.adapter import Adapter
from fedlora.device.manifest import Manifest
from fedlora.formats import save_adapter
from fedlora.randomness import rng
from simulations.bench.device_cases import DeviceBase, random_adapter
from simulations.bench.device_sides import TorchSide, device_session

__all__ = ["measure_adapters"]

SWAPS, LOADS, REQUESTS, BLOCK = 2000, 200, 1000, 50
LENGTHS = (8, 32)  # tokens of a request, from and to


def measure_adapters(
    base: DeviceBase, bundle: Path, manifest: Manifest, turns: int, threads: int
) -> dict[str, Any]:
    """Times in microseconds (median, 5th and 95th percentile of calls), and of many requests.

    The adapters are of rank 8 on query and value.
    """
    lora = replace(base.lora, target_modules=base.query_value)
    specs = {
        path: spec
        for path, spec in manifest.layers.items()
        if path.rsplit(".", 1)[-1] in base.query_value
    }
    first, second = (random_adapter(specs, lora, seed, manifest.base) for seed in (1, 2))
    session = device_session(bundle, threads)
    session.add("first", first)
    session.add("second", second)
    names = cycle(("first", "second"))
    found: dict[str, Any] = {"layers": len(first), "num_bytes": first.num_bytes, "us": {}}
    found["us"]["swap of a loaded one"] = _each(lambda: session.swap(next(names)), SWAPS)
    both = cycle((first, second))
    found["us"]["swap of an Adapter, checked"] = _each(lambda: session.swap(next(both)), LOADS)
    with tempfile.TemporaryDirectory() as folder:
        for codec in ("fp32", "int8"):
            path = Path(folder) / f"{codec}.safetensors"
            save_adapter(first, path, codec=codec)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            label = f"load from a file, checks and SHA-256, {codec}"
            found["us"][label] = _each(partial(session.load, path, sha256=digest), LOADS)
            found[f"{codec}_file_bytes"] = path.stat().st_size
    torch_side = TorchSide(base, manifest, threads)
    full = [_over_all(a, manifest, base) for a in (first, second)]
    turn = cycle(full)
    found["us"]["torch: load_adapter_into"] = _each(lambda: torch_side.load(next(turn)), LOADS)
    found["requests"] = _requests(session, base, min(REQUESTS, 150 * turns))
    return found


def _over_all(adapter: Adapter, manifest: Manifest, base: DeviceBase) -> Adapter:
    """Return the adapter with zeros on the bundle's other layers: torch's carries all of them."""
    rest = random_adapter(manifest.layers, base.lora, 0, manifest.base)
    zeros = {path: replace(one, B=np.zeros_like(one.B)) for path, one in rest.layers.items()}
    return Adapter({**zeros, **adapter.layers}, base.lora, adapter.base)


def _each(run: Callable[[], object], times: int) -> list[float]:
    """Median, 5th and 95th percentile of the wall time of a call; the first tenth only warms up.

    Less than a scheduler's slice each, so the median is hardly touched by others' work.
    """
    found = []
    for _ in range(times + times // 10):
        start = time.perf_counter_ns()
        run()
        found.append((time.perf_counter_ns() - start) / 1e3)
    return [float(np.percentile(found[times // 10 :], q)) for q in (50, 5, 95)]


def _requests(session: Any, base: DeviceBase, count: int) -> dict[str, Any]:
    """Requests of mixed lengths, to one adapter or to two in turn, in blocks in turn."""
    generator = rng(0, "bench device requests")
    requests = [
        base.batch(1, int(length), seed=seed)["inputs"]
        for seed, length in enumerate(generator.integers(*LENGTHS, count, endpoint=True))
    ]
    sides = {"one": ("first", "first"), "two": ("first", "second")}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for which in sides.values():
        _serve(session, requests[:BLOCK], which)
    for start in range(0, count, BLOCK):
        order = list(sides) if (start // BLOCK) % 2 else list(reversed(sides))
        for name in order:
            began, used = time.perf_counter(), time.process_time()
            _serve(session, requests[start : start + BLOCK], sides[name])
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - used)
    return {
        "count": count,
        "wall": {name: sum(values) for name, values in wall.items()},
        "cpu": {name: sum(values) for name, values in cpu.items()},
        # Throughput of two against one, block by block.
        "ratio_cpu": [one / two for one, two in zip(cpu["one"], cpu["two"], strict=True)],
    }


def _serve(session: Any, requests: list[Any], which: tuple[str, str]) -> None:
    for number, inputs in enumerate(requests):
        session.run(inputs, adapter=which[number % 2])
