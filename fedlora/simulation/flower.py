"""The same federation in Flower's own simulation: a SuperLink, Ray, and the app as a bundle.

It takes about half a minute to start, runs clients in several processes, and leaves the same files
as the engine of this process. The clients are the caller's own processes, so they get the
experiment's ids by their environment (`fedlora.federation.owner`). Everything is local: a SuperLink
of our own on a free port of the loopback, its state in a temporary folder, no telemetry, no
installation. It is stopped, with all of its processes, however the run ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from fedlora.errors import FederationError, MissingExtraError
from fedlora.experiment import ExperimentConfig, app_root
from fedlora.federation.checkpoint import RoundRecord
from fedlora.federation.flower_commands import (
    FlowerCommands,
    flower_command,
    flower_environment,
    free_port,
    last_line,
    stage_app,
    wait_for_run,
    write_connection,
)
from fedlora.federation.owner import owner_environment

__all__ = ["run_in_flower"]

START_SECONDS = 60.0  # for the SuperLink to answer
STOP_SECONDS = 10.0  # for it to end by itself after SIGTERM


def run_in_flower(
    config: ExperimentConfig,
    out: Path,
    num_clients: int,
    *,
    on_round: Callable[[RoundRecord], None] | None = None,
    timeout: float = 24 * 3600.0,
    app: Path | None = None,
) -> None:
    """Run, or go on with, the federation in Flower's simulation; the result is in `out`.

    num_clients: virtual clients. timeout: seconds for the whole run. app: the folder of the Flower
    app (None: fedlora's own).

    Raises `MissingExtraError` without Ray, the run's own error if it failed with one of ours, and
    `FederationError` with the last line of the log for any other, or when the time is up.
    """
    if find_spec("ray") is None:
        raise MissingExtraError("Flower's own simulation", "ray")
    end = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="fedlora-", ignore_cleanup_errors=True) as temporary:
        work = Path(temporary)
        staged = stage_app(app or app_root(), config, work / "fedlora-app")
        with _superlink(work, owner_environment(config)) as (process, commands):
            run_config = {
                "experiment": "simulations/experiment.toml",
                "out": str(out.resolve()),
                "min-clients": num_clients,
                "evaluate": False,
            }
            nodes = f"num-supernodes={num_clients} client-resources-num-cpus=1"
            run_id = commands.run(staged, run_config, "--federation-config", nodes)

            def alive() -> None:
                if process.poll() is not None:
                    raise FederationError("Flower's SuperLink ended in the middle of the run")

            wait_for_run(
                commands,
                run_id,
                out,
                config.federation.rounds,
                end=end,
                alive=alive,
                on_round=on_round,
            )


@contextlib.contextmanager
def _superlink(
    work: Path, clients_environment: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], FlowerCommands]]:
    token = uuid.uuid4().hex
    home, log, port = work / "home", work / "superlink.log", free_port()
    write_connection(home, f"127.0.0.1:{port}", ca=None)
    # The token is what its processes are found by at the end.
    environment = flower_environment(home, more=clients_environment | {"FEDLORA_SIMULATION": token})
    command = [
        flower_command("flower-superlink", "ray"), "--insecure", "--simulation",
        "--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(process, port, log)
        yield process, FlowerCommands(environment, "Flower's simulation")
    finally:
        _stop(process, token)


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
        except OSError:  # also of urllib: not there yet, or not ready
            time.sleep(0.1)
        else:
            return
    raise FederationError(
        f"Flower's SuperLink did not start: {last_line(log.read_text(errors='replace'))}"
    )


def _stop(process: subprocess.Popen[bytes], token: str) -> None:
    """End the SuperLink, the simulation that it started, and Ray: those processes and no others."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    for _ in range(20):
        left = [pid for pid in _processes(token) if pid != os.getpid()]
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not left:
            break
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _processes(token: str) -> list[int]:
    """Return the processes that carry our token in their environment (Linux; else none)."""
    mark = f"FEDLORA_SIMULATION={token}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes():
                found.append(int(path.parent.name))
    return found
