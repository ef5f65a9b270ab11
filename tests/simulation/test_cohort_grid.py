"""Clients that train in groups: the results of one at a time, whatever groups, threads, faults."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from fedlora.adapter import Adapter
from fedlora.aggregation import Method, ServerState, method
from fedlora.errors import FederationError
from fedlora.experiment import ExperimentConfig
from fedlora.federation import read_rounds, run_federation
from fedlora.federation.owner import owner_node_config
from fedlora.simulation import cohort_grid
from fedlora.simulation.cohort_grid import CohortGrid
from fedlora.simulation.grid import InProcessGrid, VirtualGrid
from fedlora.simulation.groups import GroupOrder, Outcome, train_order
from fedlora.simulation.rounds import load_app, run_rounds
from fedlora.world import shared_world
from tests.simulation.small import PEOPLE, config

# float32 sums in another order; SGD, which does not turn noise into signs as Adam's first steps do
CLOSE = 1e-6


def difference(one: Adapter, other: Adapter) -> float:
    return max(
        float(np.abs(getattr(one[path], name) - getattr(other[path], name)).max())
        for path in one
        for name in ("A", "B")
    )


def federate(grid: VirtualGrid, experiment: ExperimentConfig, out: Path, **more: object) -> Adapter:
    world = shared_world(experiment.base, experiment.data, experiment.lora, experiment.seed)
    initial = world.initial
    return run_federation(grid, experiment, out, initial=initial, **more).adapter  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"federation__local_epochs": None, "federation__local_steps": 5},
        {"federation__method": "ffa-lora"},
        {"federation__weights": "equal"},
        {"federation__max_grad_norm": 0.1, "federation__momentum": 0.9},
        {"lora__lora_dropout": 0.5},  # falls back to one at a time
    ],
)
def test_the_same_rounds_as_one_client_after_another(tmp_path: Path, changes: dict) -> None:
    together = run_rounds(config(**changes), tmp_path / "cohort", PEOPLE)
    alone = run_rounds(config(**changes, engine__kind="sequential"), tmp_path / "alone", PEOPLE)
    assert difference(together.state.adapter, alone.state.adapter) <= CLOSE
    assert together.state.round == alone.state.round == 3
    assert together.clients == alone.clients
    # A ClientApp also tells its seconds: the name's 7 bytes and a float.
    seconds = 15 * sum(client.rounds for client in alone.clients)
    assert (together.bytes_up, together.bytes_down) == (alone.bytes_up - seconds, alone.bytes_down)
    for mine, theirs in zip(
        read_rounds(tmp_path / "cohort"), read_rounds(tmp_path / "alone"), strict=True
    ):
        assert mine.cohort == theirs.cohort
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert mine.dropped == ()


def test_a_quorum_changes_no_bit_where_nobody_is_late(tmp_path: Path) -> None:
    plain = run_rounds(config(), tmp_path / "plain", PEOPLE)
    quorum = run_rounds(config(quorum__share=0.5), tmp_path / "quorum", PEOPLE)
    assert quorum.state.adapter == plain.state.adapter
    assert quorum.clients == plain.clients
    assert (quorum.bytes_up, quorum.bytes_down) == (plain.bytes_up, plain.bytes_down)
    assert all(r.dropped == () and r.late == 0 for r in read_rounds(tmp_path / "quorum"))


def test_neither_threads_nor_the_size_of_groups_change_a_result(tmp_path: Path) -> None:
    found = {}
    for workers, positions in ((1, 2048), (3, 2048), (2, 1)):
        grid = CohortGrid(PEOPLE, workers=workers, positions=positions)
        found[workers] = federate(grid, config(), tmp_path / str(workers))
    assert found[1] == found[3]  # bit for bit: the groups are the same
    assert 0 < difference(found[1], found[2]) <= CLOSE


def test_replies_stream_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohort_grid, "WINDOW", 3)
    experiment = config()
    world = shared_world(experiment.base, experiment.data, experiment.lora, experiment.seed)
    seen: list[tuple[str, ...]] = []

    def train(order: GroupOrder) -> list[Outcome]:
        seen.append(order.clients)
        return train_order(order)

    grid = CohortGrid(PEOPLE, train=train)
    read = 0

    def messages() -> Iterable[Message]:
        nonlocal read
        for message in training_messages(experiment, world.initial, grid):
            read += 1
            yield message

    replies = iter(grid.send_and_receive(messages()))
    assert (read, seen) == (0, [])
    next(replies)
    assert read == 3
    assert len(list(replies)) == PEOPLE - 1
    assert all(len(group) <= 3 for group in seen)
    assert sorted(name for group in seen for name in group) == list(world.data.client_ids)


def training_messages(
    experiment: ExperimentConfig, initial: Adapter, grid: CohortGrid
) -> Iterable[Message]:
    from fedlora.federation.records import (
        BOTH,
        ClientSetup,
        TrainOrder,
        encode_adapter,
        to_record,
        train_content,
    )

    setup = to_record(ClientSetup.of(experiment))
    order = to_record(TrainOrder(1, 0, experiment.federation.train, BOTH))
    sent = encode_adapter(initial, BOTH, 1)
    for node in grid.get_node_ids():
        yield Message(train_content(setup, order, sent), node, "train", group_id="1")


def test_a_client_that_diverges_is_named_and_changes_no_other(tmp_path: Path) -> None:
    whole = {"federation__cohort": PEOPLE, "federation__rounds": 1}
    broken = config(data__id="tests.simulation.small:extreme_data", **whole)
    checkpoint = run_rounds(broken, tmp_path / "broken", PEOPLE)
    (record,) = read_rounds(tmp_path / "broken")
    assert [dropped.client for dropped in record.dropped] == ["c03"]
    assert record.dropped[0].reason.startswith("NonFiniteError: train_local, step")
    alone = run_rounds(
        replace(broken, engine=replace(broken.engine, kind="sequential")), tmp_path / "one", PEOPLE
    )
    assert difference(checkpoint.state.adapter, alone.state.adapter) <= CLOSE


def test_a_group_that_fails_runs_again_one_by_one(tmp_path: Path) -> None:
    experiment = config(federation__rounds=1, federation__cohort=PEOPLE)
    sizes = []

    def train(order: GroupOrder) -> list[Outcome]:
        sizes.append(len(order.clients))
        if "c05" in order.clients:
            raise ValueError("a secret of c05's data")
        return train_order(order)

    federate(CohortGrid(PEOPLE, train=train), experiment, tmp_path)
    (record,) = read_rounds(tmp_path)
    assert [dropped.client for dropped in record.dropped] == ["c05"]
    assert record.dropped[0].reason.startswith("ValueError at test_cohort_grid.py:")
    assert "secret" not in record.dropped[0].reason
    assert sizes.count(1) >= max(sizes) > 1


def test_a_model_that_mixes_clients_is_found_and_trained_one_at_a_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leaky = {"base__id": "tests.simulation.small:leaky_base"}
    with caplog.at_level(logging.WARNING, "fedlora"):
        together = run_rounds(config(**leaky), tmp_path / "cohort", PEOPLE)
    (warning,) = [record.message for record in caplog.records]
    assert warning.startswith("clients are trained one at a time, ")
    assert "Leaky" in warning
    alone = run_rounds(config(**leaky, engine__kind="sequential"), tmp_path / "alone", PEOPLE)
    assert together.state.adapter == alone.state.adapter  # bit for bit


def keeping_B() -> Method:
    """Share A only: every client keeps a B of its own (arXiv:2410.01463)."""
    fedit = method("fedit")

    def aggregate(state: ServerState, updates: Iterable) -> ServerState:
        return fedit.aggregate(state, updates)

    return replace(fedit, name="keeping-b", shared=frozenset({"A"}), aggregate=aggregate)


def private_rounds(
    out: Path, rounds: int, private: Path | None, train: Callable = train_order
) -> Adapter:
    experiment = config(federation__rounds=rounds, federation__cohort=PEOPLE)
    grid = CohortGrid(PEOPLE, private=private, train=train)
    return federate(grid, experiment, out, method=keeping_B())


def test_factors_that_are_not_shared_stay_with_their_client(tmp_path: Path) -> None:
    started: dict[int, dict[str, np.ndarray]] = {}

    def train(order: GroupOrder) -> list[Outcome]:
        starts = order.starts * (len(order.clients) if len(order.starts) == 1 else 1)
        for client, start in zip(order.clients, starts, strict=True):
            started.setdefault(order.order.round, {})[client] = start["second"].B
        return train_order(order)

    final = private_rounds(tmp_path, 2, tmp_path / "private", train)
    assert not any(B.any() for B in started[1].values())
    assert all(B.any() for B in started[2].values())
    assert len({B.tobytes() for B in started[2].values()}) == PEOPLE  # everyone's own
    assert not any(layer.B.any() for layer in final.layers.values())  # the server saw none


def test_private_factors_survive_a_kill_in_the_middle_of_a_round(tmp_path: Path) -> None:
    expected = private_rounds(tmp_path / "whole", 3, tmp_path / "whole" / "private")
    out, private = tmp_path / "killed", tmp_path / "killed" / "private"
    private_rounds(out, 2, private)

    class Killed(BaseException):
        pass

    calls = 0

    def train(order: GroupOrder) -> list[Outcome]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Killed
        return train_order(order)

    experiment = config(federation__rounds=3, federation__cohort=PEOPLE)
    grid = CohortGrid(PEOPLE, private=private, train=train, positions=8)
    with pytest.raises(Killed):
        federate(grid, experiment, out, method=keeping_B())
    assert private_rounds(out, 3, private) == expected


def test_clients_one_after_another_keep_the_same(tmp_path: Path) -> None:
    expected = private_rounds(tmp_path / "together", 3, tmp_path / "private")
    experiment = config(federation__rounds=3, federation__cohort=PEOPLE, engine__kind="sequential")
    app, node_config = load_app("clientapp"), owner_node_config(experiment)
    grid = InProcessGrid(app, PEOPLE, node_config)
    alone = federate(grid, experiment, tmp_path / "alone", method=keeping_B())
    assert difference(alone, expected) <= CLOSE


def test_a_method_with_private_factors_needs_a_place_for_them(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="B: expected a folder for factors that are trained"):
        private_rounds(tmp_path, 3, None)
