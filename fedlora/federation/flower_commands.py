"""Flower's own commands: their environment, the app they are given, a run's status and its end.

What is written here was found out by running them. ``flwr run --stream`` exits 0 for a run that
failed, so the end is read from ``flwr list``, which costs over a second of a processor. Without the
environment of `flower_environment` a first ``flwr run`` asks the network, and may install another
torch. `fedlora simulate --engine flower` and `fedlora federation` share all of it.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora import errors
from fedlora.errors import FederationError, FedloraError, MissingExtraError, RunError
from fedlora.experiment import ExperimentConfig
from fedlora.federation.checkpoint import RoundRecord, read_rounds
from fedlora.federation.client import one_line

__all__ = [
    "OFFLINE",
    "FlowerCommands",
    "flower_command",
    "flower_environment",
    "free_port",
    "last_line",
    "run_failure",
    "stage_app",
    "toml_string",
    "wait_for_run",
    "without_colors",
    "write_connection",
]

POLL_SECONDS = 0.5  # between looks at rounds.jsonl
STATUS_SECONDS = 10.0  # between questions for the status of a run when it has just begun,
LONGEST_STATUS_SECONDS = 30.0  # growing to this, since each costs over a second of a processor
LAST_SECONDS = 2.0  # the same once its last file is written
COMMAND_SECONDS = 120.0  # for one flwr command
CONNECTION = "own"  # the name of the connection in our config.toml

OFFLINE = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def flower_environment(
    home: Path, python: Path | None = None, more: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the environment of a Flower process: offline, its state in `home`, our packages.

    python: the interpreter whose packages it is to use; None: this one, also with what is only on
    its search path. Another one gets nothing of ours, and finds what is installed beside it.
    """
    own = python is None
    interpreter = Path(sys.executable) if python is None else python
    path = os.pathsep.join([str(interpreter.parent), os.environ.get("PATH", "")])
    environment = {**os.environ, **OFFLINE, "FLWR_HOME": str(home), "PATH": path, **(more or {})}
    environment.pop("PYTHONPATH", None)
    if own:
        environment["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return environment


def flower_command(name: str, extra: str = "server", python: Path | None = None) -> str:
    """Return the path of one of Flower's commands, the one beside `python` (None: ours) first.

    Raises `MissingExtraError` when there is none.
    """
    interpreter = Path(sys.executable) if python is None else python
    beside = interpreter.parent / name
    path = str(beside) if beside.is_file() else None
    if path is None and python is None:
        path = shutil.which(name)
    if path is None:
        raise MissingExtraError(f"{name}, one of Flower's commands,", extra)
    return path


def write_connection(home: Path, address: str, ca: Path | None) -> None:
    """Write the config.toml by which ``flwr`` finds its SuperLink; ca None: without TLS."""
    home.mkdir(parents=True, exist_ok=True)
    security = "insecure = true" if ca is None else f"root-certificates = {toml_string(str(ca))}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f"address = {toml_string(address)}\n{security}\n",
        encoding="utf-8",
    )


@dataclass(frozen=True, slots=True)
class FlowerCommands:
    """``flwr`` with an environment whose home holds the connection."""

    environment: Mapping[str, str]
    what: str  # that fails, for the text of an error

    def flwr(self, *arguments: str) -> str:
        """Run ``flwr`` and return what it prints. It exits 0 for a failed run, and may exit 1."""
        command = [flower_command("flwr"), *arguments]
        try:
            done = subprocess.run(
                command,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"flwr {arguments[0]}: no answer within {COMMAND_SECONDS:g} s"
        return done.stdout + done.stderr

    def run(self, app: Path, run_config: Mapping[str, Any], *options: str) -> str:
        """Submit the app and return the id of the run. Raises `FederationError`."""
        config = " ".join(f"{key}={toml_value(value)}" for key, value in run_config.items())
        output = self.flwr("run", str(app), *options, "-c", config)
        found = re.search(r"started run (\d+)", output)
        if found is None:
            raise FederationError(f"flwr run: not started: {last_line(output)}")
        return found.group(1)

    def status(self, run_id: str) -> str:
        """Return the status of a run, such as running or finished:completed; else unknown."""
        output = self.flwr("list", "--run-id", run_id, "--format", "json")
        try:
            return str(json.loads(output[output.index("{") :])["runs"][0]["status"])
        except (ValueError, KeyError, IndexError, TypeError):
            return "unknown"

    def failure(self, run_id: str, status: str) -> FedloraError:
        """Return the error that ended a run."""
        return run_failure(self.flwr("log", run_id, "--show"), status, self.what)


def wait_for_run(
    commands: FlowerCommands,
    run_id: str,
    out: Path,
    rounds: int,
    *,
    end: float,
    alive: Callable[[], None],
    on_round: Callable[[RoundRecord], None] | None = None,
    last_file: str | None = None,
) -> None:
    """Report the rounds that are written to `out`, and return when the run is completed.

    The status is asked often once the run has written all that it writes: `rounds` rounds and then
    the file `last_file`, new or anew. Before that it is asked ever more rarely. end: of
    `time.monotonic`. alive: is called at every look, and raises when there is no use in waiting.

    Raises the run's own error if it failed with one of ours, `RunError` with the last line of its
    log for any other, and `FederationError` when the time is up.
    """
    seen = len(read_rounds(out))
    before = _written(out, last_file)
    asked, pause = -math.inf, STATUS_SECONDS
    while True:
        records = read_rounds(out)
        for record in records[seen:]:
            if record.status == "failed":  # this may have been one too many
                pause = LAST_SECONDS
            if on_round is not None:
                on_round(record)
        seen = len(records)  # fewer than before where a resumed run dropped what was too new
        done = bool(records) and records[-1].round >= rounds
        done = done and (last_file is None or _written(out, last_file) != before)
        now = time.monotonic()
        if now - asked >= (min(LAST_SECONDS, pause) if done else pause):
            asked, pause = now, min(LONGEST_STATUS_SECONDS, 1.5 * pause)
            status = commands.status(run_id)
            if status == "finished:completed":
                for record in read_rounds(out)[seen:]:
                    if on_round is not None:
                        on_round(record)
                return
            if status.startswith("finished"):
                raise commands.failure(run_id, status)
        alive()
        if time.monotonic() > end:
            raise FederationError(f"{commands.what} did not end in time; the run can be resumed")
        time.sleep(POLL_SECONDS)


def _written(out: Path, name: str | None) -> int | None:
    """Return when a file of the run was written, by its own clock; None: it is not there."""
    try:
        return None if name is None else (out / name).stat().st_mtime_ns
    except OSError:
        return None


def run_failure(log: str, status: str, what: str) -> FedloraError:
    """Return the error that ended a run: ours as the ServerApp logged it, else its last line."""
    text = without_colors(log)
    found = re.findall(r"fedlora-error (\w+): (.*)", text)
    if found:
        name, message = found[-1]
        kind = getattr(errors, name, FederationError)
        if kind is MissingExtraError or not issubclass(kind, FedloraError):
            kind = FederationError
        return kind(one_line(message, 1000))
    raised = re.findall(r"^[\w.]+(?:Error|Exception|Exit)\b.*", text, re.MULTILINE)
    said = [line for line in text.splitlines() if "logstream" not in line]
    reason = one_line(raised[-1]) if raised else last_line("\n".join(said))
    return RunError(f"{what} is {status}: {reason}")


def stage_app(app: Path, config: ExperimentConfig, folder: Path) -> Path:
    """Copy the app and the resolved experiment into a folder that `flwr build` accepts.

    Only what is code goes along: keys, units and notes beside the server's app stay where they are.
    """
    ignored = shutil.ignore_patterns("__pycache__", "deploy")
    for name in ("clients", "server"):
        shutil.copytree(app / name, folder / name, ignore=ignored)
    shutil.copy(app / "pyproject.toml", folder)
    (folder / "simulations").mkdir()
    (folder / "simulations" / "experiment.toml").write_text(config.to_toml(), encoding="utf-8")
    return folder


def free_port() -> int:
    """Return a port of the loopback that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def toml_value(value: bool | int | float | str) -> str:
    """Return a scalar as Flower's key=value arguments want it."""
    if isinstance(value, bool):
        return str(value).lower()
    return toml_string(value) if isinstance(value, str) else repr(value)


def toml_string(text: str) -> str:
    r"""Return a TOML string that holds no double quote inside, which Flower's splitting needs.

    >>> print(toml_string('my "new" phone'))
    "my \u0022new\u0022 phone"
    """
    quoted = json.dumps(text, ensure_ascii=False)[1:-1].replace("\x7f", "\\u007f")
    return '"' + quoted.replace('\\"', "\\u0022") + '"'


def last_line(text: str) -> str:
    """Return the last line that says something."""
    lines = [line for line in without_colors(text).splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else "nothing was printed"


def without_colors(text: str) -> str:
    """Return `text` without the terminal's escape sequences."""
    return re.sub(r"\x1b\[[\d;]*m", "", text)
