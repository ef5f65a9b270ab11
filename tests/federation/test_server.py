"""Meeting the clients: who is asked, who is left out, and when a run does not start."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedlora.errors import ConfigError, FederationError
from fedlora.federation import read_checkpoint, run_federation
from fedlora.simulation.grid import InProcessGrid
from tests.federation.fakes import (
    FakeTrainer,
    FaultyGrid,
    experiment,
    fake_app,
    raises,
    run,
    start_adapter,
)


def test_the_population_is_sorted_and_knows_what_the_clients_said(tmp_path: Path) -> None:
    trainers = {0: FakeTrainer(0, 5, 4, "zoe"), 1: FakeTrainer(1, 6, None, "amy")}
    run(experiment(federation__cohort=2), tmp_path, trainers, clients=2)
    clients = read_checkpoint(tmp_path).clients
    assert [(c.client_id, c.rank, c.num_examples) for c in clients] == [
        ("amy", None, 6),
        ("zoe", 4, 5),
    ]


def test_two_devices_with_one_id_are_told_apart(tmp_path: Path) -> None:
    trainers = {0: FakeTrainer(0, 5, None, "amy"), 1: FakeTrainer(1, 6, None, "amy")}
    run(experiment(federation__cohort=1), tmp_path, trainers, clients=2)
    checkpoint = read_checkpoint(tmp_path)
    assert [c.client_id for c in checkpoint.clients] == ["amy"]
    assert [(d.client, d.reason) for d in checkpoint.left_out] == [
        (
            "node 1001",
            "node 1001: client id 'amy' is already taken by node 1000; give each device its own",
        )
    ]


def _only_query(client: str, change: Any) -> Any:
    def fault(reply: Message, who: str) -> list[Message]:
        mine = who == client and reply.metadata.message_type == "query"
        return change(reply) if mine else [reply]

    return fault


def _says(record: dict[str, Any]) -> Any:
    def change(reply: Message) -> list[Message]:
        reply.content = RecordDict({"client": ConfigRecord(record)})
        return [reply]

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda reply: [], "no answer in time"),
        (_says({"client_id": "c3"}), "node 1003: expected num-examples, found none"),
        (_says({"client_id": 3}), "node 1003: client_id: expected a text, found 3"),
        (
            _says({"client_id": "c3", "num_examples": -50}),
            "node 1003: client 'c3': expected num-examples >= 1, found -50",
        ),
        (
            _says({"client_id/" + "/".join("a" * 100_000): 1}),
            "node 1003: an answer that cannot be read (RecursionError)",
        ),
        (
            _says({"client_id": "c3", "num_examples": 5, "age": 44}),
            "node 1003: age: unknown key; known: client_id, codecs, num_examples, rank, remembers",
        ),
    ],
)
def test_a_client_without_a_proper_answer_is_left_out(
    change: Any, reason: str, tmp_path: Path
) -> None:
    grid = FaultyGrid(_only_query("c3", change))
    run(experiment(federation__cohort=8), tmp_path, grid=grid)
    checkpoint = read_checkpoint(tmp_path)
    assert [(d.client, d.reason) for d in checkpoint.left_out] == [("node 1003", reason)]
    assert len(checkpoint.clients) == 7


def test_a_cohort_larger_than_the_population_is_refused(tmp_path: Path) -> None:
    with raises(
        ConfigError,
        "federation.cohort: expected at most 6, the clients that are not held out, found 7",
    ):
        run(experiment(federation__cohort=7, data__held_out_clients=0.25), tmp_path)


def test_without_any_answer_the_run_ends_with_the_first_reason(tmp_path: Path) -> None:
    class Broken(FakeTrainer):
        @property
        def num_examples(self) -> int:  # type: ignore[override]
            raise ConfigError("node config data: no such file")

        @num_examples.setter
        def num_examples(self, value: int) -> None:
            pass

    with raises(
        FederationError,
        "none of 2 clients can take part: node 1000: ConfigError: node config data: no such file",
    ):
        run(experiment(), tmp_path, {0: Broken(0), 1: Broken(1)}, clients=2)


def test_the_run_waits_for_its_clients_and_says_how_many_came(tmp_path: Path) -> None:
    config = experiment(federation__cohort=2)
    started = time.monotonic()
    with raises(
        FederationError,
        "expected at least 3 connected clients within 0.2 s, found 2; start them, or lower "
        "min-clients",
    ):
        run_federation(
            InProcessGrid(fake_app(), 2),
            config,
            tmp_path,
            initial=start_adapter(config),
            min_clients=3,
            timeout=0.2,
        )
    assert time.monotonic() - started < 2


def test_a_client_that_is_gone_after_a_resume_is_dropped_when_drawn(tmp_path: Path) -> None:
    run(experiment(federation__rounds=1, federation__cohort=8), tmp_path)
    config = experiment(federation__rounds=2, federation__cohort=8)
    _, (record,) = run(config, tmp_path, clients=7)
    assert record.cohort == tuple(f"c{i}" for i in range(8))
    assert [(d.client, d.reason) for d in record.dropped] == [("c7", "not connected")]


def test_a_new_client_does_not_change_the_cohorts_of_a_resumed_run(tmp_path: Path) -> None:
    run(experiment(federation__rounds=1), tmp_path / "a")
    _, resumed = run(experiment(federation__rounds=4), tmp_path / "a", clients=12)
    _, whole = run(experiment(federation__rounds=4), tmp_path / "b")
    assert [record.cohort for record in resumed] == [record.cohort for record in whole[1:]]
