"""Faults on purpose: whom they hit, what the server makes of each, and when replies come."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.adapter import Adapter
from fedlora.conditions import FaultsConfig
from fedlora.errors import FederationError, FedloraError
from fedlora.federation._flower_private import identify_process
from fedlora.federation.checkpoint import RoundRecord
from fedlora.federation.corruption import CORRUPTIONS, corrupt, corruptions_of
from fedlora.federation.faults import (
    CRASHED,
    FaultyGrid,
    describe_faults,
    draw_fault,
    with_faults,
)
from fedlora.federation.replies import ReplyForm, decode_reply, encode_reply_row
from fedlora.federation.strategy import most_failed_rounds
from fedlora.flat import pack
from fedlora.randomness import rng
from fedlora.simulation.grid import InProcessGrid
from tests.federation.fakes import FakeTrainer, experiment, fake_app, run, start_adapter
from tests.federation.fakes import FaultyGrid as RepliesChanged

identify_process()
EVERYONE = {"federation__cohort": 8, "federation__rounds": 1}
SILENT = "no reply in time"


def faulty(trainers: Any = None, clients: int = 8, **faults: Any) -> FaultyGrid:
    return FaultyGrid(InProcessGrid(fake_app(trainers), clients), FaultsConfig(**faults))


def told(record: RoundRecord) -> list[tuple[str, str]]:
    return [(dropped.client, dropped.reason) for dropped in record.dropped]


def hit(kind: str, chance: float, round: int, clients: int = 8, seed: int = 0) -> list[str]:
    """The clients of a cohort that a fault of one kind hits."""
    faults, names = FaultsConfig(**{kind: chance, "seed": seed}), map("c{}".format, range(clients))
    return [name for name in names if draw_fault(faults, name, str(round)) is not None]


def test_a_fault_is_drawn_from_seed_client_and_round_alone() -> None:
    faults = FaultsConfig(drop=0.3, delay=0.2, corrupt=0.1)
    names = [(f"c{i}", str(r)) for i in range(50) for r in range(1, 41)]
    drawn = {name: draw_fault(faults, *name) for name in names}
    again = {name: draw_fault(faults, *name) for name in reversed(names)}
    for name, fault in drawn.items():
        other = again[name]
        assert (fault is None) == (other is None)
        if fault is not None and other is not None:
            assert (fault.drop, fault.delay, fault.corrupt) == (
                other.drop, other.delay, other.corrupt,
            )  # fmt: skip
            assert fault.generator.random() == other.generator.random()
    found = [fault for fault in drawn.values() if fault is not None]
    # 2000 draws: four standard deviations of the shares are 0.041, 0.036 and 0.027.
    assert sum(f.drop for f in found) / 2000 == pytest.approx(0.3, abs=0.041)
    assert sum(f.delay for f in found) / 2000 == pytest.approx(0.2, abs=0.036)
    assert sum(f.corrupt for f in found) / 2000 == pytest.approx(0.1, abs=0.027)
    assert not any(f.crash or f.slow or f.duplicate for f in found)
    assert hit("drop", 0.5, 1, 50) != hit("drop", 0.5, 1, 50, seed=1)


def test_raising_one_chance_changes_no_other_kind() -> None:
    before, after = FaultsConfig(drop=0.2, corrupt=0.3), FaultsConfig(drop=0.9, corrupt=0.3)
    for i in range(200):
        one, other = (draw_fault(faults, f"c{i}", "1") for faults in (before, after))
        assert bool(one and one.corrupt) == bool(other and other.corrupt)
        assert not (one and one.drop) or bool(other and other.drop)


def test_the_same_clients_are_hit_whatever_their_node_ids(tmp_path: Path) -> None:
    config = experiment(federation__cohort=8, federation__rounds=4)
    rounds = []
    for order in (range(8), (3, 7, 1, 0, 6, 2, 5, 4)):
        people = {node: FakeTrainer(i, 10 + i) for node, i in enumerate(order)}
        grid = faulty(people, drop=0.3, crash=0.2)
        _, records = run(config, tmp_path / str(order), grid=grid)
        rounds.append([sorted(told(record)) for record in records])
    assert rounds[0] == rounds[1]
    assert [[c for c, reason in lost if reason == SILENT] for lost in rounds[0]] == [
        hit("drop", 0.3, number) for number in (1, 2, 3, 4)
    ]


def test_a_resumed_run_meets_the_same_faults(tmp_path: Path) -> None:
    faults = {"drop": 0.3, "crash": 0.1, "corrupt": 0.3, "duplicate": 0.2}
    long = experiment(federation__cohort=6, federation__rounds=6)
    whole, records = run(long, tmp_path / "whole", grid=faulty(**faults))
    short = experiment(federation__cohort=6, federation__rounds=3)
    _, first = run(short, tmp_path / "parts", grid=faulty(**faults))
    parts, second = run(long, tmp_path / "parts", grid=faulty(**faults))
    assert whole.adapter == parts.adapter
    assert [told(r) for r in records] == [told(r) for r in first + second]


def test_a_message_that_is_dropped_reaches_nobody_and_its_client_is_silent(tmp_path: Path) -> None:
    called: list[str] = []

    class Noting(FakeTrainer):
        def train(self, *args: Any) -> Any:
            called.append(self.client_id)
            return super().train(*args)

    people = {i: Noting(i, 10 + i) for i in range(8)}
    _, (record,) = run(experiment(**EVERYONE), tmp_path, grid=faulty(people, drop=0.4))
    lost = hit("drop", 0.4, 1)
    assert 0 < len(lost) < 8
    assert told(record) == [(client, SILENT) for client in lost]
    assert sorted(called + lost) == [f"c{i}" for i in range(8)]


def test_a_client_that_crashes_is_an_error_reply(tmp_path: Path) -> None:
    _, (record,) = run(experiment(**EVERYONE), tmp_path, grid=faulty(crash=0.4))
    crashed = hit("crash", 0.4, 1)
    assert 0 < len(crashed) < 8
    assert told(record) == [(client, CRASHED) for client in crashed]


def test_a_reply_that_comes_twice_counts_once(tmp_path: Path) -> None:
    plain, _ = run(experiment(**EVERYONE), tmp_path / "plain")
    state, (record,) = run(experiment(**EVERYONE), tmp_path / "twice", grid=faulty(duplicate=0.5))
    doubled = hit("duplicate", 0.5, 1)
    reason = "a second reply in one round; the first counts"
    assert told(record) == [(client, reason) for client in doubled]
    assert doubled
    assert state.adapter == plain.adapter


def test_a_delayed_reply_comes_after_the_others_and_nothing_sleeps(tmp_path: Path) -> None:
    came: list[str] = []

    class Watched(FaultyGrid):
        def send_and_receive(self, messages: Any, *, timeout: Any = None) -> Iterator[Message]:
            for reply in super().send_and_receive(messages, timeout=timeout):
                if reply.metadata.message_type == "train":
                    came.append(f"c{reply.metadata.src_node_id - 1000}")
                yield reply

    faults = FaultsConfig(delay=0.3, slow=0.3, seconds=1000.0)  # twice of it is within 3600
    _, (record,) = run(
        experiment(**EVERYONE), tmp_path, grid=Watched(InProcessGrid(fake_app(), 8), faults)
    )
    late = [f"c{i}" for i in range(8) if draw_fault(faults, f"c{i}", "1") is not None]
    assert 0 < len(late) < 8
    assert came == [f"c{i}" for i in range(8) if f"c{i}" not in late] + late
    assert told(record) == []
    assert record.seconds < 60


def test_a_reply_after_the_deadline_comes_in_the_next_round_and_does_not_count(
    tmp_path: Path,
) -> None:
    config = experiment(federation__cohort=8, federation__rounds=2)
    state, (first, second) = run(config, tmp_path / "late", grid=faulty(delay=0.4, seconds=4000.0))
    late = hit("delay", 0.4, 1)
    too_late = "a reply to round 1, too late to count"
    assert late
    assert told(first) == [(client, SILENT) for client in late]
    # Who is asked again in round 2 is heard with its right reply all the same.
    assert told(second) == [(client, too_late) for client in late] + [
        (client, SILENT) for client in hit("delay", 0.4, 2)
    ]
    dropped, _ = run(
        config, tmp_path / "dropped", grid=_Without({1: late, 2: hit("delay", 0.4, 2)})
    )
    assert state.adapter == dropped.adapter


class _Without(RepliesChanged):
    """The replies of some clients never come, by round."""

    def __init__(self, silent: dict[int, list[str]], clients: int = 8, **options: Any) -> None:
        def fault(reply: Message, client: str) -> list[Message]:
            return [] if client in silent.get(int(reply.metadata.group_id), []) else [reply]

        super().__init__(fault, clients, **options)


def test_a_slow_client_says_that_it_took_longer() -> None:
    class Answering(InProcessGrid):
        def replies(self, messages: Iterable[Message]) -> Iterator[Message]:
            for message in messages:
                metrics = MetricRecord({"seconds": 0.25, "steps": 3})
                yield Message(RecordDict({"metrics": metrics}), reply_to=message)

    grid = FaultyGrid(Answering(fake_app(), 2), FaultsConfig(slow=1.0, seconds=8.0))
    (reply,) = grid.send_and_receive([Message(RecordDict(), 1001, "train", group_id="1")])
    assert dict(reply.content["metrics"]) == {"seconds": 8.25, "steps": 3}


def test_replies_are_made_one_at_a_time_and_messages_read_when_they_are_needed() -> None:
    read = alive = most = 0

    def messages() -> Iterator[Message]:
        nonlocal read
        for number in range(8):
            read += 1
            yield Message(RecordDict(), 1000 + number, "train", group_id="1")

    grid = faulty(corrupt=0.5, duplicate=0.5, crash=0.2)
    stream = grid.send_and_receive(messages())
    for alive, _ in enumerate(stream, 1):
        most = max(most, read - alive)
    assert alive >= 8
    assert most <= 1


def test_the_query_is_always_answered(tmp_path: Path) -> None:
    config = experiment(federation__cohort=8, federation__rounds=9)
    with pytest.raises(FederationError) as error:
        run(config, tmp_path, grid=faulty(drop=1.0))
    assert str(error.value) == (
        "round 3: 3 rounds in a row without one valid update; the last was c7: no reply in time"
    )


# ---------------------------------------------------------------------------------- corruption

# Of a usual run, and what the server says of client c3.
REFUSED = {
    "other shape": "client 'c3': expected a buffer of (64,) float32, found (63,) float32",
    "other type": "client 'c3': expected a buffer of (64,) float32, found (64,) float64",
    "truncated": "client 'c3': the buffer's bytes are not 64 float32 numbers",
    "flipped bit": "client 'c3': the factors are not those that their digest was made of",
    "other digest": "client 'c3': the factors are not those that their digest was made of",
    "other scalings": "client 'c3': expected the server's scalings, found others",
    "other base": "client 'c3': expected an adapter for base ba5eba5eba5e, found ffffffffffff",
    "earlier round": "client 'c3': expected a reply to round 1, found 0",
    "no factors": "client 'c3': expected one array 'factors', found something else",
    "no metrics": "client 'c3': expected the metrics loss and steps",
    "no steps": "client 'c3': expected the metrics loss and steps",
    "negative steps": "client 'c3': expected steps, a whole number >= 0, found -1",
    "infinite loss": "client 'c3': expected a finite loss, found inf",
    "negative examples": "client 'c3': expected num-examples, a whole number >= 1, found -50",
    "huge examples": (
        "client 'c3': expected num-examples 13 as at the start of the run, found 1000000000000"
    ),
    "unasked control": "client 'c3': expected no control variate, found one",
}
OF_A_USUAL_REPLY = [name for name in CORRUPTIONS if name not in (
    "nan in control", "no control", "negative seconds",
)]  # fmt: skip


def spoiling(client: str, name: str, seed: int = 0) -> RepliesChanged:
    def fault(reply: Message, sender: str) -> list[Message]:
        if sender == client and reply.metadata.message_type == "train":
            generator = rng(seed, "place", reply.metadata.group_id)
            reply.content = corrupt(reply.content, name, generator)
        return [reply]

    return RepliesChanged(fault)


@pytest.mark.parametrize("name", OF_A_USUAL_REPLY)
def test_a_corrupted_reply_is_refused_with_its_client_named(name: str, tmp_path: Path) -> None:
    _, (record,) = run(experiment(**EVERYONE), tmp_path, grid=spoiling("c3", name))
    ((client, reason),) = told(record)
    assert client == "c3"
    assert reason.startswith("client 'c3'")
    if name in REFUSED:
        assert reason == REFUSED[name]
    if name in ("nan", "infinity"):
        assert "finite" in reason
    if name == "1e30":
        assert "1e+06" in reason


@pytest.fixture(scope="module")
def without() -> dict[tuple[str, str, str], Adapter]:
    return {}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(OF_A_USUAL_REPLY),
    number=st.integers(0, 7),
    seed=st.integers(0, 2**32 - 1),
    method=st.sampled_from(["fedit", "ffa-lora", "flora", "flexlora"]),
    weights=st.sampled_from(["examples", "equal"]),
)
def test_a_corrupted_reply_leaves_the_others_aggregate_as_it_would_be_without_that_client(
    name: str,
    number: int,
    seed: int,
    method: str,
    weights: str,
    without: dict[tuple[str, str, str], Adapter],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if weights == "equal" and "examples" in name:
        return  # there is no such number
    config = experiment(federation__method=method, federation__weights=weights, **EVERYONE)
    client, folder = f"c{number}", tmp_path_factory.mktemp("run")
    key = client, method, weights
    if key not in without:
        without[key] = run(config, folder / "a", grid=_Without({1: [client]}))[0].adapter
    state, (record,) = run(config, folder / "b", grid=spoiling(client, name, seed))
    assert [dropped.client for dropped in record.dropped] == [client]
    assert state.adapter == without[key]


def test_corruption_is_of_every_kind_and_leaves_the_reply_itself_alone() -> None:
    form = ReplyForm.of(start_adapter(experiment()), frozenset({"A", "B"}), 2, controlled=True)
    row = pack(form.sent, form.segments)
    metrics = {"loss": 1.0, "steps": 3, "num-examples": 9, "seconds": 0.5}
    for control in (row, None):
        content = encode_reply_row(form, row, metrics, control)
        before = {name: dict(record.items()) for name, record in content.items()}
        names = corruptions_of(content)
        others = {"unasked control"} if control is not None else {"nan in control", "no control"}
        assert set(names) == set(CORRUPTIONS) - others
        for name in names:
            corrupt(content, name, rng(0, name))
        assert {name: dict(record.items()) for name, record in content.items()} == before
    assert corruptions_of(RecordDict()) == ()


@pytest.mark.parametrize("name", ["nan in control", "no control"])
def test_a_corrupted_control_variate_is_refused(name: str) -> None:
    form = ReplyForm.of(start_adapter(experiment()), frozenset({"A", "B"}), 2, controlled=True)
    row = pack(form.sent, form.segments)
    content = encode_reply_row(form, row, {"loss": 1.0, "steps": 3}, row)
    assert decode_reply(content, form, "client 'c3'").control is not None
    with pytest.raises(FedloraError, match=r"^client 'c3', control"):
        decode_reply(corrupt(content, name, rng(0)), form, "client 'c3'")


def test_many_corrupted_replies_are_all_refused_and_named(tmp_path: Path) -> None:
    config = experiment(federation__cohort=8, federation__rounds=25)
    state, records = run(config, tmp_path, grid=faulty(corrupt=0.5))
    for record in records:
        assert sorted(client for client, _ in told(record)) == hit("corrupt", 0.5, record.round)
        assert all(reason.startswith(f"client '{client}'") for client, reason in told(record))
    assert len({reason.split(":")[1][:20] for r in records for _, reason in told(r)}) > 8
    assert all(np.isfinite(layer.A).all() for layer in state.adapter.layers.values())


# ------------------------------------------------------------------------- messages over a link


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def link(clock: _Clock, **faults: Any) -> FaultyGrid:
    inner: Grid = InProcessGrid(fake_app(), 8)
    return FaultyGrid(inner, FaultsConfig(**faults), real_time=True, clock=clock, sleep=clock.sleep)


def asked(round: int = 1) -> list[Message]:
    return [Message(RecordDict(), 1000 + i, "train", group_id=str(round)) for i in range(8)]


def nodes(replies: Iterable[Message]) -> list[int]:
    return [reply.metadata.src_node_id - 1000 for reply in replies]


def by_node(kind: str, chance: float) -> list[int]:
    """Without a query nodes are known by their ids."""
    faults = FaultsConfig(**{kind: chance})
    return [i for i in range(8) if draw_fault(faults, f"node {1000 + i}", "1") is not None]


def test_over_a_link_a_reply_is_held_back_for_so_many_seconds() -> None:
    clock = _Clock()
    grid = link(clock, delay=0.5, seconds=5.0)
    ids = list(grid.push_messages(asked()))
    delayed = by_node("delay", 0.5)
    assert 0 < len(delayed) < 8
    assert nodes(grid.pull_messages(ids)) == [i for i in range(8) if i not in delayed]
    waiting = [ids[i] for i in delayed]
    clock.now += 4.9
    assert nodes(grid.pull_messages(waiting)) == []
    clock.now += 0.2
    assert nodes(grid.pull_messages(waiting)) == delayed
    assert nodes(grid.pull_messages(waiting)) == []


def test_over_a_link_every_message_has_an_id_and_a_dropped_one_no_reply() -> None:
    clock = _Clock()
    grid = link(clock, drop=0.3, crash=0.3)
    messages = asked()
    ids = list(grid.push_messages(messages))
    assert len(set(ids)) == 8
    assert [message.metadata.message_id for message in messages] == ids
    replies = list(grid.pull_messages(ids))
    dropped = by_node("drop", 0.3)
    assert sorted(nodes(replies)) == [i for i in range(8) if i not in dropped]
    assert all(
        reply.metadata.reply_to_message_id == ids[reply.metadata.src_node_id - 1000]
        for reply in replies
    )
    crashed = [r.metadata.src_node_id - 1000 for r in replies if r.error.reason == CRASHED]
    assert sorted(crashed) == [i for i in by_node("crash", 0.3) if i not in dropped]


def test_over_a_link_a_round_waits_for_delayed_replies_and_until_the_deadline() -> None:
    clock = _Clock()
    grid = link(clock, delay=0.5, seconds=5.0)
    assert sorted(nodes(grid.send_and_receive(asked(), timeout=60.0))) == list(range(8))
    assert 5.0 <= clock.now - 100.0 < 6.0
    clock = _Clock()
    grid = link(clock, drop=0.5)
    dropped = by_node("drop", 0.5)
    assert nodes(grid.send_and_receive(asked(), timeout=60.0)) == [
        i for i in range(8) if i not in dropped
    ]
    assert clock.now == 160.0


# ---------------------------------------------------------------------------- what is said of it


def test_a_run_says_which_faults_it_had() -> None:
    told = describe_faults(FaultsConfig(drop=0.3, corrupt=0.05, seed=4))
    assert told == "faults were injected: drop 0.3, corrupt 0.05 (chance a message, faults.seed 4)"
    slow = describe_faults(FaultsConfig(slow=0.1, seconds=2.5))
    assert slow == "faults were injected: slow 0.1 (chance a message, 2.5 s, faults.seed 0)"
    assert describe_faults(FaultsConfig()) is None
    assert describe_faults(None) is None


def test_without_faults_the_grid_is_used_as_it_is() -> None:
    grid = InProcessGrid(fake_app(), 2)
    assert with_faults(grid, None) is grid
    assert with_faults(grid, FaultsConfig(seed=3)) is grid
    wrapped = with_faults(grid, FaultsConfig(drop=0.1))
    assert isinstance(wrapped, FaultyGrid)
    assert list(wrapped.get_node_ids()) == [1000, 1001]
    assert wrapped.run is grid.run


def test_a_run_is_given_up_after_a_dozen_clients_without_an_update(tmp_path: Path) -> None:
    assert [most_failed_rounds(cohort) for cohort in (1, 2, 4, 5, 100)] == [12, 6, 3, 3, 3]
    # 100 rounds of one client that is silent in three of ten: at least three in a row are likely.
    config = experiment(federation__cohort=1, federation__rounds=100)
    state, records = run(config, tmp_path, grid=faulty(drop=0.3))
    status = "".join(record.status[0] for record in records)
    assert "fff" in status
    assert state.round == 100
    assert math.isclose(status.count("f") / 100, 0.3, abs_tol=0.19)  # four standard deviations
