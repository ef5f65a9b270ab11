"""Flower's commands: what they are given, what they print, and when a run has ended."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import ConfigError, FederationError, FedloraError, MissingExtraError, RunError
from fedlora.experiment import ExperimentConfig, app_root
from fedlora.federation import RoundRecord, flower_commands
from fedlora.federation.checkpoint import append_round
from fedlora.federation.flower_commands import (
    OFFLINE,
    FlowerCommands,
    flower_command,
    flower_environment,
    last_line,
    run_failure,
    stage_app,
    wait_for_run,
    write_connection,
)
from tests.matching import raises

TABLE: dict[str, Any] = {
    "name": "watch",
    "base": {"id": "watch-cnn"},
    "data": {"id": "watch", "task": "classification", "clients": 3},
    "federation": {"rounds": 2, "cohort": 2, "local_steps": 4, "batch_size": 8},
}


def test_every_process_is_offline_and_finds_our_packages(tmp_path: Path) -> None:
    found = flower_environment(tmp_path, more={"X": "y"})
    assert found.items() >= OFFLINE.items()
    assert (found["FLWR_HOME"], found["X"]) == (str(tmp_path), "y")
    assert found["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert set(filter(None, sys.path)) <= set(found["PYTHONPATH"].split(os.pathsep))


def test_another_environment_gets_none_of_our_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    found = flower_environment(tmp_path, tmp_path / "venv" / "bin" / "python")
    assert "PYTHONPATH" not in found
    assert found["PATH"].split(os.pathsep)[0] == str(tmp_path / "venv" / "bin")
    with raises(MissingExtraError, "flower-supernode", "pip install 'fedlora[client]'"):
        flower_command("flower-supernode", "client", tmp_path / "venv" / "bin" / "python")


@pytest.mark.parametrize("ca", [None, Path('/my "certs"/ca.crt')])
def test_flower_reads_the_connection(ca: Path | None, tmp_path: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    write_connection(tmp_path / "home", "127.0.0.1:1", ca)
    table = tomllib.loads((tmp_path / "home" / "config.toml").read_text())["superlink"]
    security = {"insecure": True} if ca is None else {"root-certificates": str(ca)}
    assert table == {"default": "own", "own": {"address": "127.0.0.1:1"} | security}


class Scripted(FlowerCommands):
    """Says one status after the other, and what a failed run logged."""

    __slots__ = ("statuses",)

    def flwr(self, *arguments: str) -> str:
        if arguments[0] == "log":
            return "fedlora-error ConfigError: data.id: unknown"
        status = self.environment["statuses"].pop(0)  # type: ignore[attr-defined]
        return "Loading…\n" + json.dumps({"success": True, "runs": [{"status": status}]})


def scripted(*statuses: str) -> FlowerCommands:
    table: Mapping[str, Any] = {"statuses": list(statuses)}
    return Scripted(table, "the run")


def test_the_end_of_a_run_is_what_the_list_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_commands, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(flower_commands, "STATUS_SECONDS", 0.0)
    records = [RoundRecord(number, "updated", ("a",), 0.5, 1.0, 1, 1) for number in (1, 2, 3)]
    append_round(tmp_path, records[0])  # of before: no news
    looks = 0

    def alive() -> None:
        nonlocal looks
        looks += 1
        if looks in (1, 2):
            append_round(tmp_path, records[looks])

    seen: list[RoundRecord] = []
    end = time.monotonic() + 60
    commands = scripted("pending", "running", "finished:completed")
    wait_for_run(commands, "7", tmp_path, 3, end=end, alive=alive, on_round=seen.append)
    assert seen == records[1:]
    assert looks == 2

    def check(error: type[FedloraError], text: str, *statuses: str, end: float = end) -> None:
        with raises(error, text):
            wait_for_run(scripted(*statuses), "7", tmp_path, 3, end=end, alive=lambda: None)

    check(ConfigError, "data.id: unknown", "running", "finished:failed")
    check(FederationError, "the run did not end in time; the run can be resumed", "running", end=0)


@pytest.mark.parametrize("left_over", [False, True])
def test_the_status_is_asked_rarely_until_the_last_file_is_written(
    left_over: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question costs over a second of a processor, which devices of one host share."""
    last = tmp_path / "summary.json"
    if left_over:  # of the same run, before it was resumed
        last.write_text("{}")
    append_round(tmp_path, RoundRecord(3, "updated", ("a",), 0.5, 1.0, 1, 1))
    now, asked = 1000.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if now == 1200.0:
            last.unlink(missing_ok=True)
            last.write_text('{"name": "watch"}')

    class Asked(Scripted):
        __slots__ = ()

        def flwr(self, *arguments: str) -> str:
            asked.append(now - 1000)
            return super().flwr(*arguments)

    monkeypatch.setattr(flower_commands.time, "monotonic", lambda: now)
    monkeypatch.setattr(flower_commands.time, "sleep", sleep)
    words = ["running"] * 11 + ["finished:completed"]
    wait_for_run(
        Asked({"statuses": words}, "the run"), "7", tmp_path, 3, end=2000.0, alive=lambda: None,
        last_file=last.name,
    )  # fmt: skip
    assert asked == [0, 15, 37.5, 67.5, 97.5, 127.5, 157.5, 187.5, 200, 202, 204, 206]


def test_after_a_failed_round_the_status_is_asked_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, asked = 1000.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if now == 1040.0:
            append_round(tmp_path, RoundRecord(1, "failed", ("a",), None, 1.0, 1, 1))

    class Asked(Scripted):
        __slots__ = ()

        def flwr(self, *arguments: str) -> str:
            asked.append(now - 1000)
            return super().flwr(*arguments)

    monkeypatch.setattr(flower_commands.time, "monotonic", lambda: now)
    monkeypatch.setattr(flower_commands.time, "sleep", sleep)
    commands = Asked({"statuses": ["running"] * 4 + ["finished:failed"]}, "the run")
    with raises(ConfigError, "data.id: unknown"):
        wait_for_run(commands, "7", tmp_path, 3, end=2000.0, alive=lambda: None)
    # Every 15 s and more, then at once, and 3 s later; the last one is that of its log.
    assert asked == [0, 15, 37.5, 40, 43, 43]


def test_a_status_that_cannot_be_read_is_unknown() -> None:
    class Broken(FlowerCommands):
        def flwr(self, *arguments: str) -> str:
            return "connection refused"

    broken = Broken({}, "the run")
    assert broken.status("7") == "unknown"
    with raises(FederationError, "flwr run: not started: connection refused"):
        broken.run(Path("app"), {"out": "x"})


def test_the_staged_app_holds_both_apps_and_the_resolved_experiment(tmp_path: Path) -> None:
    config = ExperimentConfig.from_table(TABLE)
    folder = stage_app(app_root(), config, tmp_path / "fedlora-app")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"clients/app.py", "server/app.py", "pyproject.toml"} <= files
    assert not any("__pycache__" in name for name in files)
    assert ExperimentConfig.from_toml(folder / "simulations/experiment.toml") == config
    shutil.rmtree(folder)


TRACE = "Traceback (most recent call last):\n  File 'x.py', line 3\n"
LOGS = {
    "one of ours": (
        "INFO: start\n\x1b[91mERROR\x1b[0m: fedlora-error ConfigError: data.id: unknown\n"
        + TRACE
        + "fedlora.errors.ConfigError: data.id: unknown\nINFO: end\n",
        ConfigError,
        "data.id: unknown",
    ),
    "one whose name we do not know": (
        "fedlora-error NewError: something\n", FederationError, "something",
    ),
    "any other": (
        TRACE + "KeyError: 'x'\n\n\x1b[91mERROR\x1b[0m: Exit Code: 200\n",
        RunError,
        "Flower's simulation is finished:failed: KeyError: 'x'",
    ),
    "none at all": (
        "INFO: start\n\n", RunError, "Flower's simulation is finished:failed: INFO: start",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOGS)
def test_the_reason_is_taken_from_the_log(name: str) -> None:
    log, kind, text = LOGS[name]
    error = run_failure(log, "finished:failed", "Flower's simulation")
    assert type(error) is kind
    assert str(error) == text


def test_an_empty_log_has_a_last_line_too() -> None:
    assert last_line("\n\x1b[0m\n") == "nothing was printed"
