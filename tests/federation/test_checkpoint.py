"""A run that is stopped anywhere goes on bit for bit, or is refused with the reason."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.aggregation import ServerState
from fedlora.errors import ConfigError, DigestMismatchError, RunError
from fedlora.federation import (
    Checkpoint,
    ClientRecord,
    Dropped,
    RoundRecord,
    has_checkpoint,
    read_checkpoint,
    read_rounds,
)
from fedlora.federation.checkpoint import append_round, resume_run, write_checkpoint
from fedlora.training import TrainResult
from tests.federation.fakes import FakeTrainer, experiment, raises, run, run_slowly, start_adapter
from tests.forked import start

SIX = experiment(federation__rounds=6, data__held_out_clients=0.25)


def without_time(out: Path) -> tuple[Any, list[RoundRecord]]:
    """Everything of a run's files but how long it took."""
    checkpoint = replace(read_checkpoint(out), seconds=0.0)
    table = {
        "adapter": checkpoint.state.adapter.fingerprint(),
        "base": checkpoint.state.adapter.base,
        "round": checkpoint.state.round,
        "clients": checkpoint.clients,
        "bytes": (checkpoint.bytes_up, checkpoint.bytes_down),
    }
    rounds = [replace(record, seconds=0.0, phases={}, clients={}) for record in read_rounds(out)]
    return table, rounds


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The files of six rounds in one go."""
    out = tmp_path_factory.mktemp("whole")
    run(SIX, out)
    return without_time(out)


def test_six_rounds_equal_three_and_three_bit_for_bit(whole: Any, tmp_path: Path) -> None:
    _, first = run(experiment(federation__rounds=3, data__held_out_clients=0.25), tmp_path)
    _, second = run(SIX, tmp_path)
    assert [record.round for record in first + second] == [1, 2, 3, 4, 5, 6]
    assert without_time(tmp_path) == whole


def test_seconds_add_up_over_a_resume(tmp_path: Path) -> None:
    run(experiment(federation__rounds=3, data__held_out_clients=0.25), tmp_path)
    before = read_checkpoint(tmp_path).seconds
    _, records = run(SIX, tmp_path)
    after = read_checkpoint(tmp_path).seconds
    # rounds.jsonl rounds to microseconds.
    assert after == pytest.approx(before + sum(r.seconds for r in records), abs=1e-5)


def test_a_finished_run_is_resumed_without_a_round(whole: Any, tmp_path: Path) -> None:
    run(SIX, tmp_path)
    _, records = run(SIX, tmp_path)
    assert records == []
    assert without_time(tmp_path) == whole


class Crash(BaseException):
    """The process ends here."""


def test_a_crash_at_any_step_of_writing_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop before the n-th fsync, rename or unlink of a run, for every n, and resume."""
    config = experiment(federation__rounds=2)
    run(config, tmp_path / "whole")
    whole = without_time(tmp_path / "whole")
    count = limit = 0

    def crashing(call: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count >= limit:
                raise Crash
            return call(*args, **options)

        return wrapped

    crashes = 0
    for number in range(1, 400):
        out = tmp_path / str(number)
        count, limit = 0, number
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", crashing(os.fsync))
            patch.setattr(os, "replace", crashing(os.replace))
            patch.setattr(Path, "unlink", crashing(Path.unlink))
            try:
                run(config, out)
            except Crash:
                crashes += 1
            else:
                break
        run(config, out)
        assert without_time(out) == whole, f"crash before step {number}"
    # A round has one line, two files, each with its folder, and one deletion: 8 steps.
    assert crashes == 3 * 8 - 2  # the start has no line, and nothing to delete


def test_a_run_killed_with_sigkill_goes_on_to_the_same_result(whole: Any, tmp_path: Path) -> None:
    process = start(run_slowly, SIX, tmp_path)
    end = time.monotonic() + 60
    while time.monotonic() < end and (
        not has_checkpoint(tmp_path) or len(read_rounds(tmp_path)) < 3
    ):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it was over before it could be killed"
    assert 3 <= read_checkpoint(tmp_path).state.round < 6 or len(read_rounds(tmp_path)) == 3
    run(SIX, tmp_path)
    assert without_time(tmp_path) == whole


def test_what_is_newer_than_the_checkpoint_is_dropped_on_resume(whole: Any, tmp_path: Path) -> None:
    _, records = run(experiment(federation__rounds=3, data__held_out_clients=0.25), tmp_path)
    append_round(tmp_path, replace(records[-1], round=4, loss=123.0))
    with open(tmp_path / "rounds.jsonl", "ab") as file:
        file.write(b'{"round": 5, "coho')
    stray = tmp_path / "checkpoint" / "round-000004.safetensors"
    stray.write_bytes(b"half")
    run(SIX, tmp_path)
    assert without_time(tmp_path) == whole
    assert [path.name for path in (tmp_path / "checkpoint").iterdir() if "round" in path.name] == [
        "round-000006.safetensors"
    ]


def test_only_rounds_and_engine_may_change_on_resume(tmp_path: Path) -> None:
    run(experiment(), tmp_path)
    run(experiment(federation__rounds=4, engine__kind="flower"), tmp_path)  # the grid is our own
    run(experiment(federation__rounds=4, quorum__share=0.8, faults__drop=0.1), tmp_path)
    with raises(
        RunError,
        f"{tmp_path}: cannot resume with another experiment: federation.learning_rate (run: "
        "0.001, now: 0.1), lora.rank (run: 2, now: 4), seed (run: 0, now: 1); only "
        "federation.rounds, engine, quorum, faults may change; restore them, or choose another "
        "folder",
    ):
        run(experiment(seed=1, lora__rank=4, federation__learning_rate=0.1), tmp_path)


def test_a_damaged_adapter_is_refused(tmp_path: Path) -> None:
    run(experiment(), tmp_path)
    path = tmp_path / "checkpoint" / "round-000003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DigestMismatchError) as error:
        read_checkpoint(tmp_path)
    assert str(error.value).startswith(f"{path}: expected SHA-256 ")


def test_a_missing_or_foreign_state_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "checkpoint" / "state.json"
    with raises(RunError, f"{state}: no checkpoint to resume from: No such file or directory"):
        resume_run(tmp_path, experiment())
    run(experiment(), tmp_path)
    document = json.loads(state.read_text())
    state.write_text(json.dumps(document | {"version": 2}))
    with raises(RunError, f"{state}: expected a checkpoint of version 1"):
        read_checkpoint(tmp_path)
    del document["clients"]
    state.write_text(json.dumps(document))
    with raises(RunError, f"{state}: not a checkpoint of this version: KeyError('clients')"):
        read_checkpoint(tmp_path)


def test_a_bad_line_in_the_middle_of_the_rounds_is_refused(tmp_path: Path) -> None:
    run(experiment(), tmp_path)
    path = tmp_path / "rounds.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{}\n" + lines[2])
    with raises(
        RunError,
        f"{path}, line 2: not a round's record: round: this key is needed and is missing",
    ):
        read_rounds(tmp_path)


NOTED: dict[str, dict[str, Any]] = {
    "flora": {"energy": 0.5}, "fedex-lora": {"rank": 1}, "flexlora": {}, "fedit": {},
}  # fmt: skip


@pytest.mark.parametrize("name", NOTED)
def test_a_rounds_line_says_what_its_recompression_left_out(name: str, tmp_path: Path) -> None:
    config = experiment(federation__method=name, federation__method_options=NOTED[name])
    state, records = run(config, tmp_path)
    assert read_rounds(tmp_path) == records
    if name == "fedit":
        assert [record.noted for record in records] == [{}, {}, {}]
        return
    assert all(0 < record.noted["discarded_energy"] < 1 for record in records)
    worst = max(state.method_state["discarded-energy"])  # of the last round's layers
    assert records[-1].noted == {"discarded_energy": worst}


def test_a_round_that_failed_says_nothing_of_the_one_before(tmp_path: Path) -> None:
    def change(result: TrainResult, round: int) -> TrainResult:
        if round == 2:
            raise ValueError("broken")
        return result

    trainers = {i: FakeTrainer(i, 10 + i, change=change) for i in range(8)}
    _, records = run(experiment(federation__method="flexlora"), tmp_path, trainers)
    assert [bool(record.noted) for record in records] == [True, False, True]


def test_lines_of_before_there_were_notes_are_read(tmp_path: Path) -> None:
    _, records = run(experiment(federation__method="flexlora"), tmp_path)
    path = tmp_path / "rounds.jsonl"
    tables = [json.loads(line) for line in path.read_text().splitlines()]
    for table in tables:
        del table["noted"]
    path.write_text("".join(json.dumps(table) + "\n" for table in tables))
    assert read_rounds(tmp_path) == [replace(record, noted={}) for record in records]


def test_everything_of_a_checkpoint_comes_back(tmp_path: Path) -> None:
    config = experiment()
    adapter = start_adapter(config)
    frozen = adapter.map(lambda layer: replace(layer, A=layer.A * 2))
    moments = {"first/a": np.arange(6, dtype=np.float32).reshape(2, 3), "second": np.float64([0.1])}
    state = replace(ServerState.start(adapter), round=12, frozen=frozen, method_state=moments)
    clients = (ClientRecord("a", 4, 10, False, 3, 15), ClientRecord("b", held_out=True))
    checkpoint = Checkpoint(state, clients, 5, 6, 7.25, 1, (Dropped("node 3", "late"),))
    write_checkpoint(tmp_path, checkpoint, config)
    again = read_checkpoint(tmp_path)
    assert replace(again, state=state) == checkpoint
    assert again.state.trainable == adapter
    assert again.state.trainable.config == adapter.config
    assert again.state.frozen == frozen
    assert again.state.method_state.keys() == moments.keys()
    for name, value in moments.items():
        assert again.state.method_state[name].dtype == value.dtype
        assert np.array_equal(again.state.method_state[name], value)


def test_many_clients_come_back_from_one_line_each(tmp_path: Path) -> None:
    names = [*(f"c{number:05d}" for number in range(5000)), 'quoted "x"\\', "näme ☃", "z{}"]
    clients = tuple(
        ClientRecord(name, number % 3 or None, number or None, number % 2 == 0, number, 2**40)
        for number, name in enumerate(names)
    )
    config = experiment()
    checkpoint = Checkpoint(ServerState.start(start_adapter(config)), clients)
    write_checkpoint(tmp_path, checkpoint, config)
    assert read_checkpoint(tmp_path).clients == clients
    text = (tmp_path / "checkpoint" / "state.json").read_text()
    lines = [line for line in text.splitlines() if line.startswith('  {"client_id": ')]
    assert len(lines) == len(clients)
    assert json.loads(text)["clients"][1] == {
        "client_id": "c00001", "rank": 1, "num_examples": 1, "held_out": False, "rounds": 1,
        "steps": 2**40,
    }  # fmt: skip


def test_no_clients_are_a_list_without_items(tmp_path: Path) -> None:
    config = experiment()
    checkpoint = Checkpoint(ServerState.start(start_adapter(config)), ())
    write_checkpoint(tmp_path, checkpoint, config)
    assert read_checkpoint(tmp_path).clients == ()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rounds": "3"}, "rounds: expected a whole number, found '3'"),
        ({"steps": True}, "steps: expected a whole number, found True"),
        ({"age": 44}, "age: unknown key"),
    ],
)
def test_a_client_of_another_type_in_a_checkpoint_is_refused(
    change: dict[str, Any], text: str, tmp_path: Path
) -> None:
    run(experiment(), tmp_path)
    state = tmp_path / "checkpoint" / "state.json"
    document = json.loads(state.read_text())
    document["clients"][2] |= change
    state.write_text(json.dumps(document))
    with pytest.raises(ConfigError) as error:
        read_checkpoint(tmp_path)
    assert str(error.value).startswith(text)
