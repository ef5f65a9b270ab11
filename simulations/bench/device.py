"""The device in ONNX Runtime against torch: the same steps and the same inference.

    python -m simulations.bench device                     all usual cases, about half an hour
    python -m simulations.bench device --case train-minilm infer-minilm --json device.json
    python -m simulations.bench device --quick             tiny-chat, under half a minute
    python -m simulations.bench device --profile train-minilm

`simulations.bench.device_cases` says what a case is. Times are of all sides in turns in one
process (in the quick run one for all cases: starting torch is most of what it costs); memory is of
a process of its own for each side. Bundles are exported once and kept in
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
        done = _child("device_profile", device_case(options.profile).name, parse=False)
        return [], [options.profile] if done is None else []
    names = QUICK if options.quick else options.case
    turns = 2 if options.quick else options.turns
    results: list[Result] = []
    failed: list[str] = []
    here: list[DeviceCase] = []
    for case in [device_case(name) for name in names]:
        if is_here(case.base):
            here.append(case)
        else:
            print(f"{case.name}: left out: run fedlora models fetch {case.base.id}")
    together: dict[str, Result] = {}
    if options.quick:
        bundle_of(here[0].base_name, "fp32")
        timed = _times(here, turns, options.threads, "--only")
        together = {result["case"]: result for result in timed}
    for case in here:
        bundle_of(case.base_name, "fp32")
        result = _measured(case, turns, options.threads, together if options.quick else None)
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


def _measured(
    case: DeviceCase, turns: int, threads: int, together: dict[str, Result] | None
) -> Result | None:
    """Times by one process, memory by one for each side; None if one of them failed.

    together: of the quick run, which needs no bundle but the fp32 one: its times by case.
    """
    quick = together is not None
    result: Result = {
        "case": case.name, "kind": case.kind, "base": case.base_name, "threads": threads,
        "load": os.getloadavg()[0],
    }  # fmt: skip
    if case.kind != "mapping":
        found = together.get(case.name) if together is not None else None
        times = [found] if found else [] if quick else _times([case], turns, threads)
        if not times or times[0].get("skipped"):
            return times[0] if times else None
        result = times[0]
    sides = {"train": TRAIN_SIDES, "mapping": MAPPING_SIDES}.get(case.kind, ())
    result["memory"] = {}
    for side in (side for side in sides if not (quick and "int8" in side)):
        memory = _child("device_memory", case.name, side, "--threads", str(threads))
        if not memory:
            return None
        if not memory[-1].get("skipped"):
            result["memory"][side] = memory[-1]
    return result


def _times(cases: list[DeviceCase], turns: int, threads: int, *more: str) -> list[Result]:
    """Return the times of some cases, measured in one process; none if it failed."""
    names = [case.name for case in cases]
    options = ("--turns", str(turns), "--threads", str(threads), *more)
    return _child("device_measure", *names, *options) or []


def _child(module: str, *arguments: str, parse: bool = True) -> list[Result] | None:
    """Run a module; return the JSON of its lines, or nothing where its output is for people.

    None: it failed.
    """
    command = [sys.executable, "-m", f"simulations.bench.{module}", *arguments]
    print(f"== {' '.join(command[2:])}", file=sys.stderr, flush=True)
    stdout = subprocess.PIPE if parse else None
    try:
        done = subprocess.run(command, stdout=stdout, text=True, timeout=CASE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode != 0:
        return None
    return [json.loads(line) for line in done.stdout.splitlines()] if parse else []
