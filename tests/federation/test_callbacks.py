from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import MissingExtraError
from fedlora.experiment import ExperimentConfig, find_experiment
from fedlora.federation.callbacks import Callbacks, RunCallback
from fedlora.federation.checkpoint import Dropped, RoundRecord
from fedlora.federation.folder import CLIENTS, append_row
from fedlora.federation.tensorboard import TensorBoard

RECORD = RoundRecord(
    1, "updated", ("a", "b"), 0.5, 1.5, 100, 200, (Dropped("b", "late"),), noted={"kept": 0.25}
)
SUMMARY = {"rounds": 2, "metric": "loss", "global": {"mean": 2.5}, "personal": None}


class Heard(RunCallback):
    """Writes down what it hears of."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_round(self, record: RoundRecord) -> None:
        self.calls.append(f"round {record.round}")

    def on_client(self, row: Mapping[str, Any]) -> None:
        self.calls.append(f"client {row['client']}")

    def on_end(self, summary: Mapping[str, Any] | None) -> None:
        self.calls.append("end" if summary is None else f"end {summary['rounds']}")


class Broken(RunCallback):
    """A tracker that is away."""

    def on_round(self, record: RoundRecord) -> None:
        raise ConnectionError("the tracker is away")


@pytest.fixture
def config() -> ExperimentConfig:
    return ExperimentConfig.from_toml(find_experiment("watch"))


def test_a_callback_that_fails_is_named_once_and_the_others_hear_all(
    config: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    heard = Heard()
    all_of_them = Callbacks([Broken(), heard])
    all_of_them.on_start(Path("run"), config, 0)
    for _ in range(3):
        all_of_them.on_round(RECORD)
    all_of_them.on_client({"client": "a"})
    all_of_them.on_end(SUMMARY)
    assert heard.calls == ["round 1"] * 3 + ["client a", "end 2"]
    assert [record.getMessage() for record in caplog.records] == [
        "callback Broken.on_round failed, the run goes on: ConnectionError: the tracker is away"
    ]


def test_an_interrupt_is_no_failure_of_a_callback(config: ExperimentConfig) -> None:
    class Interrupted(RunCallback):
        def on_round(self, record: RoundRecord) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Callbacks([Interrupted()]).on_round(RECORD)


def test_the_end_is_told_once_and_only_after_a_start(config: ExperimentConfig) -> None:
    heard = Heard()
    found = Callbacks([heard])
    found.on_end(None)
    assert heard.calls == []
    found.on_start(Path("run"), config, 0)
    found.on_end(None)
    found.on_end(None)
    assert heard.calls == ["end"]


def test_tensorboard_has_the_rounds_and_the_results(
    config: ExperimentConfig, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboardX")
    board = TensorBoard()
    board.on_start(tmp_path, config, 0)
    board.on_round(RECORD)
    # None of these is told: a part of the run that was killed may have written them all.
    for row in (
        {"client": "a", "held_out": False, "scores": {"global": {"loss": 2.5}}},
        {"client": "b", "held_out": True, "scores": {"global": {"loss": 9.0}}},
        {"client": "c", "held_out": False, "failed": "no"},
    ):
        append_row(tmp_path / CLIENTS, row)
    board.on_end(SUMMARY)
    scalars, others = _written(tmp_path / "tensorboard")
    assert scalars == {
        ("round/loss", 1): 0.5,
        ("round/seconds", 1): 1.5,
        ("round/asked", 1): 2,
        ("round/counted", 1): 1,
        ("bytes/up", 1): 100,
        ("bytes/down", 1): 200,
        ("noted/kept", 1): 0.25,
        ("global/mean", 2): 2.5,
    }
    assert others["clients/global_loss", 2].histo.num == 1
    assert "watch-cnn" in str(others["experiment/text_summary", 0].tensor)


def test_without_tensorboardx_there_is_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fedlora\[tracking\]'"):
        TensorBoard()


def _written(folder: Path) -> tuple[dict[tuple[str, int], float], dict[tuple[str, int], Any]]:
    """Read the only event file of a folder: scalars and others, by tag and step."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.iterdir()
    data, scalars, others = path.read_bytes(), {}, {}
    while data:  # length, its checksum, that many bytes, their checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            found = value.simple_value if kind == "simple_value" else value
            (scalars if kind == "simple_value" else others)[value.tag, event.step] = found
    return scalars, others
