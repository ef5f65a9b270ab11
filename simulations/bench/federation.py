"""A federation on the loopback: how long a round takes, and where the time goes.

    python -m simulations.bench federation --nodes 3 --rounds 5
    python -m simulations.bench federation --side flower      Flower's own SuperNodes alone

A SuperLink and SuperNodes of our own run the watch experiment with devices that train in ONNX
Runtime. The sides differ in what starts a device: ``flower-supernode``, or fedlora's start of it
(`fedlora.federation.deploy.supernode`). `simulations.bench.federation_client` notes the clock in
every client process; a round is told by the client that ends last in it:

    waits    from the server's message to the start of the process that answers it
    starts   until the app's first line: the interpreter, Flower's imports, the message, the bundle
    imports  of clients.app
    opens    the ONNX trainer (with its imports), the bundle and the data
    trains   until the answer is made
    returns  from the answer to the server's next message, so with the server's own work

The first round, in which caches are cold, is left out of the medians.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from fedlora.errors import FederationError
from fedlora.experiment import ExperimentConfig, app_root, find_experiment
from fedlora.federation.checkpoint import RoundRecord, read_rounds
from fedlora.federation.deploy.supernode import supernode_command
from fedlora.federation.flower_commands import (
    OFFLINE,
    FlowerCommands,
    flower_command,
    free_port,
    stage_app,
    write_connection,
)
from fedlora.federation.phases import PHASES
from fedlora.simulation import flower
from simulations.bench.spent import family, machine_seconds, tree_seconds
from simulations.bench.tables import spread, table

__all__ = ["federation_table", "measure", "run_federation_bench"]

Result = dict[str, Any]
LAYERS = "conv1,conv2,conv3,hidden,classifier"
SIDES = {"flower": "flower-supernode", "fedlora": "fedlora's start of a SuperNode"}
PARTS = ("waits", "starts", "imports", "opens", "trains", "returns")
MARKS = ("sent", "start", "entered", "imported", "opened", "answered")
ROUND_SECONDS = 60.0  # for a round, before the run counts as failed
STATUS_SECONDS = 30.0  # between questions whether the run has failed


def run_federation_bench(sides: Sequence[str], nodes: int, rounds: int) -> list[Result]:
    """Measure one side after the other, print the tables, and return all figures."""
    results = []
    with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as temporary:
        bundle = Path(temporary) / "bundle"
        export_bundle(bundle)
        for side in sides:
            print(f"== {SIDES[side]}", file=sys.stderr, flush=True)
            work = Path(temporary) / side
            results.append(measure(side, bundle, work, nodes, rounds))
    print(federation_table(results))
    return results


def export_bundle(folder: Path) -> None:
    """Write the bundle that all devices of the benchmark train on."""
    command = [
        sys.executable, "-m", "fedlora", "export", "watch-cnn", "--target-modules", LAYERS,
        "--train", "16", "--out", str(folder),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def measure(side: str, bundle: Path, work: Path, nodes: int, rounds: int) -> Result:
    """Run one federation in `work`; return what its rounds and its client processes took.

    Raises `FederationError` when a process ends or a run does not come to its end.
    """
    config = ExperimentConfig.from_toml(
        find_experiment("watch"), {"federation.rounds": rounds, "federation.cohort": nodes}
    )
    work.mkdir(parents=True)
    staged, out, times = work / "fedlora-app", work / "run", work / "times.jsonl"
    stage_app(app_root(), config, staged)
    _put_clock(staged)
    environment = {"FEDLORA_BENCH_TIMES": str(times)}
    with _federation(side, work, nodes, bundle, environment) as (port, own, processes):
        home = {**own, "FLWR_HOME": str(work / "home")}
        write_connection(work / "home", f"127.0.0.1:{port}", ca=None)
        commands = FlowerCommands(home, "the federation")
        machine, begun = machine_seconds(), time.monotonic()
        run_config = {
            "experiment": "simulations/experiment.toml", "out": str(out), "min-clients": nodes,
                "evaluate": False,
        }  # fmt: skip
        run_id = commands.run(staged, run_config)
        records = _wait_for_rounds(out, rounds, processes, commands, run_id)
        time.sleep(1.0)  # the last client processes write their lines as they end
        cpu = {name: _tree_cpu(group) for name, group in processes.items()}
        busy = (machine_seconds() - machine) / (time.monotonic() - begun)
    clients = [json.loads(line) for line in times.read_text().splitlines()]
    return {
        "side": side,
        "nodes": nodes,
        "seconds": [record.seconds for record in records],
        "statuses": [record.status for record in records],
        "rounds": _parts_of_rounds(clients, rounds),
        "phases": [dict(record.phases) for record in records],
        "clients": clients,
        "cpu_of_trees": cpu,
        "busy_cores": busy,
    }


def federation_table(results: list[Result]) -> str:
    """Rounds and their parts, client processes, the server: medians, lowest to highest."""
    rows, processes, servers = [], [], []
    for result in results:
        name = SIDES[result["side"]]
        cells = [name, spread(result["seconds"][1:] or result["seconds"])]
        parts = result["rounds"][1:] or result["rounds"]
        cells += [spread([part[key] for part in parts]) if parts else "–" for key in PARTS]
        rows.append([*cells, f"{result['busy_cores']:.1f}"])
        warm = [c for c in result["clients"] if c["kind"] == "train" and c["round"] != "1"]
        cold = [c for c in result["clients"] if c["kind"] == "query"]
        for what, group in (("first", cold), ("later", warm)):
            if group:
                processes.append([name, what, *_process_cells(group)])
        later = result["phases"][1:] or result["phases"]
        servers.append([name, *(spread([phase[key] for phase in later]) for key in PHASES)])
    header = ("side", "round s", *PARTS, "cores busy")
    process_header = (
        "side", "processes", "until the app runs: wall s", "CPU s", "until it is open: wall s",
        "CPU s", "whole process: CPU s",
    )  # fmt: skip
    server_header = ("side", *(f"server: {phase} s" for phase in PHASES))
    return "\n\n".join(
        (table(header, rows), table(process_header, processes), table(server_header, servers))
    )


def _process_cells(clients: list[Result]) -> list[str]:
    def between(mark: str, clock: int) -> str:
        return spread([c[mark][clock] - c["start"][clock] for c in clients if mark in c])

    return [
        between("imported", 0), between("imported", 1), between("opened", 0), between("opened", 1),
        between("ended", 1),
    ]  # fmt: skip


def _parts_of_rounds(clients: list[Result], rounds: int) -> list[dict[str, float]]:
    """Return each round's parts in wall seconds, told by the client that answered last."""
    found = []
    sent = {c["round"]: c["sent"][0] for c in clients if c["kind"] == "train"}
    for number in range(1, rounds + 1):
        own = [c for c in clients if c["round"] == str(number) and all(mark in c for mark in MARKS)]
        if not own:
            continue
        last = max(own, key=lambda c: c["answered"][0])
        clock = [last[mark][0] for mark in MARKS]
        clock.append(sent.get(str(number + 1), float("nan")))
        steps = [later - earlier for earlier, later in itertools.pairwise(clock)]
        found.append({part: s for part, s in zip(PARTS, steps, strict=True) if s == s})
    # After the last round no message tells when the answers had come back.
    return [parts for parts in found if len(parts) == len(PARTS)]


def _put_clock(staged: Path) -> None:
    """Make the staged app's clients note the time."""
    client = Path(__file__).with_name("federation_client.py")
    shutil.copy(client, staged / "clients" / "timed.py")
    project = staged / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    project.write_text(text.replace('"clients.app:app"', '"clients.timed:app"'), encoding="utf-8")


@contextlib.contextmanager
def _federation(
    side: str, work: Path, nodes: int, bundle: Path, more: dict[str, str]
) -> Iterator[tuple[int, dict[str, str], dict[str, subprocess.Popen[bytes]]]]:
    """Start a SuperLink and the SuperNodes of a side, and stop them all at the end."""
    port = free_port()
    environment = {
        **os.environ,
        **OFFLINE,
        **more,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    link = [flower_command("flower-superlink"), "--insecure", "--host", "127.0.0.1"]
    node = {
        "flower": [flower_command("flower-supernode")],
        "fedlora": supernode_command(),
    }[side]
    processes = {"link": _start([*link, "--port", str(port)], work, "link", environment)}
    try:
        flower._wait_until_healthy(processes["link"], port, work / "link.log")
        for number in range(nodes):
            name = f"node{number}"
            config = f'partition-id={number} trainer="onnx" bundle="{bundle}"'
            command = [
                *node, "--insecure", "--superlink", f"127.0.0.1:{port}",
                "--port", str(free_port()), "--node-config", config,
            ]  # fmt: skip
            # A home each: on devices nobody shares the folder of installed apps.
            home = {**environment, "FLWR_HOME": str(work / name)}
            processes[name] = _start(command, work, name, home)
        yield port, environment, processes
    finally:
        _stop(list(processes.values()))


def _start(
    command: list[str], work: Path, name: str, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    with open(work / f"{name}.log", "wb") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def _wait_for_rounds(
    out: Path,
    rounds: int,
    processes: dict[str, subprocess.Popen[bytes]],
    commands: FlowerCommands,
    run_id: str,
) -> list[RoundRecord]:
    end = time.monotonic() + ROUND_SECONDS * (rounds + 1)
    ask_again = time.monotonic() + STATUS_SECONDS
    while time.monotonic() < end:
        records = list(read_rounds(out))
        if len(records) >= rounds:
            return records
        for name, process in processes.items():
            if process.poll() is not None:
                raise FederationError(f"{name} ended with code {process.returncode}")
        if time.monotonic() > ask_again:  # rarely: each question costs a second of the processor
            ask_again = time.monotonic() + STATUS_SECONDS
            status = commands.status(run_id)
            if status.startswith("finished") and status != "finished:completed":
                raise commands.failure(run_id, status)
        time.sleep(0.5)
    raise FederationError(f"{out}: the federation did not come to round {rounds} in time")


def _tree_cpu(process: subprocess.Popen[bytes]) -> float:
    """Return the CPU time of a process and all below it, those that have ended included."""
    total = tree_seconds(family(process.pid))
    for member in family(process.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            total += times.children_user + times.children_system
    return float(total)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    members = [m for p in processes if p.poll() is None for m in family(p.pid)]
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    _, left = psutil.wait_procs(members, timeout=flower.STOP_SECONDS)
    for member in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    for process in processes:
        process.wait()
