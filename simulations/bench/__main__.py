"""Run a benchmark from a clone; progress on stderr, Markdown tables on stdout.

    python -m simulations.bench cohort                      all usual cases, about half an hour
    python -m simulations.bench cohort --case minilm-b4-qv --repeat 7 --json cohort.json
    python -m simulations.bench cohort --quick --no-ray
    python -m simulations.bench cohort --profile minilm-b4-qv
    python -m simulations.bench scale --clients 1000 10000 100000
    python -m simulations.bench device --quick
    python -m simulations.bench federation --nodes 3 --rounds 5
    python -m simulations.bench aggregation --clients 1000

`simulations.bench.sides` says what is compared, `simulations.bench.work` what is counted;
`simulations.bench.device` has the device's side, `simulations.bench.federation` a deployed one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError, FedloraError, MissingExtraError
from simulations.bench.cases import BASES, DEFAULT, QUICK, case_named
from simulations.bench.device import add_device, run_device
from simulations.bench.tables import ratio_table, scale_table, time_table

CASE_SECONDS = 3600.0
QUICK_CLIENTS = 8

# Benchmarks that read their arguments themselves, in a process of their own.
ALONE = {
    "aggregation": "bytes a second that the server sums, and FlexLoRA's SVD",
    "memory": "quantized bases and gradient checkpointing",
    "messages": "what a client costs without its training",
    "quorum": "one straggler of ten",
    "secure-sum": "what a secure sum costs",
}


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 1 when a case failed."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in ALONE:
        return _own(given[0].replace("-", "_"), *given[1:])
    options = _parser().parse_args(given)
    run = {"cohort": _cohort, "scale": _scale, "device": _device, "federation": _federation}[
        options.benchmark
    ]
    try:
        return run(options)
    except FedloraError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    which = parser.add_subparsers(dest="benchmark", required=True)
    cohort = which.add_parser("cohort", help="the cohort engine against PEFT and Flower")
    cohort.add_argument(
        "--case", nargs="+", metavar="NAME", default=list(DEFAULT),
        help=f"<base>-b<1|4|8>-<qv|all>[-top<blocks>][-mixed], bases {', '.join(BASES)}",
    )  # fmt: skip
    cohort.add_argument("--repeat", type=int, default=5, help="how often each side takes its turn")
    cohort.add_argument("--quick", action="store_true", help="one small case, once")
    cohort.add_argument("--no-ray", action="store_true", help="without Flower's simulation")
    cohort.add_argument("--profile", metavar="CASE", help="only show where this case's time goes")
    scale = which.add_parser("scale", help="cost a client and memory, up to 100,000 clients")
    scale.add_argument("--clients", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    scale.add_argument(
        "--side", nargs="+", default=["cohort", "engine"],
        choices=["sequential", "cohort", "engine"],
    )  # fmt: skip
    device = which.add_parser("device", help="the device in ONNX Runtime against torch")
    add_device(device)
    federation = which.add_parser("federation", help="a round over SuperNodes on the loopback")
    federation.add_argument("--nodes", type=int, default=3, help="devices, at most 10")
    federation.add_argument("--rounds", type=int, default=5, help="at least 2; the first is cold")
    federation.add_argument(
        "--side", nargs="+", choices=["flower", "fedlora"], default=["flower", "fedlora"],
        help="what starts the SuperNodes",
    )  # fmt: skip
    for name, what in ALONE.items():
        which.add_parser(name, help=what)
    for command in (cohort, scale, device, federation):
        command.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    return parser


def _cohort(options: argparse.Namespace) -> int:
    if options.profile is not None:
        return _own("profiling", case_named(options.profile).name)
    names = QUICK if options.quick else options.case
    clients = QUICK_CLIENTS if options.quick else None
    repeat = 1 if options.quick else options.repeat
    cases = [case_named(name, clients) for name in names]
    _require("peft", "dev")
    if not options.no_ray:
        _require("ray", "ray")
    results, failed = [], []
    for case in cases:
        more = ["--repeat", str(repeat), "--clients", str(case.clients)]
        more += ["--no-ray"] if options.no_ray else []
        result = _measured("compare", case.name, *more)
        if result is None:
            failed.append(case.name)
            continue
        results.append(result)
        if options.json is not None:  # after every case: the whole takes long
            _write(options.json, results)
    print(time_table(results), ratio_table(results), sep="\n\n")
    return _report(failed)


def _scale(options: argparse.Namespace) -> int:
    results, failed = [], []
    for side in options.side:
        for clients in options.clients:
            result = _measured("scale", side, str(clients))
            if result is None:
                failed.append(f"{side} with {clients} clients")
            else:
                results.append(result)
    if options.json is not None:
        _write(options.json, results)
    print(scale_table(results))
    return _report(failed)


def _device(options: argparse.Namespace) -> int:
    for package in ("onnx", "onnxruntime"):
        _require(package, "export")
    results, failed = run_device(options)
    if options.json is not None:
        _write(options.json, results)
    return _report(failed)


def _federation(options: argparse.Namespace) -> int:
    for package in ("onnx", "onnxruntime", "flwr", "psutil"):
        _require(package, "export,client,dev")
    from simulations.bench.federation import run_federation_bench  # needs Flower and psutil

    results = run_federation_bench(options.side, options.nodes, options.rounds)
    if options.json is not None:
        _write(options.json, results)
    return 0


def _require(package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise MissingExtraError(f"this benchmark ({package})", extra)


def _measured(module: str, *arguments: str) -> dict[str, Any] | None:
    """Run a measurement in a process of its own, which starts with clean memory; None if failed."""
    command = [sys.executable, "-m", f"simulations.bench.{module}", *arguments]
    print(f"== {' '.join(command[2:])}", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=CASE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode != 0:
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _own(module: str, *arguments: str) -> int:
    command = [sys.executable, "-m", f"simulations.bench.{module}", *arguments]
    return subprocess.run(command, check=False).returncode


def _report(failed: list[str]) -> int:
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


def _write(file: Path, results: list[dict[str, Any]]) -> None:
    packages = [
        name
        for name in ("torch", "flwr", "ray", "peft", "transformers", "numpy", "onnx", "onnxruntime")
        if find_spec(name) is not None
    ]
    table = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "results": results,
    }
    file.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
