"""The device in ONNX Runtime against torch: the same steps and the same inference.

    python -m simulations.bench device                     all usual cases, about half an hour
    python -m simulations.bench device --case train-minilm infer-minilm --json device.json
    python -m simulations.bench device --quick
    python -m simulations.bench device --profile train-minilm

`simulations.bench.device_cases` says what a case is. Times are of all sides in turns in one
process; memory is of a process of its own for each side. Bundles are exported once and kept in
fedlora's cache folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from simulations.bench.device_bundles import bundle_of
from simulations.bench.device_cases import (
    DEFAULT,
    KINDS,
    MAPPING_SIDES,
    QUICK,
    TRAIN_SIDES,
    DeviceCase,
    device_case,
    is_here,
)
from simulations.bench.device_tables import device_tables

__all__ = ["add_device", "run_device"]

Result = dict[str, Any]
CASE_SECONDS = 3600.0


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--case", nargs="+", metavar="NAME", default=list(DEFAULT),
        help=f"<kind>-<base>, kinds {', '.join(KINDS)}",
    )  # fmt: skip
    parser.add_argument("--turns", type=int, default=7, help="how often each side takes its turn")
    parser.add_argument("--threads", type=int, default=1, help="of either side")
    parser.add_argument("--quick", action="store_true", help="tiny-chat, two turns")
    parser.add_argument("--profile", metavar="CASE", help="only the share of each kind of operator")


def run_device(options: argparse.Namespace) -> tuple[list[Result], list[str]]:
    """Measure, print the tables, and return all figures and the cases that failed.

    Raises `ConfigError` for a name that is no case.
    """
    if options.profile is not None:
        done = _child("device_profile", device_case(options.profile).name, last=False)
        return [], [] if done else [options.profile]
    names = QUICK if options.quick else options.case
    turns = 2 if options.quick else options.turns
    results: list[Result] = []
    failed: list[str] = []
    for case in [device_case(name) for name in names]:
        if not is_here(case.base):
            print(f"{case.name}: left out: run fedlora models fetch {case.base.id}")
            continue
        bundle_of(case.base_name, "fp32")
        result = _measured(case, turns, options.threads, options.quick)
        if result is None:
            failed.append(case.name)
        elif result.get("skipped"):
            print(f"{case.name}: left out: {result['skipped']}")
        else:
            results.append(result)
        if options.json is not None:  # after every case: the whole takes long
            options.json.write_text(json.dumps(results) + "\n", encoding="utf-8")
    print(device_tables(results))
    return results, failed


def _measured(case: DeviceCase, turns: int, threads: int, quick: bool) -> Result | None:
    """Times by one process, memory by one for each side; None if one of them failed.

    quick: only what needs no bundle but the fp32 one.
    """
    more = ("--threads", str(threads))
    result: Result = {
        "case": case.name, "kind": case.kind, "base": case.base_name, "threads": threads,
        "load": os.getloadavg()[0],
    }  # fmt: skip
    if case.kind != "mapping":
        only = ("--only",) if quick else ()
        times = _child("device_measure", case.name, "--turns", str(turns), *more, *only)
        if times is None or times.get("skipped"):
            return times
        result = times
    sides = {"train": TRAIN_SIDES, "mapping": MAPPING_SIDES}.get(case.kind, ())
    result["memory"] = {}
    for side in (side for side in sides if not (quick and "int8" in side)):
        memory = _child("device_memory", case.name, side, *more)
        if memory is None:
            return None
        if not memory.get("skipped"):
            result["memory"][side] = memory
    return result


def _child(module: str, *arguments: str, last: bool = True) -> Result | None:
    """Run a module; return the JSON of its last line, or {} where its output is for people."""
    command = [sys.executable, "-m", f"simulations.bench.{module}", *arguments]
    print(f"== {' '.join(command[2:])}", file=sys.stderr, flush=True)
    stdout = subprocess.PIPE if last else None
    try:
        done = subprocess.run(command, stdout=stdout, text=True, timeout=CASE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode != 0:
        return None
    found: Result = json.loads(done.stdout.splitlines()[-1]) if last else {}
    return found
