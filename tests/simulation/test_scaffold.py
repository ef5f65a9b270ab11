"""SCAFFOLD in the engines of a simulation: equal results, and what stays with a client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.errors import FederationError
from fedlora.experiment import ExperimentConfig
from fedlora.federation import run_federation
from fedlora.federation.checkpoint import Checkpoint, read_checkpoint, read_rounds
from fedlora.simulation.cohort_grid import CohortGrid
from fedlora.simulation.groups import GroupOrder, Outcome, train_order
from fedlora.simulation.rounds import run_rounds
from fedlora.world import shared_world
from tests.simulation.small import PEOPLE, config
from tests.simulation.test_cohort_grid import CLOSE, difference


def scaffold(**changes: Any) -> ExperimentConfig:
    return config(**{"federation__control_variates": True, "federation__rounds": 4} | changes)


def rows(folder: Path) -> list[bytes]:
    """The variates that the clients keep on the disk."""
    return [path.read_bytes() for path in sorted(folder.glob("private/control-*/rows.float32"))]


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    assert one.state.adapter == other.state.adapter
    assert one.state.method_state.keys() == other.state.method_state.keys()
    for name, value in one.state.method_state.items():
        np.testing.assert_array_equal(value, other.state.method_state[name])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"federation__method": "ffa-lora", "federation__weights": "equal"},
        {"federation__method": "rolora"},
        {"federation__max_grad_norm": 0.1, "federation__proximal_weight": 0.5},
        {"federation__schedule": "cosine", "federation__server_optimizer": "momentum"},
        {"lora__lora_dropout": 0.5},  # falls back to one at a time
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_the_same_rounds_as_one_client_after_another(tmp_path: Path, changes: Any) -> None:
    together = run_rounds(scaffold(**changes), tmp_path / "cohort", PEOPLE)
    alone = run_rounds(scaffold(**changes, engine__kind="sequential"), tmp_path / "alone", PEOPLE)
    assert difference(together.state.adapter, alone.state.adapter) <= CLOSE
    assert together.state.method_state.keys() == alone.state.method_state.keys()
    for name, value in together.state.method_state.items():
        assert np.abs(value).max() > 1e-3
        # The factors' rounding over steps times learning rate, 0.2 for a client of one batch.
        np.testing.assert_allclose(value, alone.state.method_state[name], rtol=0, atol=CLOSE / 0.2)
    replies = sum(client.rounds for client in alone.clients)
    # A ClientApp also tells its seconds: the name's 7 bytes and a float.
    assert together.bytes_up == alone.bytes_up - 15 * replies
    assert together.bytes_down == alone.bytes_down
    for name in ("cohort", "alone"):
        assert all(record.dropped == () for record in read_rounds(tmp_path / name))
    plain = run_rounds(
        scaffold(**changes, federation__control_variates=False), tmp_path / "plain", PEOPLE
    )
    assert difference(together.state.adapter, plain.state.adapter) > 1e-3


def test_the_servers_variate_is_the_mean_of_the_clients(tmp_path: Path) -> None:
    experiment = scaffold(federation__method="ffa-lora", federation__rounds=6)
    end = run_rounds(experiment, tmp_path, PEOPLE)
    folder = next((tmp_path / "private").glob("control-*"))
    rounds = np.fromfile(folder / "rounds.int64", np.int64).reshape(PEOPLE, 2)
    kept = np.fromfile(folder / "rows.float32", np.float32).reshape(PEOPLE, 2, -1)
    own = kept[np.arange(PEOPLE), rounds.argmax(1)].astype(float)
    examples = np.array([client.num_examples for client in end.clients], float)
    expected = examples @ own / examples.sum()
    assert np.abs(expected).max() > 1e-3
    # Float32 variates of size 1, rounded once a round.
    np.testing.assert_allclose(end.state.method_state["control.B"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["fedit", "rolora"])
def test_a_run_that_is_killed_in_a_round_is_resumed_bit_for_bit(
    tmp_path: Path, method: str
) -> None:
    experiment = scaffold(federation__method=method, federation__cohort=PEOPLE)
    whole = run_rounds(experiment, tmp_path / "whole", PEOPLE)

    class Killed(BaseException):
        pass

    calls = 0

    def train(order: GroupOrder) -> list[Outcome]:
        nonlocal calls
        if order.order.round == 3:
            calls += 1
            if calls == 3:  # two groups have kept their next variates
                raise Killed
        return train_order(order)

    out = tmp_path / "killed"
    world = shared_world(experiment.base, experiment.data, experiment.lora, experiment.seed)
    grid = CohortGrid(PEOPLE, private=out / "private", train=train, positions=8)
    with pytest.raises(Killed):
        run_federation(grid, experiment, out, initial=world.initial)
    assert read_checkpoint(out).state.round == 2
    # Small groups change the last bits of sums: what was killed and what was not start alike.
    small = CohortGrid(PEOPLE, private=tmp_path / "small" / "private", positions=8)
    expected = run_federation(small, experiment, tmp_path / "small", initial=world.initial)
    again = CohortGrid(PEOPLE, private=out / "private", positions=8)
    run_federation(again, experiment, out, initial=world.initial, clients_remember=True)
    assert_same(read_checkpoint(out), read_checkpoint(tmp_path / "small"))
    assert rows(out) == rows(tmp_path / "small")
    assert len(rows(out)) == (2 if method == "rolora" else 1)
    assert difference(expected.adapter, whole.state.adapter) <= CLOSE


def test_run_rounds_resumes_with_the_variates_that_clients_keep(tmp_path: Path) -> None:
    whole = run_rounds(scaffold(), tmp_path / "whole", PEOPLE)
    run_rounds(scaffold(federation__rounds=2), tmp_path / "cut", PEOPLE)
    assert_same(run_rounds(scaffold(), tmp_path / "cut", PEOPLE), whole)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_neither_threads_nor_groups_change_a_result(tmp_path: Path) -> None:
    experiment = scaffold()
    world = shared_world(experiment.base, experiment.data, experiment.lora, experiment.seed)
    for name, workers in (("one", 1), ("three", 3)):
        out = tmp_path / name
        grid = CohortGrid(PEOPLE, private=out / "private", workers=workers, positions=8)
        run_federation(grid, experiment, out, initial=world.initial)
    assert_same(read_checkpoint(tmp_path / "one"), read_checkpoint(tmp_path / "three"))
    assert rows(tmp_path / "one") == rows(tmp_path / "three")


def test_a_client_that_diverges_keeps_the_variate_that_it_had(tmp_path: Path) -> None:
    from tests.simulation import small

    experiment = scaffold(
        data__id=f"{small.__name__}:extreme_data", federation__cohort=PEOPLE, federation__rounds=2
    )
    run_rounds(experiment, tmp_path, PEOPLE)
    dropped = [d.client for record in read_rounds(tmp_path) for d in record.dropped]
    assert set(dropped) == {"c03"}
    folder = next((tmp_path / "private").glob("control-*"))
    kept = np.fromfile(folder / "rounds.int64", np.int64).reshape(PEOPLE, 2)
    assert [bool(rounds.any()) for rounds in kept] == [k != 3 for k in range(PEOPLE)]


def test_control_variates_need_a_place(tmp_path: Path) -> None:
    experiment = scaffold(federation__rounds=3)
    world = shared_world(experiment.base, experiment.data, experiment.lora, experiment.seed)
    with pytest.raises(FederationError, match="control variates: expected a folder for those of"):
        run_federation(CohortGrid(PEOPLE), experiment, tmp_path, initial=world.initial)


@pytest.mark.slow
def test_two_workers_give_the_bits_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    here = run_rounds(scaffold(), tmp_path / "here", PEOPLE)
    there = run_rounds(scaffold(engine__workers=2), tmp_path / "there", PEOPLE)
    assert_same(there, here)
    assert rows(tmp_path / "there") == rows(tmp_path / "here")
