"""Where ONNX Runtime's time goes, by operator:  python -m simulations.bench.device_profile CASE

By ONNX Runtime's own profiler, on the fp32 bundle and the int8 one where there is one. Times of
nodes are wall times: beside other work only their shares mean something.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fedlora.device import runtime
from fedlora.device.manifest import read_manifest
from fedlora.device.runtime import OpenBundle, open_bundle
from fedlora.device.session import Session
from fedlora.device.trainer import Trainer
from simulations.bench.device_bundles import Variant, bundle_of
from simulations.bench.device_cases import TOKENS, DeviceCase, device_case
from simulations.bench.device_sides import adapter_for, start_for, train_losses
from simulations.bench.tables import table

__all__ = ["main", "operator_times"]

VARIANTS: tuple[Variant, ...] = ("fp32", "merged", "int8", "int8-training")
ROWS = 8  # of a batch that is inferred
RUNS = 5
SHOWN = 14  # operators


def operator_times(case: DeviceCase, folder: Path, low_memory: bool) -> tuple[Counter[str], int]:
    """Return microseconds a run by operator, and how many nodes ran."""
    with tempfile.TemporaryDirectory() as place:
        make_options: Callable[..., Any] = runtime._options

        def profiling(*arguments: Any) -> Any:
            options = make_options(*arguments)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(place) / "profile")
            return options

        # A device has no use for a profiler, so `open_bundle` has no option for it.
        with patch.object(runtime, "_options", profiling):
            bundle = open_bundle(folder, threads=1, low_memory=low_memory)
            for _ in range(1 + RUNS):
                name = _run(case, bundle)
            session = bundle._sessions[name][1]
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    found: Counter[str] = Counter()
    nodes = 0
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    for event in kernels[len(kernels) // (1 + RUNS) :]:  # the first run warms up
        found[event["args"]["op_name"]] += event["dur"]
        nodes += 1
    return Counter({name: value // RUNS for name, value in found.items()}), nodes // RUNS


def _run(case: DeviceCase, bundle: OpenBundle) -> str:
    """Run the case's graph once and return its name."""
    manifest = bundle.manifest
    if case.kind == "train":
        batch = case.base.batch(*case.base.bucket)
        train_losses(Trainer(bundle), start_for(manifest), [batch])
        return manifest.buckets()[0][0]
    session = Session(bundle)
    if manifest.merged is None:
        session.swap(adapter_for(case.base_name, manifest))
    session.run(case.base.batch(ROWS, TOKENS)["inputs"])
    return "infer.onnx"


def main(arguments: list[str] | None = None) -> int:
    """Print one table, a column a bundle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    options = parser.parse_args(arguments)
    case = device_case(options.case)
    columns: dict[str, tuple[Counter[str], int]] = {}
    for variant in VARIANTS:
        if variant == ("merged" if case.kind == "train" else "int8-training"):
            continue
        if (folder := bundle_of(case.base_name, variant)) is not None:
            read_manifest(folder)
            columns[variant] = operator_times(case, folder, False)
            if case.kind == "train":
                columns[f"{variant}, low memory"] = operator_times(case, folder, True)
    total: Counter[str] = Counter()
    for times, _ in columns.values():
        total.update(times)
    rows = []
    for name, _ in total.most_common(SHOWN):
        rows.append((name, *(f"{t[name] / sum(t.values()):.1%}" for t, _ in columns.values())))
    rows.append(("ms a run", *(f"{sum(t.values()) / 1e3:.2f}" for t, _ in columns.values())))
    rows.append(("nodes", *(f"{nodes:,}" for _, nodes in columns.values())))
    print(table((case.name, *columns), rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
