from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import fedlora.report
from fedlora.errors import ConfigError
from fedlora.experiment import ExperimentConfig
from fedlora.federation import RoundRecord
from fedlora.report import report_at_end  # the real one, where the tests' settings have put a stub
from fedlora.simulation import RunCallback, simulate

SHORT = {
    "data.clients": 3,
    "federation.cohort": 2,
    "federation.local_steps": 1,
    "federation.rounds": 2,
    "personalization.steps": 1,
}


class Heard(RunCallback):
    """Writes down what it hears of; its rounds fail once they are written down."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_start(self, folder: Path, config: ExperimentConfig, rounds_done: int) -> None:
        self.calls.append(("start", folder.name, config.federation.rounds, rounds_done))

    def on_round(self, record: RoundRecord) -> None:
        self.calls.append(("round", record.round, record.loss))
        raise RuntimeError("away")

    def on_client(self, row: Mapping[str, Any]) -> None:
        self.calls.append(("client", row["client"], row["scores"]["global"]["loss"]))

    def on_end(self, summary: Mapping[str, Any] | None) -> None:
        self.calls.append(("end", summary))


def test_a_callback_hears_of_all_that_is_written_and_cannot_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(fedlora.report, "report_at_end", report_at_end)
    heard, out = Heard(), tmp_path / "run"
    run = simulate("watch", overrides=SHORT, out=out, callbacks=[heard])
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert heard.calls == [
        ("start", "run", 2, 0),
        *(("round", line["round"], line["loss"]) for line in lines),
        *(("client", row["client"], row["scores"]["global"]["loss"]) for row in run.clients),
        ("end", run.summary),
    ]
    assert "callback Heard.on_round failed, the run goes on: RuntimeError: away" in caplog.text
    assert (out / "report.html").is_file()

    (out / "report.html").unlink()
    resumed = Heard()
    simulate(resume=out, callbacks=[resumed], report=False)  # it is done: nothing happens
    assert resumed.calls == []
    assert not (out / "report.html").exists()


def test_a_run_that_fails_tells_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConfigError("no")

    module = sys.modules[simulate.__module__]  # its name is also that of the function
    monkeypatch.setattr(module, "run_rounds", fail)
    heard = Heard()
    with pytest.raises(ConfigError):
        simulate("watch", overrides=SHORT, out=tmp_path / "run", callbacks=[heard])
    assert heard.calls == [("start", "run", 2, 0), ("end", None)]
