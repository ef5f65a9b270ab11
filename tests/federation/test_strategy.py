"""Rounds with faults: bad replies are dropped by name, and the mean is that of the good ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Error, Message

from fedlora.adapter import Adapter
from fedlora.aggregation import Broadcast, method
from fedlora.errors import ConfigError, FederationError
from fedlora.federation import ClientRecord, read_checkpoint, read_rounds, run_federation
from fedlora.federation._flower_private import set_message_id
from fedlora.federation.population import deal_ranks
from fedlora.simulation.grid import InProcessGrid
from fedlora.training import TrainResult
from tests.federation.fakes import (
    FakeTrainer,
    FaultyGrid,
    experiment,
    fake_app,
    run,
    start_adapter,
)

EVERYONE = {"federation__cohort": 8, "federation__rounds": 1}


def expected_mean(config: Any, clients: list[int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """One round by hand: every client's own result, weighted by its 10 + i examples."""
    start = start_adapter(config)
    results = []
    for i in clients:
        fake = FakeTrainer(i, 10 + i)
        rule = fake_rule(config)
        result = fake.train(Broadcast(start), config.federation.train, rule, 1, config.seed)
        results.append((10 + i, result.adapter))
    total = sum(weight for weight, _ in results)
    means = {}
    for path in start:
        means[path] = tuple(
            sum(w * getattr(a[path], factor).astype(np.float64) for w, a in results) / total
            for factor in ("A", "B")
        )
    return means  # type: ignore[return-value]


def fake_rule(config: Any) -> Any:
    return method(config.federation.method).rule(1)


def assert_is_mean(adapter: Adapter, means: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    for path, (a, b) in means.items():
        # One rounding to float32 of values of order 1.
        np.testing.assert_allclose(adapter[path].A, a, rtol=0, atol=1e-6)
        np.testing.assert_allclose(adapter[path].B, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["fedit", "ffa-lora"])
def test_a_round_is_the_weighted_mean_of_its_cohort(name: str, tmp_path: Path) -> None:
    config = experiment(federation__method=name, **EVERYONE)
    state, (record,) = run(config, tmp_path)
    assert_is_mean(state.adapter, expected_mean(config, list(range(8))))
    assert record.cohort == tuple(f"c{i}" for i in range(8))
    # Loss of client i is 1 + i with weight 10 + i.
    weights = np.arange(10, 18)
    assert record.loss == pytest.approx(float((weights * np.arange(1, 9)).sum() / weights.sum()))
    if name == "ffa-lora":
        start = start_adapter(config)
        assert all(np.array_equal(state.adapter[path].A, start[path].A) for path in start)


def test_equal_weights_count_every_client_once(tmp_path: Path) -> None:
    config = experiment(federation__weights="equal", **EVERYONE)
    state, (record,) = run(config, tmp_path)
    assert record.loss == pytest.approx(4.5)
    assert all(client.num_examples is None for client in read_checkpoint(tmp_path).clients)
    assert state.round == 1


def _error(reply: Message) -> Message:
    answer = Message(Error(5, "node\nlost"), reply_to=reply)
    answer.metadata.__dict__["_src_node_id"] = reply.metadata.src_node_id
    set_message_id(answer, "x")
    return answer


def _changed(record: str, key: str, value: Any) -> Callable[[Message], list[Message]]:
    def fault(reply: Message) -> list[Message]:
        reply.content[record][key] = value
        return [reply]

    return fault


def _no_content(reply: Message) -> list[Message]:
    for name in list(reply.content):
        del reply.content[name]
    return [reply]


def _unknown_sender(reply: Message) -> list[Message]:
    reply.metadata.__dict__["_src_node_id"] = 4711
    return [reply]


def _uncountable(reply: Message) -> list[Message]:
    reply.content["more"] = ConfigRecord({"empty": []})  # Flower fails to count its bytes
    return [reply]


# What client c3 does in the round, and what the record says of it.
FAULTS: dict[str, tuple[Callable[[Message], list[Message]], list[tuple[str, str]]]] = {
    "fails": (lambda reply: [_error(reply)], [("c3", "node lost")]),
    "is silent": (lambda reply: [], [("c3", "no reply in time")]),
    "sends nothing": (
        _no_content,
        [
            (
                "c3",
                "client 'c3': expected a record 'layout' with segments, kinds, scalings, base, "
                "round, digest",
            )
        ],
    ),
    "sends another shape": (
        _changed("layout", "segments", ["body.0.fc|A|1x6"]),
        [("c3", "client 'c3', layer 'body.0.fc': lora_A is (1, 6), the other side has (2, 6)")],
    ),
    "sends a scalar": (
        _changed("factors", "factors", Array(np.array(1.0))),
        [("c3", "client 'c3': expected a buffer of (64,) float32, found () float64")],
    ),
    "claims a million examples": (
        _changed("metrics", "num-examples", 10**6),
        [
            (
                "c3",
                "client 'c3': expected num-examples 13 as at the start of the run, found 1000000",
            )
        ],
    ),
    "sends what Flower cannot count": (
        _uncountable,
        [("c3", "client 'c3': a reply that cannot be read (IndexError)")],
    ),
    "is somebody else": (
        _unknown_sender,
        [("node 4711", "was not asked in this round"), ("c3", "no reply in time")],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_client_that_fails_is_dropped_with_its_reason_and_the_rest_counts(
    name: str, tmp_path: Path
) -> None:
    fault, dropped = FAULTS[name]

    def only_c3(reply: Message, client: str) -> list[Message]:
        training = reply.metadata.message_type == "train"
        return fault(reply) if client == "c3" and training else [reply]

    config = experiment(**EVERYONE)
    state, (record,) = run(config, tmp_path, grid=FaultyGrid(only_c3))
    assert [(d.client, d.reason) for d in record.dropped] == dropped
    assert record.status == "updated"
    assert_is_mean(state.adapter, expected_mean(config, [0, 1, 2, 4, 5, 6, 7]))
    counted = {client.client_id: client.rounds for client in read_checkpoint(tmp_path).clients}
    assert counted == {f"c{i}": int(i != 3) for i in range(8)}


def test_a_second_reply_of_one_client_does_not_count(tmp_path: Path) -> None:
    def twice(reply: Message, client: str) -> list[Message]:
        return [reply, reply] if client == "c3" else [reply]

    config = experiment(**EVERYONE)
    state, (record,) = run(config, tmp_path, grid=FaultyGrid(twice))
    assert [(d.client, d.reason) for d in record.dropped] == [
        ("c3", "a second reply in one round; the first counts")
    ]
    assert_is_mean(state.adapter, expected_mean(config, list(range(8))))


def test_a_trainer_that_diverges_is_dropped_by_its_own_client(tmp_path: Path) -> None:
    def diverge(result: TrainResult, round: int) -> TrainResult:
        return replace(result, loss=math.nan)

    config = experiment(**EVERYONE)
    _, (record,) = run(config, tmp_path, {3: FakeTrainer(3, 13, change=diverge)})
    assert [(d.client, d.reason) for d in record.dropped] == [
        ("c3", "client 'c3': expected a finite loss, found nan")
    ]


def _all_fail_in(rounds: set[int]) -> dict[int, FakeTrainer]:
    def change(result: TrainResult, round: int) -> TrainResult:
        if round in rounds:
            raise ValueError("broken")
        return result

    return {i: FakeTrainer(i, 10 + i, change=change) for i in range(8)}


def test_a_round_in_which_all_fail_keeps_the_adapter_and_the_run_goes_on(tmp_path: Path) -> None:
    config = experiment(federation__rounds=5)
    state, records = run(config, tmp_path, _all_fail_in({2, 3}))
    assert [record.status for record in records] == [
        "updated", "failed", "failed", "updated", "updated",
    ]  # fmt: skip
    assert records[1].loss is None
    assert len(records[1].dropped) == 4
    assert state.round == 5
    one, _ = run(experiment(federation__rounds=1), tmp_path / "one")
    three, _ = run(experiment(federation__rounds=3), tmp_path / "three", _all_fail_in({2, 3}))
    assert three.adapter == one.adapter


def test_three_rounds_in_a_row_without_an_update_end_the_run_and_keep_its_files(
    tmp_path: Path,
) -> None:
    config = experiment(federation__rounds=9)
    with pytest.raises(FederationError) as error:
        run(config, tmp_path, _all_fail_in({2, 3, 4}))
    assert str(error.value).startswith(
        "round 4: 3 rounds in a row without one valid update; the last was c"
    )
    assert [record.round for record in read_rounds(tmp_path)] == [1, 2, 3, 4]
    assert read_checkpoint(tmp_path).state.round == 4


def test_an_empty_poisson_round_keeps_the_adapter_and_is_no_failure(tmp_path: Path) -> None:
    config = experiment(federation__sampling="poisson", federation__cohort=1, federation__rounds=12)
    _, records = run(config, tmp_path)
    empty = [record for record in records if record.status == "empty"]
    assert empty  # each with probability (7/8)**8 = 0.34
    assert all(record.cohort == () and record.loss is None for record in empty)
    assert {len(record.cohort) for record in records} >= {0, 1}


def test_held_out_clients_never_take_part(tmp_path: Path) -> None:
    config = experiment(data__held_out_clients=0.25, federation__cohort=6, federation__rounds=6)
    _, records = run(config, tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    assert len(checkpoint.held_out) == 2
    drawn = {client for record in records for client in record.cohort}
    assert drawn == set(checkpoint.client_ids)
    assert all(c.rounds == c.steps == 0 for c in checkpoint.clients if c.held_out)
    assert all(c.rounds == 6 and c.steps == 30 for c in checkpoint.clients if not c.held_out)


def test_clients_that_are_sent_adapters_of_their_own_are_checked_against_them(
    tmp_path: Path,
) -> None:
    """Equal adapters, but one object a client: the same result by the way without shortcuts."""
    usual, sent = method("fedit"), []

    def broadcast(state: Any, profile: Any) -> Broadcast:
        sent.append(replace(state.adapter))
        return Broadcast(sent[-1])

    own_each = replace(usual, broadcast=broadcast, broadcasts_by_client=True)
    config = experiment(federation__cohort=8, federation__rounds=2)
    start = start_adapter(config)
    own, shared = (
        run_federation(
            InProcessGrid(fake_app(), 8), config, tmp_path / name, initial=start, method=how
        )
        for name, how in (("own", own_each), ("shared", usual))
    )
    assert len({id(adapter) for adapter in sent}) == 16
    assert own.adapter == shared.adapter
    own_rounds, shared_rounds = (read_rounds(tmp_path / name) for name in ("own", "shared"))
    assert [r.bytes_down for r in own_rounds] == [r.bytes_down for r in shared_rounds]
    assert [r.dropped for r in own_rounds] == [(), ()]


def test_replies_are_made_one_at_a_time_when_the_sum_asks_for_them(tmp_path: Path) -> None:
    alive = 0
    most = 0

    class Counting(InProcessGrid):
        def send_and_receive(self, messages: Any, *, timeout: Any = None) -> Any:
            nonlocal alive, most
            for reply in super().send_and_receive(messages, timeout=timeout):
                alive += 1
                most = max(most, alive)
                yield reply
                alive -= 1

    config = experiment(**EVERYONE)
    run(config, tmp_path, grid=Counting(fake_app(), 8))
    assert most == 1


def test_a_round_counts_its_bytes(tmp_path: Path) -> None:
    _, (record,) = run(experiment(**EVERYONE), tmp_path)
    numbers = start_adapter(experiment()).num_bytes
    # Beside the factors: 128 bytes of array header and the layout's texts.
    assert 8 * numbers < record.bytes_up < 8 * (numbers + 800)
    assert 8 * numbers < record.bytes_down < 8 * (numbers + 1500)
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.bytes_up, checkpoint.bytes_down) == (record.bytes_up, record.bytes_down)


def test_ranks_are_dealt_out_over_sorted_ids_and_a_client_may_name_its_own() -> None:
    config = experiment(federation__client_ranks=(2, 1, 1), lora__rank=2)
    clients = [
        ClientRecord(name, rank, held_out=name == "b")
        for name, rank in (("c", None), ("a", None), ("d", 1), ("b", None), ("e", 10**6))
    ]
    # Held-out clients take their turn, so that a rank does not depend on who is held out; what a
    # stranger asks for is cut to the run's.
    assert deal_ranks(clients, config) == {"a": 2, "b": 1, "c": 1, "d": 1, "e": 2}
    plain = experiment()
    assert deal_ranks(clients, plain) == {"a": None, "b": None, "c": None, "d": 1, "e": 2}


def test_a_broadcast_is_asked_once_a_rank_and_every_client_gets_its_own_rank(
    tmp_path: Path,
) -> None:
    usual, asked = method("fedit"), []

    def broadcast(state: Any, profile: Any) -> Broadcast:
        asked.append((state.round, profile.rank))
        cut = state.trainable.map(
            lambda layer: replace(layer, A=layer.A[: profile.rank], B=layer.B[:, : profile.rank])
        )
        return Broadcast(cut)

    def aggregate(state: Any, updates: Any) -> Any:
        found = {update.client_id: update.adapter.ranks for update in updates}
        assert found == {f"c{n}": (ranks[n],) * 3 for n in range(8)}
        return replace(state, round=state.round + 1)

    # Dealt out: 2 1 2 2 1 2 2 1; c2 and c7 name their own.
    ranks = [2, 1, 1, 2, 1, 2, 2, 2]
    trainers = {2: FakeTrainer(2, rank=1), 7: FakeTrainer(7, rank=2)}
    dealt = {"federation__client_ranks": (2, 1, 2)}
    config = experiment(federation__cohort=8, federation__rounds=2, **dealt)
    state = run_federation(
        InProcessGrid(fake_app(trainers), 8),
        config,
        tmp_path,
        initial=start_adapter(config),
        method=replace(usual, broadcast=broadcast, aggregate=aggregate),
    )
    assert state.round == 2
    assert sorted(asked) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [record.dropped for record in read_rounds(tmp_path)] == [(), ()]


def test_ranks_are_not_dealt_out_to_a_method_that_ignores_them(tmp_path: Path) -> None:
    config = experiment(federation__client_ranks=(2, 1), federation__cohort=8)
    with pytest.raises(ConfigError, match=r"sends client 'c1' an adapter of rank 1, found rank 2"):
        run(config, tmp_path)
    # What a device says of itself is a wish: fedit sends everyone the same.
    state, _ = run(experiment(), tmp_path / "wish", {1: FakeTrainer(1, rank=1)})
    assert state.round == 3
