"""The same federation in Flower's own simulation: a SuperLink, Ray, and the app as a bundle.

It takes about half a minute to start, runs clients in several processes, and leaves the same files
as the engine of this process. The clients are the caller's own processes, so they get the
experiment's ids by their environment (`fedlora.federation.owner`). Everything is local: a SuperLink
of our own on a free port of the loopback, its state in a temporary folder, no telemetry, no
installation. It is stopped, with all of its processes, however the run ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fedlora import errors
from fedlora.errors import FederationError, FedloraError, MissingExtraError, RunError
from fedlora.experiment import ExperimentConfig, app_root
from fedlora.federation.checkpoint import RoundRecord, read_rounds
from fedlora.federation.client import one_line
from fedlora.federation.owner import owner_environment

__all__ = ["run_in_flower"]

START_SECONDS = 60.0  # for the SuperLink to answer
STOP_SECONDS = 10.0  # for it to end by itself after SIGTERM
POLL_SECONDS = 0.5  # between looks at rounds.jsonl
STATUS_SECONDS = 10.0  # between questions for the status of the run

_OFFLINE = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


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
        staged = _stage(app or app_root(), config, work / "fedlora-app")
        with _superlink(work, owner_environment(config)) as link:
            run_config = (
                f'experiment="simulations/experiment.toml" out="{out.resolve()}" '
                f"min-clients={num_clients} evaluate=false"
            )
            nodes = f"num-supernodes={num_clients} client-resources-num-cpus=1"
            output = link.flwr("run", str(staged), "--federation-config", nodes, "-c", run_config)
            found = re.search(r"started run (\d+)", output)
            if found is None:
                raise FederationError(f"flwr run: not started: {_last_line(output)}")
            _wait(link, found.group(1), out, config.federation.rounds, end, on_round)


def _stage(app: Path, config: ExperimentConfig, folder: Path) -> Path:
    """Copy the app and the resolved experiment into a folder that `flwr build` accepts."""
    for name in ("clients", "server"):
        shutil.copytree(app / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(app / "pyproject.toml", folder)
    (folder / "simulations").mkdir()
    (folder / "simulations" / "experiment.toml").write_text(config.to_toml(), encoding="utf-8")
    return folder


@dataclass(frozen=True, slots=True)
class _Link:
    """A SuperLink that runs, and how to talk to it."""

    process: subprocess.Popen[bytes]
    log: Path
    environment: dict[str, str]

    def flwr(self, *arguments: str) -> str:
        """Run ``flwr`` and return what it prints. It exits 0 for a failed run, and may exit 1."""
        command = [_command("flwr"), *arguments]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=120, check=False
        )
        return done.stdout + done.stderr


@contextlib.contextmanager
def _superlink(work: Path, clients_environment: dict[str, str]) -> Iterator[_Link]:
    token = uuid.uuid4().hex
    home, log, port = work / "home", work / "superlink.log", _free_port()
    home.mkdir()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "own"\n\n'
        f'[superlink.own]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = {
        **os.environ,
        **_OFFLINE,
        **clients_environment,
        "FLWR_HOME": str(home),
        "FEDLORA_SIMULATION": token,  # by which its processes are found at the end
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    command = [
        _command("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess",
        "--host", "127.0.0.1", "--port", str(port),
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
        yield _Link(process, log, environment)
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
        f"Flower's SuperLink did not start: {_last_line(log.read_text(errors='replace'))}"
    )


def _wait(
    link: _Link,
    run_id: str,
    out: Path,
    rounds: int,
    end: float,
    on_round: Callable[[RoundRecord], None] | None,
) -> None:
    """Report the rounds and wait for the end, which only ``flwr list`` tells truly.

    It costs a second of the processor, so it is asked rarely until the last round is written.
    """
    seen = len(read_rounds(out))
    ask_again = 0.0
    while True:
        records = read_rounds(out)
        for record in records[seen:]:
            if on_round is not None:
                on_round(record)
        seen = len(records)
        done = bool(records) and records[-1].round >= rounds
        if done or time.monotonic() > ask_again:
            ask_again = time.monotonic() + STATUS_SECONDS
            status = _status(link, run_id)
            if status == "finished:completed":
                for record in read_rounds(out)[seen:]:  # the question may take as long as a run
                    if on_round is not None:
                        on_round(record)
                return
            if status.startswith("finished"):
                raise _failure(link.flwr("log", run_id, "--show"), status)
        if link.process.poll() is not None:
            raise FederationError("Flower's SuperLink ended in the middle of the run")
        if time.monotonic() > end:
            raise FederationError("Flower's simulation did not end in time; the run can be resumed")
        time.sleep(POLL_SECONDS)


def _status(link: _Link, run_id: str) -> str:
    output = link.flwr("list", "--run-id", run_id, "--format", "json")
    try:
        return str(json.loads(output[output.index("{") :])["runs"][0]["status"])
    except (ValueError, KeyError, IndexError):
        return "unknown"


def _failure(log: str, status: str) -> FedloraError:
    """Return the error that ended a run: ours as the ServerApp logged it, else its last line."""
    text = _without_colors(log)
    found = re.findall(r"fedlora-error (\w+): (.*)", text)
    if found:
        name, message = found[-1]
        kind = getattr(errors, name, FederationError)
        if kind is MissingExtraError or not issubclass(kind, FedloraError):
            kind = FederationError
        return kind(one_line(message, 1000))
    raised = re.findall(r"^[\w.]+(?:Error|Exception|Exit)\b.*", text, re.MULTILINE)
    return RunError(
        f"Flower's simulation is {status}: {one_line(raised[-1]) if raised else _last_line(text)}"
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


def _command(name: str) -> str:
    beside = Path(sys.executable).parent / name
    path = str(beside) if beside.is_file() else shutil.which(name)
    if path is None:
        raise MissingExtraError("Flower's own simulation", "ray")
    return path


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _last_line(text: str) -> str:
    lines = [line for line in _without_colors(text).splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else "nothing was printed"


def _without_colors(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)
