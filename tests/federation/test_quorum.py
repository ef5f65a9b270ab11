"""When a round ends and who counts: stragglers, deadlines, late and double replies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedlora.conditions import QuorumConfig
from fedlora.federation import RoundRecord, read_rounds, run_federation
from fedlora.federation.quorum import CLOCKS_DIFFER, QuorumGrid, Wait
from fedlora.simulation.grid import InProcessGrid
from tests.federation.fakes import experiment, fake_app, run, start_adapter
from tests.federation.scripted import FIRST, NEVER, Link, from_link
from tests.federation.test_strategy import assert_is_mean, expected_mean

ONE = {"federation__cohort": 10, "federation__rounds": 1}
QUORUM = {"quorum__share": 0.8, "quorum__grace": 0.5}


def through(
    link: Link, out: Path, timeout: float = 3600.0, min_clients: int = 10, **overrides: Any
) -> tuple[Any, list[RoundRecord]]:
    """Run a federation over a link; return the state and the rounds."""
    config = experiment(**overrides)
    records: list[RoundRecord] = []
    state = run_federation(
        link.through(config.quorum, config.federation.cohort),
        config,
        out,
        initial=start_adapter(config),
        min_clients=min_clients,
        timeout=timeout,
        on_round=records.append,
    )
    return state, records


def dropped(record: RoundRecord) -> list[tuple[str, str]]:
    return [(lost.client, lost.reason) for lost in record.dropped]


def test_one_straggler_is_waited_for_without_a_quorum_and_not_with_one(tmp_path: Path) -> None:
    plain = Link(delays={9: 8.0})
    state, (record,) = through(plain, tmp_path / "plain", **ONE)
    assert plain.now == pytest.approx(8.0, abs=0.5)  # a look every half a second
    assert record.dropped == ()
    assert_is_mean(state.adapter, expected_mean(experiment(**ONE), list(range(10))))

    link = Link(delays={9: 8.0})
    state, (record,) = through(link, tmp_path / "quorum", **ONE, **QUORUM)
    assert link.now == pytest.approx(1.5, abs=0.5)  # a second, and half a second of grace
    assert dropped(record) == [("c9", "not waited for: the round had its quorum")]
    assert_is_mean(state.adapter, expected_mean(experiment(**ONE), list(range(9))))


def test_grace_is_for_those_who_come_a_little_later(tmp_path: Path) -> None:
    delays = {7: 2.0, 8: 2.9, 9: 4.0}
    for grace, lost in ((0.0, ["c8", "c9"]), (1.5, ["c9"]), (3.0, [])):
        link = Link(delays=delays)
        settings = ONE | {"quorum__share": 0.8, "quorum__grace": grace}
        _, (record,) = through(link, tmp_path / str(grace), **settings)
        assert [client for client, _ in dropped(record)] == lost
        assert 2.0 <= link.now <= 2.0 + 0.5 + grace


def test_the_deadline_ends_a_round_to_the_moment(tmp_path: Path) -> None:
    link = Link(delays={4: NEVER})
    _, (record,) = through(link, tmp_path, **ONE, quorum__deadline=5.0)
    assert link.now == pytest.approx(5.0, abs=1e-9)
    assert dropped(record) == [("c4", "no reply in time")]
    # The shorter of the two counts.
    other = Link(delays={4: NEVER})
    through(other, tmp_path / "b", **ONE, quorum__deadline=50.0, timeout=3.0)
    assert other.now == pytest.approx(3.0, abs=1e-9)


def test_the_quorum_is_of_the_cohort_and_not_of_those_who_are_asked(tmp_path: Path) -> None:
    slow = {number: 6.0 for number in range(20) if number >= 8}
    link = Link(20, delays=slow)
    settings = ONE | {"quorum__share": 0.4, "quorum__over_selection": 1.0}
    _, (record,) = through(link, tmp_path, **settings)
    assert len(record.cohort) == 20
    assert link.now < 2  # 4 of 10, though 8 replied: of what is there all is aggregated
    assert len(record.dropped) == 12


def test_over_selection_draws_more_and_nobody_without_it(tmp_path: Path) -> None:
    for share, count in ((0.0, 4), (0.1, 5), (0.25, 5), (1.0, 8)):
        link = Link()
        out, more = tmp_path / str(share), {"quorum__over_selection": share}
        _, (record,) = through(link, out, federation__rounds=1, federation__cohort=4, **more)
        assert len(record.cohort) == count


def _scripted(client: int, change: Callable[[Message], tuple[float, list[Message]]]) -> Any:
    def script(number: int, reply: Message) -> tuple[float, list[Message]]:
        mine = number == client and reply.metadata.message_type == "train"
        return change(reply) if mine else (-1, [reply])

    return script


def test_replies_that_are_refused_do_not_count_towards_the_quorum(tmp_path: Path) -> None:
    """Four fail or lie at once; six is under the quorum of 8, so the seventh is waited for."""

    def script(number: int, reply: Message) -> tuple[float, list[Message]]:
        if reply.metadata.message_type != "train" or number > 3:
            return -1, [reply]
        if number < 2:
            return 0, [from_link(reply, 5, "gone")]
        reply.content["metrics"]["loss"] = float("nan")
        return 0, [reply]

    link = Link(script=script, delays={9: 8.0})
    _, (record,) = through(link, tmp_path, **ONE, **QUORUM)
    assert link.now == pytest.approx(8.0, abs=0.5)
    assert dropped(record) == [
        ("c0", "gone"),
        ("c1", "gone"),
        ("c2", "client 'c2': expected a finite loss, found nan"),
        ("c3", "client 'c3': expected a finite loss, found nan"),
    ]


def test_a_round_ends_at_once_when_everyone_has_failed(tmp_path: Path) -> None:
    def script(number: int, reply: Message) -> tuple[float, list[Message]]:
        training = reply.metadata.message_type == "train"
        return (0, [from_link(reply, 5, "gone")]) if training else (0, [reply])

    link = Link(script=script)
    _, (record,) = through(link, tmp_path, **ONE, **QUORUM)
    assert (record.status, len(record.dropped), link.now) == ("failed", 10, 0.0)


def test_a_reply_that_comes_twice_counts_once(tmp_path: Path) -> None:
    link = Link(script=_scripted(3, lambda reply: (1.0, [reply, reply])))
    state, (record,) = through(link, tmp_path, **ONE)
    assert dropped(record) == [("c3", "a second reply in one round; the first counts")]
    assert_is_mean(state.adapter, expected_mean(experiment(**ONE), list(range(10))))


def test_a_late_reply_is_counted_in_the_next_round_and_not_aggregated(tmp_path: Path) -> None:
    two = {"federation__cohort": 10, "federation__rounds": 2}

    def run_with(first: float, out: Path) -> tuple[Any, list[RoundRecord]]:
        def late(reply: Message) -> tuple[float, list[Message]]:
            return (first if reply.metadata.group_id == "1" else 1.0), [reply]

        return through(Link(script=_scripted(9, late)), out, **two, **QUORUM)

    state, (first, second) = run_with(2.3, tmp_path / "late")
    assert (first.late, second.late) == (0, 1)
    assert [client for client, _ in dropped(first)] == ["c9"]
    assert second.dropped == ()
    silent, (_, without) = run_with(NEVER, tmp_path / "silent")
    assert state.adapter == silent.adapter  # bit for bit what it is when c9 never replies
    assert without.late == 0
    # It was uploaded, so it is counted: as many bytes as each of the ten.
    assert second.bytes_up - without.bytes_up == pytest.approx(without.bytes_up / 10, abs=1)


def test_errors_that_the_link_makes_up_are_the_clients(tmp_path: Path) -> None:
    reasons = {3: "expired", 5: "no heartbeat"}
    for code, reason in reasons.items():
        link = Link(script=_scripted(2, lambda r, c=code, t=reason: (1.0, [from_link(r, c, t)])))
        _, (record,) = through(link, tmp_path / str(code), **ONE)
        assert dropped(record) == [("c2", reason)]


def test_looks_are_frequent_at_first_and_again_after_a_reply() -> None:
    link = Link(2, delays={0: 3.0, 1: 9.0})
    replies = link.through(None).exchange(_training(2), Wait())
    next(replies)
    waited = len(link.pauses)
    assert link.pauses[:4] == pytest.approx([0.05, 0.075, 0.1125, 0.16875])
    assert link.pauses[waited - 1] == 0.5
    next(replies)
    assert link.pauses[waited] == 0.05
    assert link.now == pytest.approx(9.0, abs=0.5)
    assert (replies.sent, replies.arrived) == (2, 2)


def _training(count: int) -> Iterable[Message]:
    return (Message(RecordDict(), FIRST + number, "train") for number in range(count))


def test_messages_go_as_lists_and_expire_after_the_deadline() -> None:
    """Flower's grid goes twice over what it pushes: nothing would be left of a generator."""
    pushed: list[Any] = []

    class Seen(Link):
        def push_messages(self, messages: Any) -> Any:
            pushed.append(messages)
            return super().push_messages(messages)

    link = Seen(7)
    grid = link.through(QuorumConfig(deadline=20.0), 7, at_once=3)
    assert len(list(grid.send_and_receive(_training(7), timeout=100.0))) == 7
    assert [type(messages) for messages in pushed] == [list] * 3
    assert [len(messages) for messages in pushed] == [3, 3, 1]
    assert {message.metadata.ttl for message in link.pushed} == {20.0 + CLOCKS_DIFFER}


def test_messages_that_are_too_large_together_go_in_halves_and_alone_are_named() -> None:
    class Narrow(Link):
        def push_messages(self, messages: Any) -> Any:
            if any(message.metadata.dst_node_id == FIRST + 3 for message in messages):
                return [] if len(messages) > 1 else [None]
            return super().push_messages(messages) if len(messages) < 3 else []

    link = Narrow(5)
    replies = link.through(None).exchange(_training(5), Wait(deadline=9.0))
    found = {reply.metadata.src_node_id - FIRST: reply for reply in replies}
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert found[3].error.reason == "the message could not be sent"
    assert replies.ended == "all"


@pytest.mark.parametrize("changes", [{}, QUORUM], ids=["no quorum", "quorum"])
def test_a_simulation_without_faults_is_bit_for_bit_the_same(changes: Any, tmp_path: Path) -> None:
    config = experiment(**changes)
    plain, records = run(config, tmp_path / "plain")

    def forbidden(seconds: float) -> None:
        raise AssertionError("nobody is late")

    inner = InProcessGrid(fake_app(), 8)
    grid = QuorumGrid(inner, config.quorum, config.federation.cohort, sleep=forbidden)
    wrapped, same = run(config, tmp_path / "wrapped", grid=grid)
    assert wrapped.adapter == plain.adapter
    assert [_timeless(r) for r in same] == [_timeless(r) for r in records]
    assert len(read_rounds(tmp_path / "wrapped")) == 3


def _timeless(record: RoundRecord) -> RoundRecord:
    return replace(record, seconds=0.0, phases={}, clients={})


def test_replies_are_computed_one_at_a_time_as_they_are_read(tmp_path: Path) -> None:
    called: list[int] = []

    class Lazy(InProcessGrid):
        def _call(self, message: Message) -> Message:
            called.append(message.metadata.dst_node_id)
            return super()._call(message)

    grid = QuorumGrid(Lazy(fake_app(), 8), QuorumConfig(share=0.5), 8)
    replies = grid.send_and_receive(_training(8))
    assert called == []
    for count, reply in enumerate(replies, 1):
        assert len(called) == count
        assert reply.metadata.src_node_id == called[-1]
    assert called == [FIRST + number for number in range(8)]  # all, though 4 are enough


def test_what_is_not_training_is_waited_for_whatever_the_quorum() -> None:
    link = Link(script=lambda number, reply: (6.0 if number == 9 else 0.0, [reply]))
    grid = link.through(QuorumConfig(share=0.1))
    messages = (Message(RecordDict(), FIRST + n, "evaluate") for n in range(10))
    assert len(list(grid.send_and_receive(messages, timeout=30.0))) == 10
    assert link.now == pytest.approx(6.0, abs=0.5)
    assert list(grid.send_and_receive([], timeout=30.0)) == []


def test_shares_are_rounded_up_but_not_by_a_rounding_of_their_product() -> None:
    # 0.7 * 10 is 7.000000000000001 in float64 and 0.3 * 10 is 3: neither may ask for one more.
    for share, expected in ((0.7, 7), (0.3, 3), (0.75, 8), (1.0, 10), (0.01, 1)):
        link = Link(delays={number: 1.0 + number for number in range(10)})
        replies = link.through(QuorumConfig(share=share)).send_and_receive(_training(10))
        replies.count_by(lambda found=replies: found.arrived)
        assert len(list(replies)) == expected
        assert replies.ended == ("all" if expected == 10 else "quorum")
        assert np.isclose(replies.waited, link.now)
