"""What memory a side takes, in a process of its own; prints one line of JSON (Linux only).

    python -m simulations.bench.device_memory train-minilm low

Sides of "train": those of `TRAIN_SIDES`. Of "mapping": infer, train, both, each also as
"infer-low" and so on. Bytes: "peak" of the whole process; "steps_peak" of the steps after the first
one; "anonymous" and "file" at the end, where "file" counts mapped weights as well as libraries.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

from fedlora.device.manifest import read_manifest
from fedlora.device.runtime import open_bundle
from fedlora.device.session import Session
from fedlora.device.trainer import Trainer
from simulations.bench.device_bundles import Variant, bundle_of
from simulations.bench.device_cases import ROUNDED, TOKENS, DeviceCase, device_case
from simulations.bench.device_sides import TorchSide, start_for, train_losses

__all__ = ["main", "memory_of"]


def memory_of(case: DeviceCase, side: str, threads: int) -> dict[str, Any]:
    """Do what the side does in this process, and say what it took."""
    name = side.removesuffix("-low")
    variant: Variant = name if name in ROUNDED else "fp32"  # type: ignore[assignment]
    folder = bundle_of(case.base_name, variant)
    if folder is None:
        return {"skipped": True}
    work = _mapping if case.kind == "mapping" else _train
    return work(case, folder, side, threads) | {"torch_loaded": "torch" in sys.modules}


def _train(case: DeviceCase, folder: Path, side: str, threads: int) -> dict[str, Any]:
    manifest = read_manifest(folder)
    start, batch = start_for(manifest), case.base.batch(*case.base.bucket)
    if side == "torch":
        step = TorchSide(case.base, manifest, threads).step_from(start)
    else:
        trainer = Trainer(folder, threads=threads, low_memory=side.endswith("low"))

        def step(batches: Any) -> list[float]:
            return train_losses(trainer, start, list(batches))

    step([batch])
    peak = _status("VmHWM")
    _settle()
    _forget_peak()
    step([batch] * 3)
    return {"peak": max(peak, _status("VmHWM")), "steps_peak": _status("VmHWM"), **_now()}


def _mapping(case: DeviceCase, folder: Path, side: str, threads: int) -> dict[str, Any]:
    manifest = read_manifest(folder)
    what, low = side.removesuffix("-low"), side.endswith("-low")
    bundle = open_bundle(folder, threads=threads, low_memory=low)
    if what in ("infer", "both"):
        Session(bundle).run(case.base.batch(1, TOKENS)["inputs"])
    if what in ("train", "both"):
        batch = case.base.batch(*case.base.bucket)
        train_losses(Trainer(bundle), start_for(manifest), [batch] * 2)
    _settle()
    weights = manifest.files["base.onnx.data"].num_bytes
    return {"peak": _status("VmHWM"), "weights": weights, "mappings": _mappings(folder), **_now()}


def _now() -> dict[str, int]:
    return {"anonymous": _status("RssAnon"), "file": _status("RssFile")}


def _mappings(folder: Path) -> int:
    """Return how often the base's file is mapped."""
    name = str((folder / "base.onnx.data").resolve())
    return sum(line.endswith(name) for line in Path("/proc/self/maps").read_text().splitlines())


def _settle() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main(arguments: list[str] | None = None) -> int:
    """Measure one side of one case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("side")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    print(json.dumps(memory_of(device_case(options.case), options.side, options.threads)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
