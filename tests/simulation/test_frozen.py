"""Rounds with a frozen part and clients of several ranks: every engine, resumed, personalized."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlora import aggregation
from fedlora.adapter import Adapter
from fedlora.aggregation import ServerState
from fedlora.experiment import ExperimentConfig
from fedlora.federation import Checkpoint, read_checkpoint, read_rounds
from fedlora.formats import load_adapter
from fedlora.nn.inject import summed_weights
from fedlora.simulation import simulate
from fedlora.simulation.cohort_grid import CohortGrid
from fedlora.simulation.groups import GroupOrder, Outcome, train_order
from fedlora.simulation.rounds import run_rounds
from fedlora.world import shared_world
from tests.simulation import stacking as stacking_module
from tests.simulation.small import PEOPLE, config
from tests.simulation.stacking import MOST, stacking
from tests.simulation.test_cohort_grid import federate

LAYERS = 3
RANKS = {"federation__client_ranks": (2, 1)}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(aggregation._METHODS, "stacking", stacking)
    stacking_module.asked.clear()


def experiment(**overrides: object) -> ExperimentConfig:
    # Clients begin every round with B = 0: they need larger steps than where B goes on.
    faster = {"federation__learning_rate": 0.5}
    return config(federation__method="stacking", **(faster | overrides))


def difference(one: Adapter, other: Adapter) -> float:
    """Of the products: a singular vector may have either sign."""
    return max(float(np.abs(one.delta_weight(p) - other.delta_weight(p)).max()) for p in one)


def same_bits(one: ServerState, other: ServerState) -> bool:
    return one.trainable == other.trainable and one.frozen == other.frozen


@pytest.mark.parametrize("ranks", [{}, RANKS], ids=["one rank", "two ranks"])
def test_the_same_rounds_as_one_client_after_another(tmp_path: Path, ranks: dict) -> None:
    together = run_rounds(experiment(**ranks), tmp_path / "cohort", PEOPLE)
    alone = run_rounds(experiment(**ranks, engine__kind="sequential"), tmp_path / "alone", PEOPLE)
    # float32 sums in another order, through three rounds and their cuts
    assert difference(together.state.adapter, alone.state.adapter) <= 5e-6
    assert together.state.frozen is not None
    assert set(together.state.frozen.ranks) == {MOST}
    assert (
        max(np.abs(together.state.frozen.delta_weight(p)).max() for p in alone.state.frozen) > 0.1
    )
    # A ClientApp also tells its seconds: the name's 7 bytes and a float.
    seconds = 15 * sum(client.rounds for client in alone.clients)
    assert (together.bytes_up, together.bytes_down) == (alone.bytes_up - seconds, alone.bytes_down)
    for mine, theirs in zip(
        read_rounds(tmp_path / "cohort"), read_rounds(tmp_path / "alone"), strict=True
    ):
        assert mine.cohort == theirs.cohort
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert mine.dropped == theirs.dropped == ()
        told = 15 * len(mine.cohort)
        assert (mine.bytes_up, mine.bytes_down) == (theirs.bytes_up - told, theirs.bytes_down)
    losses = [record.loss for record in read_rounds(tmp_path / "cohort")]
    assert losses[-1] < losses[0] - 0.02  # B starts from zero: only the frozen part can do it


def test_threads_and_groups_do_not_change_a_result(tmp_path: Path) -> None:
    found = {}
    for workers, positions in ((1, 8), (3, 8), (1, 1)):
        grid = CohortGrid(PEOPLE, workers=workers, positions=positions)
        out = tmp_path / f"{workers}-{positions}"
        federate(grid, experiment(**RANKS), out)
        found[workers, positions] = read_checkpoint(out).state
    assert same_bits(found[1, 8], found[3, 8])
    assert 0 < difference(found[1, 8].adapter, found[1, 1].adapter) <= 5e-6


def test_what_clients_share_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broadcast once a rank, the sums once a round; a group has one frozen adapter."""
    orders: list[GroupOrder] = []
    experiment_ = experiment(**RANKS, federation__cohort=PEOPLE)
    world = shared_world(experiment_.base, experiment_.data, experiment_.lora, experiment_.seed)
    made = summed_weights(world.model).made

    def train(order: GroupOrder) -> list[Outcome]:
        orders.append(order)
        return train_order(order)

    federate(CohortGrid(PEOPLE, train=train, positions=8), experiment_, tmp_path)
    assert sorted(stacking_module.asked) == [(n, rank) for n in (1, 2, 3) for rank in (1, 2)]
    assert len(orders) > 6
    assert summed_weights(world.model).made - made == 2 * LAYERS  # rounds 2 and 3
    for round in (2, 3):
        mine = [order for order in orders if order.order.round == round]
        assert len({id(order.frozen) for order in mine}) == 1
        assert len({id(start) for order in mine for start in order.starts}) == 2
        assert any(len(order.starts) > 1 for order in mine)  # ranks are mixed in a group
    started = {
        client: start.ranks[0]
        for order in orders
        for client, start in zip(
            order.clients,
            order.starts * (len(order.clients) if len(order.starts) == 1 else 1),
            strict=True,
        )
    }
    assert started == {f"c{n:02}": (2, 1)[n % 2] for n in range(PEOPLE)}


def test_a_run_that_is_killed_in_a_round_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    def rounds(out: Path, count: int, **options: object) -> ServerState:
        grid = CohortGrid(PEOPLE, positions=8, **options)  # type: ignore[arg-type]
        federate(grid, experiment(**RANKS, federation__rounds=count), out)
        return read_checkpoint(out).state

    class Killed(BaseException):
        pass

    def kill(order: GroupOrder) -> list[Outcome]:
        if order.order.round == 3 and len(order.clients) > 1:
            raise Killed
        return train_order(order)

    expected = rounds(tmp_path / "whole", 4)
    with pytest.raises(Killed):
        rounds(tmp_path / "killed", 4, train=kill)
    assert read_checkpoint(tmp_path / "killed").state.round == 2
    found = rounds(tmp_path / "killed", 4, workers=2)
    assert same_bits(found, expected)
    cohorts = [[r.cohort for r in read_rounds(tmp_path / n)] for n in ("whole", "killed")]
    assert cohorts[0] == cohorts[1]


@pytest.mark.slow
def test_ray_workers_give_the_bits_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    here = run_rounds(experiment(**RANKS), tmp_path / "here", PEOPLE)
    there = run_rounds(experiment(**RANKS, engine__workers=2), tmp_path / "there", PEOPLE)
    assert same_bits(there.state, here.state)
    assert there.clients == here.clients


def test_private_factors_of_several_ranks_stay_with_their_clients(tmp_path: Path) -> None:
    def rounds(name: str, kind: str) -> Checkpoint:
        method = replace(stacking(), shared=frozenset({"A"}), aggregate=counted)
        patch = pytest.MonkeyPatch()
        with patch.context() as now:
            now.setitem(aggregation._METHODS, "stacking", lambda: method)
            run_rounds(
                experiment(**RANKS, federation__cohort=PEOPLE, engine__kind=kind),
                tmp_path / name,
                PEOPLE,
            )
        return read_checkpoint(tmp_path / name)

    def counted(state: ServerState, updates: object) -> ServerState:
        found = {u.client_id: u.adapter.ranks[0] for u in updates}  # type: ignore[attr-defined]
        assert found == {f"c{n:02}": (2, 1)[n % 2] for n in range(PEOPLE)}
        return replace(state, round=state.round + 1)

    together, alone = rounds("cohort", "cohort"), rounds("alone", "sequential")
    assert len(list((tmp_path / "cohort" / "private").iterdir())) == 2
    losses = [[r.loss for r in read_rounds(tmp_path / n)] for n in ("cohort", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][2] < losses[0][0]  # their own B goes on
    assert together.state.round == alone.state.round == 3


WATCH = {
    "federation.method": "stacking",
    "lora.rank": 2,
    "lora.target_modules": ["hidden", "classifier"],
    "data.clients": 4,
    "federation.cohort": 3,
    "federation.rounds": 2,
    "federation.local_steps": 4,
    "federation.learning_rate": 0.02,
    "personalization.cross": 2,
}


@pytest.mark.parametrize("kind", ["cohort", "sequential"])
def test_personal_adapters_are_whole(tmp_path: Path, kind: str) -> None:
    options = WATCH | {"engine.kind": kind, "personalization.steps": 3}
    run = simulate("watch", overrides=options, out=tmp_path / "run")
    state = read_checkpoint(run.folder).state
    assert state.frozen is not None
    assert run.adapter == state.adapter
    assert set(run.adapter.ranks) == {2 + MOST}
    assert load_adapter(run.folder / "adapter") == run.adapter  # as PEFT reads it
    assert load_adapter(run.folder / "adapter.safetensors") == run.adapter
    for file in (run.folder / "personal").iterdir():
        personal = load_adapter(file)
        for path, layer in personal.layers.items():
            whole = run.adapter[path]
            assert np.array_equal(layer.A[2:], whole.A[2:])  # the frozen part
            assert np.array_equal(layer.B[:, 2:], whole.B[:, 2:])
            assert np.abs(layer.B[:, :2]).max() > 1e-4  # the trained one
    for file in (run.folder / "own").iterdir():
        assert set(load_adapter(file).ranks) == {2}
    for row in run.clients:
        assert row["scores"]["personal"]["loss"] != row["scores"]["global"]["loss"]
        assert row["scores"]["global"]["loss"] != row["scores"]["base"]["loss"]


def test_both_ways_of_personalizing_agree_and_no_step_is_the_global_adapter(
    tmp_path: Path,
) -> None:
    # No own learning rate of AdamW's: SGD's steps do not turn noise into signs.
    options = WATCH | {"federation.optimizer": "sgd", "personalization.learning_rate": 0.02}
    rows = {}
    for kind in ("cohort", "sequential"):
        for steps in (0, 3):
            overrides = options | {"engine.kind": kind, "personalization.steps": steps}
            run = simulate("watch", overrides=overrides, out=tmp_path / f"{kind}-{steps}")
            rows[kind, steps] = run.clients
    for row in rows["sequential", 0]:
        assert row["scores"]["personal"] == pytest.approx(row["scores"]["global"], rel=1e-6)
    for mine, theirs in zip(rows["cohort", 3], rows["sequential", 3], strict=True):
        for name, scores in theirs["scores"].items():
            assert mine["scores"][name] == pytest.approx(scores, rel=1e-4, abs=1e-4)
