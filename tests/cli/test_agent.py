"""fedlora device update|run|revert|log and fedlora ota publish|advance, by commands alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedlora as fl
from fedlora.agent.report import report_bytes
from tests.agent.device import Fleet, make_fleet

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    found = make_fleet(tmp_path)
    root = tmp_path / "1.root.json"
    root.write_bytes(found.world.root)
    np.savez(tmp_path / "own.npz", inputs=found.data.train.inputs, targets=found.data.train.targets)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDLORA_STATE", str(found.world.store.path))
    monkeypatch.setenv("FEDLORA_OTA_URL", found.web.url)
    monkeypatch.setenv("FEDLORA_OTA_ROOT", str(root))
    monkeypatch.setenv("FEDLORA_OTA_REPOSITORY", str(found.world.repository))
    monkeypatch.setenv("FEDLORA_OTA_KEYS", str(found.world.folder / "keys"))
    yield found
    found.web.close()


def test_a_device_is_updated_reverted_and_says_what_happened(run, fleet: Fleet) -> None:
    assert run("device", "update") == (0, "nothing new for this device; serving base\n", "")
    fleet.publish(0.5)
    code, out, err = run("device", "update", "--data", "own.npz", "--slower", "1e6", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["outcome"], found["active"], found["serving"]) == ("committed", 1, "global")
    assert found["health"]["loss_after"] < found["health"]["loss_before"]
    assert "release 1 of stable" in run("device", "status")[1]

    fleet.publish(-0.5)
    code, out, err = run("device", "update", "--data", "own.npz", "--slower", "1e6")
    assert (code, err) == (1, "")
    assert out.startswith("release 2 is rejected: the held-out loss is ")
    assert out.splitlines()[1].startswith("held-out loss of 23 examples: ")
    assert "rejected  release 2" in run("device", "status")[1]

    assert run("device", "revert")[:2] == (0, "release 1 is reverted; serving base\n")
    code, _, err = run("device", "revert")
    assert code == 1
    assert "expected a global adapter to revert, found none" in err
    events = [row["event"] for row in json.loads(run("device", "log", "--json")[1])]
    assert events == ["committed", "rejected", "reverted"]
    assert "release 2" in run("device", "log", "-n", 2)[1].splitlines()[0]
    assert run("device", "update")[1] == "nothing new for this device; serving base\n"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--root", "none.json"), 2, "--root none.json: cannot be read"),
        (("--client", "a"), 2, "--client: expected --data beside it"),
        (("--margin", "-1"), 2, "agent: margin: expected a number of at least 0"),
        (("--report", "nowhere"), 2, "report: expected a URL"),
        (("--url", "http://127.0.0.1:9"), 1, "127.0.0.1:9"),
        (("--state", "none"), 1, "expected a device's state"),
    ],
)
def test_what_cannot_be_is_one_line_and_a_code(
    run, fleet: Fleet, arguments: tuple[str, ...], code: int, text: str
) -> None:
    found, out, err = run("device", "update", *arguments)
    assert (found, out) == (code, "")
    assert text in err
    assert len(err.splitlines()) == 1


def test_a_service_updates_until_it_is_terminated(run, fleet: Fleet) -> None:
    fleet.publish(0.5)
    command = [sys.executable, "-m", "fedlora", "device", "run", "--every", "1", "--json"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert service.stdout is not None
        found = json.loads(service.stdout.readline())
        assert (found["outcome"], found["release"]) == ("committed", 1)
        # It holds the device while it waits for its next turn.
        code, _, err = run("device", "update")
        assert code == 1
        assert "another agent keeps this device up to date already" in err
        fleet.publish(0.9)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            found = json.loads(service.stdout.readline())
            if found["outcome"] != "nothing":
                break
        assert (found["outcome"], found["release"]) == ("committed", 2)
        service.send_signal(signal.SIGTERM)
        assert service.wait(20) == 0
    finally:
        service.kill()
        service.wait()
        if service.stdout is not None:
            service.stdout.close()


def test_a_run_is_published_and_its_rollout_follows_the_reports(
    run, fleet: Fleet, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    fl.save_adapter(fleet.adapter(0.05), folder / "adapter.safetensors", provenance={"round": 9})
    means: dict[str, Any] = {"base": {"mean": 0.5}, "global": {"mean": 0.6}}
    summary = {"metric": "accuracy", "higher_is_better": True, "clients": 4, "held_out": means,
               "extra": {"held_out_clients": 2}, "privacy": None}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    code, out, err = run("ota", "publish", "--run", folder)
    assert (code, err) == (0, "")
    assert out.startswith("gates passed: metric accuracy, people 2 held-out clients, base 0.5")
    assert "release 1 of stable" in out
    fleet.publish(0.5, rollout=1.0)
    code, _, err = run("ota", "publish", "--run", folder, "--gate-rms", 1e-9)
    assert code == 1
    assert "gate norm" in err
    assert run("ota", "publish")[0] == 2

    reports = tmp_path / "reports.jsonl"
    advance = ("ota", "advance", "--reports", reports)
    assert run(*advance)[1] == (
        "release 2 stays at 1 %: 0 of 0 reports are failures, 50 reports are needed\n"
    )
    reports.write_bytes((report_bytes(2, True, "same") + b"\n") * 60)
    assert run(*advance)[1].startswith("release 2 is raised to 10 %: 0 of 60 ")
    with reports.open("ab") as file:
        file.write((report_bytes(2, False, "much-worse") + b"\n") * 10)
    code, out, err = run(*advance, "--json")
    assert code == 1
    found = json.loads(out)
    assert (found["decision"]["action"], found["republished"]["version"]) == ("halt", 3)
    assert found["counts"]["metrics"] == {"same": 60, "much-worse": 10}
    assert run(*advance, "--steps", "x")[0] == 2
    assert json.loads(run("device", "update", "--json")[1])["active"] == 3
