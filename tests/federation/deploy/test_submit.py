"""Submitting: a new run, one that still goes on, one that was lost, one that fails."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import ConfigError, FedloraError, RunError
from fedlora.experiment import ExperimentConfig
from fedlora.federation import flower_commands
from fedlora.federation.deploy import submit as module
from fedlora.federation.deploy.folder import Federation, Link
from fedlora.federation.deploy.processes import Process
from fedlora.federation.deploy.submit import Submission, claim_run, submit
from tests.federation.deploy.test_local import CONFIG
from tests.matching import raises


@dataclass
class Scripted:
    """A SuperLink's side: what it says of each run, one status after the other."""

    statuses: dict[str, list[str]]
    error: FedloraError = field(default_factory=lambda: RunError("the run is finished:failed: x"))
    what: str = "the run"
    asked: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    staged: ExperimentConfig | None = None

    def run(self, app: Path, run_config: dict[str, Any]) -> str:
        self.asked.append("run")
        self.settings = run_config
        self.staged = ExperimentConfig.from_toml(app / "simulations" / "experiment.toml")
        return "new"

    def status(self, run_id: str) -> str:
        found = self.statuses[run_id]
        return found.pop(0) if len(found) > 1 else found[0]

    def failure(self, run_id: str, status: str) -> FedloraError:
        return self.error

    def flwr(self, *arguments: str) -> str:
        self.asked.append(" ".join(arguments))
        return ""


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    monkeypatch.setattr(flower_commands, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(flower_commands, "STATUS_SECONDS", 0.0)
    monkeypatch.setattr(module.processes, "is_running", lambda process: True)
    monkeypatch.setattr(module, "result", lambda run_id, out: {"run_id": run_id})
    found = Federation(tmp_path, link=Link("127.0.0.1", 1, Process(7, "100", "x/link")))
    found.save()
    claim_run(found.out, CONFIG)
    return found


def run(
    federation: Federation, link: Scripted, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, list[str]]:
    monkeypatch.setattr(module, "link_commands", lambda federation: link)
    said: list[str] = []
    done = submit(federation, Submission(CONFIG, federation.out, 3), say=said.append)
    return done["run_id"], said


def submitted(federation: Federation, started: str) -> None:
    table = {"run_id": "old", "link": f"7 {started}"}
    (federation.out / "submitted.json").write_text(json.dumps(table))


def test_a_new_run_is_submitted_and_waited_for(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Scripted({"new": ["pending", "running", "finished:completed"]})
    assert run(federation, link, monkeypatch) == ("new", [])
    assert link.settings == {
        "experiment": "simulations/experiment.toml", "out": str(federation.out), "min-clients": 3,
    }  # fmt: skip
    assert link.staged == CONFIG
    assert json.loads((federation.out / "submitted.json").read_text())["run_id"] == "new"


def test_a_run_that_goes_on_is_only_followed(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(federation, started="100")
    link = Scripted({"old": ["running", "running", "finished:completed"]})
    told = ["run old still goes on; following it"]
    assert run(federation, link, monkeypatch) == ("old", told)
    assert link.asked == []


def test_a_run_that_is_over_is_not_followed(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(federation, started="100")
    link = Scripted({"old": ["finished:failed"], "new": ["finished:completed"]})
    assert run(federation, link, monkeypatch) == ("new", [])


def test_a_run_of_a_superlink_before_is_stopped_and_begun_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(federation, started="99")
    link = Scripted({"old": ["running"], "new": ["finished:completed"]})
    assert run(federation, link, monkeypatch) == ("new", ["run old ended with its SuperLink"])
    assert link.asked == ["stop old", "run"]


def test_a_followed_run_whose_server_was_killed_is_begun_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(federation, started="100")
    link = Scripted({"old": ["running", "finished:failed"], "new": ["finished:completed"]})
    run_id, told = run(federation, link, monkeypatch)
    assert run_id == "new"
    assert told[1] == "run old has failed (the run is finished:failed: x); beginning another one"


def test_a_failed_run_raises_its_own_error(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ConfigError("federation.cohort: expected at most 3, found 4")
    link = Scripted({"new": ["running", "finished:failed"]}, error)
    with raises(ConfigError, "federation.cohort: expected at most 3, found 4"):
        run(federation, link, monkeypatch)


def test_a_superlink_that_goes_away_is_not_waited_for(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.processes, "is_running", lambda process: False)
    monkeypatch.setattr(module, "LINK_SECONDS", 0.0)
    text = f"go on with: fedlora federation submit --resume {federation.out}"
    with pytest.raises(FedloraError, match="the SuperLink ended in the middle") as caught:
        run(federation, Scripted({"new": ["running"]}), monkeypatch)
    assert text in str(caught.value)
