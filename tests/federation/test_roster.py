"""Clients that come, go and return while a run goes on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedlora.federation import ClientRecord, read_checkpoint
from fedlora.federation.checkpoint import Checkpoint
from fedlora.federation.records import ClientAnswer
from fedlora.federation.server import ANSWER_GRACE
from fedlora.federation.strategy import deal_ranks, with_answers
from tests.federation.fakes import FakeTrainer, experiment
from tests.federation.scripted import FIRST, NEVER, Link
from tests.federation.test_quorum import dropped, through

ALL = {"federation__cohort": 4, "federation__rounds": 4}


def asked(link: Link, kind: str = "train") -> list[list[int]]:
    """The clients' numbers that were asked in each round, or the nodes of the queries."""
    rounds: dict[str, list[int]] = {}
    for message in link.pushed:
        if message.metadata.message_type == kind:
            node = message.metadata.dst_node_id - FIRST
            rounds.setdefault(message.metadata.group_id, []).append(node)
    return list(rounds.values())


def test_a_client_that_is_gone_is_not_asked_and_one_that_returns_is(tmp_path: Path) -> None:
    link = Link(4)
    link.away = lambda node, now: node == FIRST + 2 and 0.5 < now < 2.5  # a second a round
    _, records = through(link, tmp_path, min_clients=1, **ALL)
    assert asked(link) == [[0, 1, 2, 3], [0, 1, 3], [0, 1, 3], [0, 1, 2, 3]]
    lost = [dropped(record) for record in records]
    assert lost == [[], [("c2", "not connected")], [("c2", "not connected")], []]
    # Whoever was away says anew who it is: its data may have changed.
    assert asked(link, "query") == [[0, 1, 2, 3, 2]]


def test_a_client_that_returns_under_another_node_id_is_known_again(tmp_path: Path) -> None:
    link = Link(5, trainers={n: FakeTrainer(n % 4, 10 + n % 4) for n in range(5)})
    link.away = lambda node, now: (node == FIRST and now > 0.5) or (node == FIRST + 4 and now < 0.5)
    _, records = through(link, tmp_path, min_clients=1, **ALL)
    # Asked who it is in the second round, known in the third.
    assert asked(link) == [[0, 1, 2, 3], [1, 2, 3], [4, 1, 2, 3], [4, 1, 2, 3]]
    assert [dropped(r) for r in records] == [[], [("c0", "not connected")], [], []]
    clients = read_checkpoint(tmp_path).clients
    assert [(c.client_id, c.rounds, c.joined) for c in clients] == [
        ("c0", 3, 0), ("c1", 4, 0), ("c2", 4, 0), ("c3", 4, 0),
    ]  # fmt: skip


def test_a_new_client_joins_and_stays_after_a_resume(tmp_path: Path) -> None:
    link = Link(6)
    link.away = lambda node, now: node == FIRST + 5 and now < 0.5
    settings = ALL | {"federation__cohort": 5, "data__held_out_clients": 0.0}
    _, records = through(link, tmp_path, min_clients=1, **settings)
    members = [set(record.cohort) for record in records]
    assert all("c5" not in cohort for cohort in members[:2])
    found = read_checkpoint(tmp_path)
    assert found.clients[5] == ClientRecord(
        "c5", num_examples=15, rounds=sum("c5" in c for c in members), joined=3,
        steps=5 * sum("c5" in c for c in members),
    )  # fmt: skip
    # Resumed, it is drawn as if the run had not stopped.
    again = Link(6)
    settings["federation__rounds"] = 8
    _, more = through(again, tmp_path, min_clients=6, **settings)
    whole = Link(6)
    whole.away = link.away
    _, at_once = through(whole, tmp_path / "whole", min_clients=1, **settings)
    assert [r.cohort for r in records + more] == [r.cohort for r in at_once]
    assert any("c5" in record.cohort for record in more)


def test_who_answers_after_the_start_joins_and_a_run_does_not_wait_an_hour(
    tmp_path: Path,
) -> None:
    def script(number: int, reply: Message) -> tuple[float, list[Message]]:
        slow = number == 3 and reply.metadata.message_type == "query"
        return (ANSWER_GRACE + 0.5 if slow else -1), [reply]

    link = Link(4, script=script)
    _, records = through(link, tmp_path, min_clients=3, **ALL)
    assert asked(link)[0] == [0, 1, 2]
    assert [len(r.cohort) for r in records] == [3, 4, 4, 4]
    assert link.now == pytest.approx(ANSWER_GRACE + 4, abs=2.0)
    checkpoint = read_checkpoint(tmp_path)
    assert [d.reason for d in checkpoint.left_out] == ["no answer in time"]
    assert [c.joined for c in checkpoint.clients] == [0, 0, 0, 2]


def test_a_client_that_never_answers_stops_nothing(tmp_path: Path) -> None:
    def script(number: int, reply: Message) -> tuple[float, list[Message]]:
        silent = number == 3 and reply.metadata.message_type == "query"
        return (NEVER if silent else -1), [reply]

    link = Link(4, script=script)
    _, records = through(link, tmp_path, min_clients=1, **ALL)
    assert [len(record.cohort) for record in records] == [3, 3, 3, 3]
    assert link.now < ANSWER_GRACE + 6
    assert asked(link, "query") == [[0, 1, 2, 3]]


def test_two_nodes_with_one_client_id_are_told_and_the_first_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    link = Link(5, trainers={4: FakeTrainer(0, 10)})
    link.away = lambda node, now: node == FIRST + 4 and now < 0.5
    with caplog.at_level(logging.WARNING, logger="fedlora"):
        through(link, tmp_path, min_clients=1, **ALL)
    assert asked(link) == [[0, 1, 2, 3]] * 4
    taken = "node 1004: client id 'c0' is already taken by node 1000; give each device its own"
    assert [r.getMessage() for r in caplog.records].count(taken) == 1


def test_a_new_client_with_a_wrong_answer_stays_outside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def script(number: int, reply: Message) -> tuple[float, list[Message]]:
        if number == 4 and reply.metadata.message_type == "query":
            del reply.content["client"]["num_examples"]
        return -1, [reply]

    link = Link(5, script=script)
    link.away = lambda node, now: node == FIRST + 4 and now < 0.5
    with caplog.at_level(logging.WARNING, logger="fedlora"):
        _, records = through(link, tmp_path, min_clients=1, **ALL)
    assert [len(record.cohort) for record in records] == [4, 4, 4, 4]
    assert len(read_checkpoint(tmp_path).clients) == 4
    reason = "left out node 1004: node 1004: expected num-examples, found none"
    assert reason in [record.getMessage() for record in caplog.records]
    assert asked(link, "query") == [[0, 1, 2, 3, 4]]  # not again while it stays


def test_a_round_waits_until_enough_are_back_but_not_for_ever(tmp_path: Path) -> None:
    link = Link(4)
    link.away = lambda node, now: node > FIRST and 0.5 < now < 40.0
    _, records = through(link, tmp_path, min_clients=3, **ALL)
    assert [dropped(record) for record in records] == [[]] * 4
    assert 40.0 <= link.now < 46.0

    other = Link(4)
    other.away = lambda node, now: node > FIRST and now > 0.5
    two = ALL | {"federation__rounds": 2}
    _, records = through(other, tmp_path / "b", min_clients=3, timeout=7.0, **two)
    assert len(dropped(records[1])) == 3
    assert 8.0 <= other.now < 10.0


def test_rounds_do_not_wait_for_a_client_that_was_left_out_at_the_start(tmp_path: Path) -> None:
    def script(number: int, reply: Message) -> tuple[float, list[Message]]:
        if number == 4 and reply.metadata.message_type == "query":
            del reply.content["client"]["num_examples"]
        return -1, [reply]

    link = Link(5, script=script)
    _, records = through(link, tmp_path, min_clients=5, **ALL)
    assert [dropped(record) for record in records] == [[]] * 4
    assert link.now < 6.0


def test_answers_change_nothing_where_they_say_nothing_new() -> None:
    start: Any = None
    clients = (ClientRecord("a", 4, 7, rounds=2, steps=9), ClientRecord("b", held_out=True))
    checkpoint = Checkpoint(start, clients)
    same = {"a": ClientAnswer("a", 4, 7)}
    assert with_answers(checkpoint, same) is checkpoint
    assert with_answers(checkpoint, same | {"c": ClientAnswer("c")}) is checkpoint
    told = with_answers(checkpoint, {"a": ClientAnswer("a", 2, 8)})
    assert told.clients[0] == ClientRecord("a", 2, 8, rounds=2, steps=9)


def test_who_joins_is_not_held_out_but_for_a_copy_of_a_person_who_is() -> None:
    start: Any = None
    clients = (ClientRecord("u1", held_out=True), ClientRecord("u2"))
    answers = {name: ClientAnswer(name) for name in ("u1#2", "u2#2", "u0")}
    found = with_answers(Checkpoint(start, clients), answers, joining=5)
    assert [(c.client_id, c.held_out, c.joined) for c in found.clients] == [
        ("u0", False, 5), ("u1", True, 0), ("u1#2", True, 5), ("u2", False, 0), ("u2#2", False, 5),
    ]  # fmt: skip


def test_a_joiner_takes_nobodys_rank() -> None:
    config = experiment(federation__client_ranks=(2, 1), lora__rank=2)
    before = [ClientRecord("b"), ClientRecord("d"), ClientRecord("e")]
    ranks = deal_ranks(before, config)
    after = deal_ranks([*before, ClientRecord("a", joined=3), ClientRecord("c", joined=2)], config)
    assert after == ranks | {"c": 1, "a": 2}
