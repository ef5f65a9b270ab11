"""Rounds by secure sums: the plain result to the rounding, dropouts by phase, and what is refused.

The clients are fakes behind a ClientApp in this process; the messages are the real ones.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord

from fedlora.adapter import Adapter
from fedlora.aggregation import Broadcast, ServerState, method
from fedlora.errors import ConfigError
from fedlora.federation import RoundRecord, has_checkpoint, read_checkpoint, read_rounds
from fedlora.federation._flower_private import set_message_id
from fedlora.federation.faults import draw_fault, with_faults
from fedlora.federation.limits import declined_content
from fedlora.federation.private_sum import NOISE_KEY, CohortSum, PrivateRounds
from fedlora.federation.quorum import QuorumGrid
from fedlora.federation.secure.records import AGREE, KEYS, MASKED, PHASES, SHARES, UNMASK
from fedlora.federation.summed import aggregate_mean
from fedlora.files import write_atomic
from fedlora.flat import pack, segments_of
from fedlora.privacy.central import CentralMechanism
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.secure.quantize import Quantizer
from fedlora.simulation.grid import InProcessGrid
from fedlora.training import Factor
from tests.federation.fakes import (
    FakeTrainer,
    FaultyGrid,
    experiment,
    fake_app,
    raises,
    run,
    run_slowly,
    start_adapter,
)
from tests.federation.scripted import Link
from tests.forked import start

AFTER = (AGREE, UNMASK)  # whoever is lost in one of these has its update in the sum
RANGE = 20.0  # no fake moves a number so far
FACTORS: tuple[Factor, Factor] = ("A", "B")


def secure(**overrides: Any) -> Any:
    """One round of all eight clients; keys with ``__`` for the dot."""
    table = {
        "federation__cohort": 8, "federation__rounds": 1, "federation__weights": "equal",
        "secure_aggregation__clipping_range": RANGE,
    }  # fmt: skip
    return experiment(**(table | overrides))


def row(adapter: Adapter) -> np.ndarray:
    return pack(adapter, segments_of(adapter, FACTORS)).astype(np.float64)


def mean(config: Any, clients: Iterable[int], largest: float = RANGE) -> np.ndarray:
    """The start and the mean of what these clients change, by hand."""
    start = start_adapter(config)
    rule = method(config.federation.method).rule(1)
    changes = []
    for number in clients:
        fake = FakeTrainer(number)
        result = fake.train(Broadcast(start), config.federation.train, rule, 1, config.seed)
        changes.append(np.clip(row(result.adapter) - row(start), -largest, largest))
    return row(start) + np.mean(changes, axis=0)


def bound(config: Any, values: np.ndarray, clients: int = 8) -> np.ndarray:
    """A mean of rounded numbers is off by a step at most, and once rounded to float32."""
    table = config.secure_aggregation
    step = Quantizer(table.bits, table.clipping_range, clients).step
    return step + np.spacing(np.abs(values).astype(np.float32)).astype(np.float64)


def told(record: RoundRecord) -> list[tuple[str, str]]:
    return [(dropped.client, dropped.reason) for dropped in record.dropped]


def error(reply: Message) -> Message:
    answer = Message(Error(5, "node lost"), reply_to=reply)
    answer.metadata.__dict__["_src_node_id"] = reply.metadata.src_node_id
    set_message_id(answer, "x")
    return answer


def of(client: str, kind: str, change: Callable[[Message], list[Message]]) -> Any:
    """A fault of one client's reply in one phase."""

    def fault(reply: Message, name: str) -> list[Message]:
        hit = name == client and reply.metadata.message_type == kind
        return change(reply) if hit else [reply]

    return fault


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"secure_aggregation__bits": 64},
        {"federation__method": "ffa-lora"},
        {"federation__download_codec": "fp16"},
    ],
)
def test_a_secure_round_is_the_plain_one_to_its_rounding(changes: Any, tmp_path: Path) -> None:
    config = secure(**changes)
    state, (record,) = run(config, tmp_path / "secure")
    plain, _ = run(
        experiment(
            federation__cohort=8, federation__rounds=1, federation__weights="equal",
            **{k: v for k, v in changes.items() if not k.startswith("secure")},
        ),
        tmp_path / "plain",
    )  # fmt: skip
    expected, found = row(plain.adapter), row(state.adapter)
    # Each side is rounded to float32 once more.
    assert (np.abs(found - expected) <= 2 * bound(config, expected)).all()
    assert np.abs(found - row(start_adapter(config))).max() > 0.1
    assert record.status == "updated"
    assert record.loss is None
    assert record.dropped == ()


def test_three_rounds_stay_together(tmp_path: Path) -> None:
    config = secure(federation__rounds=3, federation__cohort=5)
    state, records = run(config, tmp_path / "secure")
    plain_config = experiment(
        federation__rounds=3, federation__cohort=5, federation__weights="equal"
    )
    plain, plains = run(plain_config, tmp_path / "plain")
    assert [r.cohort for r in records] == [r.cohort for r in plains]
    expected = row(plain.adapter)
    # What one round is off, the next clients take over nine tenths of: under three times in all.
    largest = bound(config, np.maximum(np.abs(expected), 8.0), 5)
    assert (np.abs(row(state.adapter) - expected) <= 3 * 2 * largest).all()
    clients = read_checkpoint(tmp_path / "secure").clients
    assert [c.rounds for c in clients] == [
        sum(c.client_id in r.cohort for r in records) for c in clients
    ]


def test_each_number_is_clipped_to_the_range(tmp_path: Path) -> None:
    config = secure(secure_aggregation__clipping_range=0.5)
    state, _ = run(config, tmp_path)
    expected = mean(config, range(8), 0.5)
    assert (np.abs(row(state.adapter) - expected) <= bound(config, expected)).all()
    assert np.abs(expected - mean(config, range(8))).max() > 0.1


@pytest.mark.parametrize("how", ["silent", "fails"])
@pytest.mark.parametrize("kind", PHASES)
def test_a_dropout_costs_one_client_whatever_the_phase(kind: str, how: str, tmp_path: Path) -> None:
    config = secure()
    grid = FaultyGrid(of("c3", kind, lambda reply: [error(reply)] if how == "fails" else []))
    state, (record,) = run(config, tmp_path, grid=grid)
    # Whose update has come stays in the sum.
    left = [i for i in range(8) if i != 3 or kind in AFTER]
    expected = mean(config, left)
    assert (np.abs(row(state.adapter) - expected) <= bound(config, expected)).all()
    reason = "node lost" if how == "fails" else "no reply in time"
    assert told(record) == [("c3", f"{kind.partition('.')[2]}: {reason}")]
    numbers = {c.client_id: c.rounds for c in read_checkpoint(tmp_path).clients}
    assert numbers == {f"c{i}": int(i in left) for i in range(8)}
    after = PHASES.index(kind)
    assert [phase["clients"] for phase in record.secure.values()] == [
        8 - (place >= after) for place in range(5)
    ]


def test_a_dropout_in_every_phase(tmp_path: Path) -> None:
    lost = dict(zip(("c1", "c3", "c5", "c7", "c8"), PHASES, strict=True))

    def fault(reply: Message, client: str) -> list[Message]:
        return [] if lost.get(client) == reply.metadata.message_type else [reply]

    config = secure(secure_aggregation__threshold=0.51, federation__cohort=8)
    state, (record,) = run(config, tmp_path, grid=FaultyGrid(fault, 8))
    assert record.status == "failed"  # 5 of 8 are needed, and 4 are left for the last phase
    config = secure(federation__cohort=12, secure_aggregation__threshold=0.51)
    grid = FaultyGrid(fault, 12)
    state, (record,) = run(config, tmp_path / "more", grid=grid, clients=12)
    expected = mean(config, [0, 2, 4, 6, 7, 8, 9, 10, 11])
    assert (np.abs(row(state.adapter) - expected) <= bound(config, expected, 12)).all()


@pytest.mark.parametrize("kind", PHASES)
def test_below_the_threshold_the_round_is_given_up_and_nothing_is_asked_any_more(
    kind: str, tmp_path: Path
) -> None:
    seen: Counter[str] = Counter()
    lost = ("c0", "c2", "c4", "c6")  # half of them; 5 of 8 are needed

    def fault(reply: Message, client: str) -> list[Message]:
        seen[reply.metadata.message_type] += 1
        first = reply.metadata.group_id == "1"
        return [] if first and client in lost and reply.metadata.message_type == kind else [reply]

    config = secure(federation__rounds=2)
    _, records = run(config, tmp_path, grid=FaultyGrid(fault))
    name = kind.partition(".")[2]
    assert [r.status for r in records] == ["failed", "updated"]  # the run goes on
    assert told(records[0])[:4] == [(c, f"{name}: no reply in time") for c in lost]
    reason = (
        f"the secure sum was given up after its phase '{name}': expected at least 5 of 8 clients, "
        "found 4; no update was revealed"
    )
    assert told(records[0])[4:] == [(f"c{i}", reason) for i in (1, 3, 5, 7)]
    after = PHASES[PHASES.index(kind) + 1 :]
    assert all(seen[later] == 8 for later in after)  # those of the second round alone
    assert all(seen[phase] == 16 for phase in PHASES if phase not in after)
    assert [c.rounds for c in read_checkpoint(tmp_path).clients] == [1] * 8


def test_a_second_reply_does_not_count_and_a_late_one_is_named(tmp_path: Path) -> None:
    kept: list[Message] = []

    def fault(reply: Message, client: str) -> list[Message]:
        kind = reply.metadata.message_type
        if client == "c2" and kind == SHARES:
            return [reply, reply]
        if client == "c5" and kind == KEYS:
            kept.append(reply)
            return []
        if client == "c6" and kind == MASKED:
            return [kept.pop(), reply]
        return [reply]

    config = secure()
    state, (record,) = run(config, tmp_path, grid=FaultyGrid(fault))
    assert told(record) == [
        ("c5", "keys: no reply in time"),
        ("c2", "shares: a second reply; the first counts"),
        ("c5", "masked: a reply to train.keys of round 1, too late to count"),
    ]
    expected = mean(config, [0, 1, 2, 3, 4, 6, 7])
    assert (np.abs(row(state.adapter) - expected) <= bound(config, expected)).all()


def _flipped(data: bytes, place: int = -3) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


def _change(record: str, key: str, place: int = -3) -> Callable[[Message], list[Message]]:
    def change(reply: Message) -> list[Message]:
        found: Any = reply.content[record]
        found[key] = _flipped(found[key], place)
        return [reply]

    return change


def _row(change: Callable[[np.ndarray], np.ndarray], *, honest: bool) -> Any:
    """Change the masked row; honest: leave the digest as the client made it."""
    import hashlib

    def changed(reply: Message) -> list[Message]:
        content: Any = reply.content
        array = Array(change(content["masked"]["row"].numpy().copy()))
        content["masked"]["row"] = array
        if not honest:
            content["masked-digest"]["digest"] = hashlib.sha256(array.data).hexdigest()
        return [reply]

    return changed


def _one_more(values: np.ndarray) -> np.ndarray:
    values[0] += 1
    return values


def _more(record: str, key: str, value: Any) -> Callable[[Message], list[Message]]:
    def change(reply: Message) -> list[Message]:
        content: Any = reply.content
        content[record][key] = value
        return [reply]

    return change


# What c3's reply in a phase becomes, whom that costs the round, and how the reason opens.
CHANGED: dict[str, tuple[str, Callable[[Message], list[Message]], str, str]] = {
    "its keys, on the way": (
        KEYS, _change("advertisement", "bytes", -40), "c3",
        "shares: ForgedKeyError: directory: expected the keys that client 3 sent, found others",
    ),
    "its keys' form": (
        KEYS, _change("advertisement", "bytes", 0), "c3",
        "keys: advertised keys: expected",
    ),
    "a share for c5": (SHARES, _change("shares", "5"), "c5", "masked: ShareError: "),
    "no share for c5": (
        SHARES, lambda reply: [reply.content["shares"].pop("5"), reply][1:], "c3",
        "shares: shares of client 3: expected one for each of",
    ),
    "a share for nobody": (
        SHARES, _more("shares", "8", b"x"), "c3", "shares: shares of client 3: expected one",
    ),
    "a share by no place": (
        SHARES, _more("shares", "+5", b"x"), "c3",
        "shares: client 'c3': shares: expected places as keys, found '+5'",
    ),
    "its row": (
        MASKED, _row(_one_more, honest=True), "c3",
        "masked: client 'c3': the masked row is not the one its digest was made of",
    ),
    "its row's size": (
        MASKED, _row(lambda values: values[1:], honest=False), "c3",
        "masked: client 'c3': expected a masked row of (",
    ),
    "its row's type": (
        MASKED, _row(lambda values: values.view(np.float32), honest=False), "c3",
        "masked: client 'c3': expected a masked row of (",
    ),
    "no tag for c5": (
        AGREE, lambda reply: [reply.content["tags"].pop("5"), reply][1:], "c3",
        "agree: tags from client 3: expected one for each of 7 neighbors",
    ),
    "what it reveals": (
        UNMASK, _change("revealed", "5"), "c3", "unmask: share of client 5 from 3: expected",
    ),
    "nothing of c5": (
        UNMASK, lambda reply: [reply.content["revealed"].pop("5"), reply][1:], "c3",
        "unmask: shares from client 3: expected one of each of 8 clients",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_message_costs_one_client_which_is_named(name: str, tmp_path: Path) -> None:
    kind, change, who, reason = CHANGED[name]
    config = secure()
    state, (record,) = run(config, tmp_path, grid=FaultyGrid(of("c3", kind, change)))
    assert [client for client, _ in told(record)] == [who]
    assert record.dropped[0].reason.startswith(reason)
    out = int(who[1:])
    expected = mean(config, [i for i in range(8) if i != out or kind in AFTER])
    assert (np.abs(row(state.adapter) - expected) <= bound(config, expected)).all()


def test_a_changed_tag_costs_nobody_while_enough_others_agree(tmp_path: Path) -> None:
    config = secure()
    grid = FaultyGrid(of("c3", AGREE, _change("tags", "5")))
    state, (record,) = run(config, tmp_path, grid=grid)
    assert told(record) == []
    expected = mean(config, range(8))
    assert (np.abs(row(state.adapter) - expected) <= bound(config, expected)).all()


def test_a_sum_that_cannot_be_right_is_given_up(tmp_path: Path) -> None:
    def two(values: np.ndarray) -> np.ndarray:
        values[-1] += 1  # the last number counts
        return values

    grid = FaultyGrid(of("c3", MASKED, _row(two, honest=False)))
    _, (record,) = run(secure(), tmp_path, grid=grid)
    assert record.status == "failed"
    assert told(record)[0] == (
        "c0",
        "secure sum: expected 8 vectors in it, found 9; a masked vector was damaged, or a client "
        "used other masks than it agreed to",
    )


def test_a_diverged_client_says_so_itself(tmp_path: Path) -> None:
    from dataclasses import replace

    def diverged(result: Any, _: Any) -> Any:
        layers = dict(result.adapter.layers)
        first = next(iter(layers))
        # No layer can be made with such numbers; sums of its own may end there all the same.
        bad = layers[first].A.copy()
        bad.setflags(write=True)
        object.__setattr__(layers[first], "A", np.full_like(bad, np.nan))
        return replace(result, adapter=replace(result.adapter, layers=layers))

    trainers = {3: FakeTrainer(3, change=diverged)}
    _, (record,) = run(secure(), tmp_path, trainers)
    assert [c for c, _ in told(record)] == ["c3"]
    assert "NonFiniteError" in record.dropped[0].reason


class Spy(InProcessGrid):
    """Keeps what travels, both ways."""

    def __init__(self, clients: int = 8) -> None:
        super().__init__(fake_app(), clients)
        self.down: list[Message] = []
        self.up: list[Message] = []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        def noted() -> Iterator[Message]:
            for message in messages:
                self.down.append(message)
                yield message

        for reply in super().send_and_receive(noted(), timeout=timeout):
            self.up.append(reply)
            yield reply


def test_nothing_but_the_declared_records_leaves(tmp_path: Path) -> None:
    grid = Spy()
    config = secure()
    run(config, tmp_path, grid=grid)
    found = {
        (reply.metadata.message_type, name, type(record), frozenset(record))
        for reply in grid.up
        for name, record in reply.content.items()
        if reply.metadata.message_type != "query"
    }
    places = frozenset(map(str, range(8)))
    assert found == {
        (KEYS, "advertisement", ConfigRecord, frozenset({"bytes"})),
        (SHARES, "shares", ConfigRecord, places),
        (MASKED, "masked", ArrayRecord, frozenset({"row"})),
        (MASKED, "masked-digest", ConfigRecord, frozenset({"digest"})),
        (UNMASK, "revealed", ConfigRecord, places),
        *((AGREE, "tags", ConfigRecord, places - {str(place)}) for place in range(8)),
    }
    # The model goes down with the third phase alone.
    models = {m.metadata.message_type for m in grid.down if "factors" in m.content}
    assert models == {MASKED}
    assert not any(
        isinstance(record, MetricRecord) for m in grid.up for record in m.content.values()
    )


def test_masked_rows_tell_nothing_one_by_one(tmp_path: Path) -> None:
    """Every row is uniform in the ring, whatever the update: its mean is that of 2**32."""
    grid = Spy()
    run(secure(), tmp_path, grid=grid)
    rows = [m.content["masked"]["row"].numpy() for m in grid.up if "masked" in m.content]
    numbers = np.concatenate(rows) / 2.0**32
    # Of n uniform numbers the mean has the standard deviation sqrt(1 / 12 n); five of them.
    assert abs(numbers.mean() - 0.5) < 5 / np.sqrt(12 * len(numbers))
    assert len(np.unique(np.concatenate(rows))) > 0.99 * len(numbers)


def test_a_client_forgets_its_secrets_with_the_last_phase(tmp_path: Path) -> None:
    grid = Spy()
    run(secure(), tmp_path, grid=grid)
    for state in grid._states.values():
        assert list(state) == ["secure-session"]
        record: Any = state["secure-session"]
        assert (record["round"], record["session"]) == (1, b"")


def test_a_round_that_runs_again_after_a_crash_comes_to_the_same_bits(tmp_path: Path) -> None:
    config = secure(federation__rounds=4, federation__cohort=5)
    whole, _ = run(config, tmp_path / "whole")
    killed = tmp_path / "killed"
    process = start(run_slowly, config, killed)
    end = time.monotonic() + 60
    while time.monotonic() < end and (not has_checkpoint(killed) or len(read_rounds(killed)) < 2):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it was over before it could be killed"
    assert 1 <= read_checkpoint(killed).state.round < 4
    state, _ = run(config, killed)
    assert state.adapter == whole.adapter
    assert [r.secure.keys() for r in read_rounds(killed)] == [
        {"keys", "shares", "masked", "agree", "unmask"}
    ] * 4


def test_a_round_that_everyone_declines_comes_again_as_another_one(tmp_path: Path) -> None:
    asked: list[Message] = []
    pauses: list[float] = []

    def fault(reply: Message, client: str) -> list[Message]:
        if reply.metadata.message_type == KEYS:
            asked.append(reply)
            if len(asked) <= 6 and client != "c0":  # who has begun the round, and begins it again
                reply.content = declined_content("battery")
        return [reply]

    config = secure(federation__cohort=6)
    state, records = run(
        config, tmp_path, grid=FaultyGrid(fault, 6), clients=6, pause=pauses.append
    )
    assert [(r.round, r.status) for r in records] == [(1, "declined"), (1, "updated")]
    assert sorted(records[0].declined) == ["c1", "c2", "c3", "c4", "c5"]
    assert records[1].dropped == ()
    assert pauses == [60.0]
    expected = mean(config, range(6))
    assert (np.abs(row(state.adapter) - expected) <= bound(config, expected, 6)).all()


def test_injected_faults_hit_every_phase_on_its_own(tmp_path: Path) -> None:
    config = secure(
        federation__cohort=12, federation__rounds=6, faults__drop=0.03, faults__crash=0.02,
        faults__duplicate=0.2,
    )  # fmt: skip
    grid = with_faults(InProcessGrid(fake_app(), 12), config.faults)
    _, records = run(config, tmp_path, grid=grid, clients=12)
    met = set()
    for record in records:
        out: set[str] = set()
        for kind in PHASES:
            asked = [f"c{i}" for i in range(12) if f"c{i}" not in out]
            faults = {c: draw_fault(config.faults, c, str(record.round), kind) for c in asked}
            lost = {c for c, fault in faults.items() if fault and (fault.drop or fault.crash)}
            named = {
                d.client for d in record.dropped
                if d.reason.startswith(f"{kind[6:]}: ") and "second reply" not in d.reason
            }  # fmt: skip
            assert named == lost
            met |= {kind} if lost else set()
            out |= lost
        assert record.status == "updated"
    assert met == set(PHASES)
    assert any("a second reply" in d.reason for r in records for d in r.dropped)


def test_a_phase_ends_with_its_quorum_and_the_late_are_out(tmp_path: Path) -> None:
    config = secure(quorum__share=0.75, quorum__grace=1.0, quorum__deadline=60.0)
    slow = {(1, KEYS), (5, MASKED)}
    link = Link(8)
    link._script = lambda n, reply: (
        30.0 if (n, reply.metadata.message_type) in slow else 1.0, [reply]
    )  # fmt: skip
    grid = link.through(config.quorum, cohort=8)
    state, (record,) = run(config, tmp_path, grid=grid)
    expected = mean(config, [0, 2, 3, 4, 6, 7])
    assert (np.abs(row(state.adapter) - expected) <= bound(config, expected)).all()
    assert told(record) == [
        ("c1", "keys: not waited for: the phase had its quorum"),
        ("c5", "masked: not waited for: the phase had its quorum"),
    ]


def test_the_deadline_is_each_phases_own(tmp_path: Path) -> None:
    link = Link(8)
    link._script = lambda n, reply: (
        float("inf") if n == 2 and reply.metadata.message_type == SHARES else 1.0, [reply]
    )  # fmt: skip
    grid: QuorumGrid = link.through(None, cohort=8)
    _, (record,) = run(secure(), tmp_path, grid=grid, timeout=50.0)
    assert told(record) == [("c2", "shares: no reply in time")]
    assert record.status == "updated"
    assert 50.0 < link.now < 60.0  # one phase to its end, three of a second


def test_a_sum_of_one_is_no_sum(tmp_path: Path) -> None:
    with raises(
        ConfigError,
        "federation.cohort: expected 2 or more with [secure_aggregation], found 1; the sum of one "
        "client is its update",
    ):
        run(secure(federation__cohort=1), tmp_path)


def test_a_graph_too_sparse_is_refused_before_the_first_round(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^secure_aggregation: neighbors: expected all of 8"):
        run(secure(secure_aggregation__neighbors=4), tmp_path)


def test_empty_and_tiny_cohorts_of_poisson_sampling_are_given_up(tmp_path: Path) -> None:
    config = secure(
        federation__sampling="poisson", federation__cohort=2, federation__rounds=12, seed=1
    )
    _, records = run(config, tmp_path)
    for record in records:
        if len(record.cohort) >= 2:
            assert record.status == "updated"
        elif record.cohort:
            assert told(record) == [
                (record.cohort[0], "no secure sum was begun: expected at least 2 connected clients "
                 "of 1, found 1")
            ]  # fmt: skip
            assert record.status == "failed"
        else:
            assert record.status == "empty"
    assert {min(len(record.cohort), 2) for record in records} == {0, 1, 2}


def private(**overrides: Any) -> Any:
    """Secure rounds with noise on their sum; the range of a number is the clipping norm."""
    table = {
        "privacy__clipping_norm": 5.0, "privacy__noise_multiplier": 1.0,
        "privacy__accountant": "rdp",  # the quickest for everyone in every round
        "secure_aggregation__clipping_range": None,
    }  # fmt: skip
    return secure(**(table | overrides))


def test_with_privacy_the_noise_is_put_on_the_secure_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums: list[CohortSum] = []
    release = PrivateRounds.release_sum

    def noted(self: PrivateRounds, *arguments: Any) -> Any:
        sums.append(arguments[-1])
        return release(self, *arguments)

    monkeypatch.setattr(PrivateRounds, "release_sum", noted)
    config = private()
    plain_config = experiment(
        federation__cohort=8, federation__rounds=1, federation__weights="equal",
        privacy__clipping_norm=5.0, privacy__noise_multiplier=1.0, privacy__accountant="rdp",
    )  # fmt: skip
    _, (plain_record,) = run(plain_config, tmp_path / "plain")
    key = (tmp_path / "plain" / NOISE_KEY).read_bytes()
    (tmp_path / "secure" / NOISE_KEY).parent.mkdir(parents=True)
    write_atomic(tmp_path / "secure" / NOISE_KEY, key, mode=0o600)
    state, (record,) = run(config, tmp_path / "secure")
    plain_sum, secure_sum = sums
    assert secure_sum.replies == plain_sum.replies == 8
    # Each of eight clients clips so much more that its rounding cannot lengthen it, and rounds.
    step = Quantizer(32, 5.0, 8).step
    bound = 8 * (step * np.sqrt(len(plain_sum.total)) + step)
    assert np.abs(secure_sum.total - plain_sum.total).max() <= bound
    assert np.linalg.norm(secure_sum.total) <= 8 * 5.0
    # The same secret gives the same release of the same sum.
    mechanism = CentralMechanism(key, 1.0, 5.0, 8)
    mean = mechanism.release(secure_sum.total, 1)
    start = ServerState.start(start_adapter(config))
    expected = aggregate_mean(method(config.federation.method), start, mean)
    assert state.adapter == expected.adapter
    assert record.epsilon == plain_record.epsilon
    assert record.status == "updated"


def test_a_private_round_without_a_sum_releases_noise_and_is_charged(tmp_path: Path) -> None:
    lost = ("c0", "c2", "c4", "c6")

    def fault(reply: Message, client: str) -> list[Message]:
        hit = client in lost and reply.metadata.message_type == MASKED
        return [] if hit and reply.metadata.group_id == "1" else [reply]

    config = private(federation__rounds=2, federation__cohort=8)
    state, records = run(config, tmp_path, grid=FaultyGrid(fault))
    assert [r.status for r in records] == ["failed", "updated"]
    assert len(Ledger.read(tmp_path).lines) == 2
    key = (tmp_path / NOISE_KEY).read_bytes()
    size = len(row(state.adapter))
    mean = CentralMechanism(key, 1.0, 5.0, 8).release(np.zeros(size), 1)
    start = row(start_adapter(config))
    whole, _ = run(private(federation__rounds=1), tmp_path / "one", grid=FaultyGrid(fault))
    assert np.abs(row(whole.adapter) - start).max() > 0.5
    assert not np.array_equal(row(whole.adapter), (start + mean).astype(np.float32))  # own secret
    own = CentralMechanism((tmp_path / "one" / NOISE_KEY).read_bytes(), 1.0, 5.0, 8)
    noise = own.release(np.zeros(size), 1)
    np.testing.assert_array_equal(row(whole.adapter), (start + noise).astype(np.float32))
