"""A device's program: requests are answered while releases come and go."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients.agent import answer, main, open_agent, serve
from fedlora.device.session import Session
from fedlora.errors import ConfigError
from tests.agent.device import Fleet, make_fleet
from tests.device.hand_made import FEATURES, write_language_model
from tests.matching import raises


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    found = make_fleet(tmp_path)
    yield found
    found.web.close()


def test_requests_are_answered_before_and_after_a_release(fleet: Fleet, tmp_path: Path) -> None:
    inputs = fleet.data.train.inputs[:2]
    fleet.publish(0.5)
    (tmp_path / "root.json").write_bytes(fleet.world.root)
    agent = open_agent({
        "FEDLORA_STATE": str(fleet.world.store.path),
        "FEDLORA_OTA_URL": fleet.web.url,
        "FEDLORA_OTA_ROOT": str(tmp_path / "root.json"),
    })  # fmt: skip
    adapter = fleet.adapter(0.5)

    def requests() -> Iterator[str]:
        line = json.dumps({"inputs": inputs.tolist()})
        yield line
        deadline = time.monotonic() + 30
        while agent.session().adapter is None and time.monotonic() < deadline:
            time.sleep(0.01)
        yield line

    out = io.StringIO()
    serve(agent, requests(), out, every=60.0)
    before, after = (json.loads(line)["labels"] for line in out.getvalue().splitlines())
    expected = Session(fleet.made.folder).predict(inputs)
    assert [p for _, p in before] == pytest.approx([one.probability for one in expected], rel=1e-6)
    expected = Session(fleet.made.folder, adapter=adapter).predict(inputs)
    # Released as float32, so the same factors; rel: the number of threads may differ.
    assert [p for _, p in after] == pytest.approx([one.probability for one in expected], rel=1e-6)
    assert before != after


def test_a_keyboard_gets_words(tmp_path: Path) -> None:
    session = Session(write_language_model(tmp_path).folder)
    words = answer(session, '{"text": "the cat "}')["words"]
    assert len(words) == 3
    assert words[0][1] >= words[1][1] >= words[2][1] > 0


@pytest.mark.parametrize("line", ["", "{", "[]", '{"text": "a"}', '{"inputs": "x"}'])
def test_a_bad_request_gets_an_error_and_nothing_ends(fleet: Fleet, line: str) -> None:
    session = Session(fleet.made.folder)
    assert "expected" in answer(session, line)["error"]
    assert "labels" in answer(session, json.dumps({"inputs": [[0.0] * FEATURES]}))


def test_what_is_missing_in_the_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with raises(ConfigError, "expected FEDLORA_OTA_URL in the environment"):
        open_agent({"FEDLORA_STATE": "state"})
    monkeypatch.delenv("FEDLORA_STATE", raising=False)
    assert main() == 2
    assert "FEDLORA_STATE" in capfd.readouterr().err
