"""What single methods do beyond the laws: budgets, alternation, resume, refusals, the example."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import fedlora as fl
from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.aggregation import ClientProfile, Method, ServerState, Update, method, methods
from fedlora.aggregation.ranks import DISCARDED
from fedlora.errors import ConfigError, FederationError, ShapeMismatchError, UnsupportedError
from fedlora.formats import load_adapter, save_adapter
from tests.aggregation.rounds import products, random_adapter, trained
from tests.matching import raises
from tests.reference import methods as slow

SHAPES = [(12, 10), (9, 16)]


def start(seed: int = 0, *, rank: int = 4, zero_b: bool = True) -> Adapter:
    return random_adapter(np.random.default_rng(seed), SHAPES, rank, zero_b=zero_b)


def one_round(
    rule: Method, state: ServerState, seed: int, ranks: tuple[int | None, ...] = (None,) * 3
) -> tuple[ServerState, list[Update]]:
    rng = np.random.default_rng(seed)
    updates = [
        Update(trained(rule, state, ClientProfile(f"c{k}", rank), rng), 1.0 + k, f"c{k}")
        for k, rank in enumerate(ranks)
    ]
    return rule.aggregate(state, updates), updates


class TestRoLora:
    def test_rounds_take_turns_beginning_with_b(self) -> None:
        rule = method("rolora")
        assert [sorted(rule.uploaded(n)) for n in (1, 2, 3)] == [["B"], ["A"], ["B"]]
        one, _ = one_round(rule, ServerState.start(start()), 1)
        two, _ = one_round(rule, one, 2)
        for path, layer in two.trainable.layers.items():
            assert np.array_equal(one.trainable[path].A, start()[path].A)
            assert np.array_equal(layer.B, one.trainable[path].B)
            assert not np.array_equal(layer.A, one.trainable[path].A)


class TestFedSvd:
    def test_a_is_orthonormal_after_a_round(self) -> None:
        rule = method("fedsvd")
        state, _ = one_round(rule, ServerState.start(start()), 1)
        A = state.trainable["l1"].A
        np.testing.assert_allclose(A @ A.T, np.eye(4), rtol=0, atol=1e-6)  # float32

    def test_a_round_that_learned_nothing_leaves_the_factors(self) -> None:
        state = ServerState.start(start())
        after = method("fedsvd").aggregate(state, [Update(start(), 1.0, "c0")])
        for path, layer in after.trainable.layers.items():
            assert np.array_equal(layer.A, start()[path].A)
            assert not layer.B.any()


class TestFedSaLora:
    def test_b_stays_with_the_clients(self) -> None:
        rule = method("fedsa-lora")
        assert rule.rule(1).trained == {"A", "B"}
        assert rule.uploaded(1) == {"A"}
        state, _ = one_round(rule, ServerState.start(start()), 1)
        assert state.adapter.norm() == 0.0


class TestFlora:
    def test_clients_start_from_a_fresh_a_and_the_state_alone_decides_it(self) -> None:
        rule = method("flora")
        state, _ = one_round(rule, ServerState.start(start()), 1)
        again, _ = one_round(rule, ServerState.start(start()), 99)
        other, _ = one_round(rule, ServerState.start(start(5)), 1)
        assert state.trainable.norm() == 0.0
        assert state.trainable == again.trainable  # whatever the clients sent
        for path, layer in state.trainable.layers.items():
            assert np.corrcoef(layer.A.ravel(), start()[path].A.ravel())[0, 1] < 0.5
            assert not np.array_equal(layer.A, other.trainable[path].A)
            bound = 1 / np.sqrt(np.prod(layer.in_shape))
            assert bound / 2 < np.abs(layer.A).max() <= bound
        later, _ = one_round(rule, state, 2)
        assert not np.array_equal(later.trainable["l1"].A, state.trainable["l1"].A)

    def test_clients_of_mixed_ranks_and_rslora_lose_nothing(self) -> None:
        rule, rng = method("flora"), np.random.default_rng(1)
        begun = ServerState.start(random_adapter(rng, SHAPES, 4, rslora=True))
        state, updates = one_round(rule, begun, 1, (1, 2, None))
        assert [u.adapter.ranks for u in updates] == [(1, 1), (2, 2), (4, 4)]
        scalings = [u.adapter["l1"].scaling for u in updates]
        assert scalings == pytest.approx([3.0, 3.0 / 2**0.5, 1.5])
        found = products(state.adapter)
        for path, expected in slow.mean_products(updates).items():
            np.testing.assert_allclose(found[path], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
class TestBudgets:
    def test_a_rank_is_kept_and_the_discarded_energy_is_what_is_missing(self, name: str) -> None:
        state, _ = one_round(method(name, rank=3), ServerState.start(start()), 1)
        whole, _ = one_round(method(name), ServerState.start(start()), 1)
        assert state.frozen is not None
        assert whole.frozen is not None
        assert state.frozen.ranks == (3, 3)
        kept, full = products(state.frozen), products(whole.frozen)
        for path, share in zip(sorted(full), state.method_state[DISCARDED], strict=True):
            missing = np.sum((full[path] - kept[path]) ** 2) / np.sum(full[path] ** 2)
            assert 0.05 < share < 0.95
            assert share == pytest.approx(missing, rel=1e-5)  # float32 factors

    def test_an_energy_is_kept_by_the_smallest_rank_that_does(self, name: str) -> None:
        state, _ = one_round(method(name, energy=0.8), ServerState.start(start()), 1)
        whole, _ = one_round(method(name), ServerState.start(start()), 1)
        assert state.frozen is not None
        assert whole.frozen is not None
        for number, path in enumerate(sorted(state.frozen)):
            assert state.method_state[DISCARDED][number] <= 0.2
            squares = np.linalg.svd(products(whole.frozen)[path], compute_uv=False) ** 2
            rank = state.frozen[path].rank
            assert squares[: rank - 1].sum() < 0.8 * squares.sum() <= squares[:rank].sum()

    def test_without_a_budget_nothing_is_reported_and_the_method_is_exact(self, name: str) -> None:
        state, _ = one_round(method(name), ServerState.start(start()), 1)
        assert not state.method_state
        assert [method(name).exact, method(name, rank=3).exact] == [True, False]

    def test_a_saved_state_goes_on_with_the_same_bits(self, name: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
        rule = method(name, energy=0.9)
        state, _ = one_round(rule, ServerState.start(start()), 1)
        assert state.frozen is not None
        for part, adapter in {"trainable": state.trainable, "frozen": state.frozen}.items():
            save_adapter(adapter, tmp_path / f"{part}.safetensors")
        saved = ServerState(
            state.round,
            load_adapter(tmp_path / "trainable.safetensors"),
            load_adapter(tmp_path / "frozen.safetensors"),
            state.method_state,
        )
        one, _ = one_round(rule, state, 2)
        two, _ = one_round(rule, saved, 2)
        assert (one.trainable, one.frozen) == (two.trainable, two.frozen)
        assert np.array_equal(one.method_state[DISCARDED], two.method_state[DISCARDED])

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"rank": 0}, "rank: expected a whole number >= 1, found 0"),
            ({"rank": True}, "rank: expected a whole number >= 1, found True"),
            ({"energy": 0.0}, "energy: expected a share in (0, 1], found 0.0"),
            ({"energy": 1.5}, "energy: expected a share in (0, 1], found 1.5"),
            ({"energy": "x"}, "energy: expected a share in (0, 1], found 'x'"),
            ({"rank": 3, "energy": 0.5}, "at most one of rank and energy"),
        ],
    )
    def test_a_wrong_budget_is_refused(
        self, name: str, options: dict[str, object], text: str
    ) -> None:
        with raises(ConfigError, name, text):
            method(name, **options)


def test_fedex_ships_a_residual_of_k_minus_one_times_the_rank() -> None:
    rng = np.random.default_rng(0)
    begun = ServerState.start(random_adapter(rng, [(64, 64)], 4))
    state, _ = one_round(method("fedex-lora"), begun, 1)
    assert state.frozen is not None
    assert state.frozen.ranks == (2 * 4,)


def test_fedex_of_equal_clients_has_no_residual() -> None:
    mine = start(1, zero_b=False)
    updates = [Update(mine, 1.0 + k, f"c{k}") for k in range(3)]
    state = method("fedex-lora").aggregate(ServerState.start(start()), updates)
    assert (state.trainable, state.frozen) == (mine, None)


class TestFlexLora:
    def test_the_example_of_two_people_of_different_ranks(self) -> None:
        alice, bob = start(1, rank=4, zero_b=False), start(2, rank=2, zero_b=False)
        flexlora = fl.method("flexlora", rank=8)
        updates = [fl.Update(alice, 1200, "alice"), fl.Update(bob, 300, "bob")]
        state = flexlora.aggregate(fl.ServerState.start(alice), updates)
        assert state.adapter.ranks == (8, 8)
        assert (state.adapter.config.rank, state.adapter["l1"].scaling) == (8, 3.0 / 8)
        found = products(state.adapter)
        for path, expected in slow.mean_products(updates).items():  # 4 + 2 directions fit into 8
            np.testing.assert_allclose(found[path], expected, rtol=0, atol=1e-5)

    def test_a_client_of_low_rank_gets_the_best_of_its_rank(self) -> None:
        state, _ = one_round(method("flexlora"), ServerState.start(start()), 1)
        sent = method("flexlora").broadcast(state, ClientProfile("c", 2)).trainable
        assert (sent.ranks, sent["l1"].scaling, sent.config.rank) == ((2, 2), 1.5, 2)
        best = products(state.adapter.truncated(2))
        for path, found in products(sent).items():
            np.testing.assert_allclose(found, best[path], rtol=0, atol=1e-5)

    def test_at_the_start_a_cut_is_the_first_rows_of_a(self) -> None:
        sent = method("flexlora").broadcast(ServerState.start(start()), ClientProfile("c", 2))
        assert np.array_equal(sent.trainable["l1"].A, start()["l1"].A[:2])
        assert sent.trainable.norm() == 0.0

    def test_a_wrong_rank_is_refused(self) -> None:
        with raises(ConfigError, "flexlora, rank: expected a whole number >= 1, found 0"):
            method("flexlora", rank=0)


class TestHetLora:
    def test_clients_count_by_the_norm_of_their_product(self) -> None:
        big, small = start(1, zero_b=False), start(2, zero_b=False).scaled(1e-3)
        updates = [Update(big, 1.0, "big"), Update(small, 1e6, "small")]
        state = method("hetlora").aggregate(ServerState.start(start()), updates)
        for path, expected in products(big).items():
            error = np.linalg.norm(products(state.adapter)[path] - expected)
            assert error < 0.05 * np.linalg.norm(expected)

    def test_directions_that_nobody_has_can_still_be_trained_later(self) -> None:
        state, _ = one_round(method("hetlora"), ServerState.start(start()), 1, (2, 2))
        layer = state.trainable["l1"]
        assert np.array_equal(layer.A[2:], start()["l1"].A[2:])
        assert not layer.B[:, 2:].any()

    def test_a_rank_over_the_servers_is_refused(self) -> None:
        update = Update(start(1, rank=5, zero_b=False), 1.0, "c7")
        with raises(FederationError, "client 'c7', layer 'l0'", "at most 4", "found 5", "flora"):
            method("hetlora").aggregate(ServerState.start(start()), [update])


@pytest.mark.parametrize("name", methods())
class TestRefusals:
    def test_dora_with_its_reason(self, name: str) -> None:
        config = LoraConfig(rank=2, variant="dora")
        layer = LoraLayer(np.ones((2, 6)), np.ones((5, 2)), 1.5, np.ones(5))
        dora = Adapter({"fc": layer}, config)
        with raises(UnsupportedError, "client 'c0'", name, "DoRA has a magnitude"):
            method(name).aggregate(ServerState.start(dora), [Update(dora, 1.0, "c0")])

    def test_no_update(self, name: str) -> None:
        with raises(FederationError, f"round 1: {name} got no update to average"):
            method(name).aggregate(ServerState.start(start()), [])

    def test_mixed_ranks_where_factors_are_averaged(self, name: str) -> None:
        mine = start(1, rank=2, zero_b=False)
        updates = [Update(start(2, zero_b=False), 1.0, "c0"), Update(mine, 1.0, "c1")]
        if method(name).any_rank:
            assert method(name).aggregate(ServerState.start(start()), updates).round == 1
            return
        allowed = sorted(other for other, rule in methods().items() if rule.any_rank)
        with raises(ShapeMismatchError, "client 'c1'", f"{name} needs equal ranks", *allowed):
            method(name).aggregate(ServerState.start(start()), updates)

    def test_a_negative_or_another_scaling(self, name: str) -> None:
        update = Update(start(1, zero_b=False).scaled(-1.0), 1.0, "c1")
        with raises(FederationError, "client 'c1', layer 'l0'", "expected scaling"):
            method(name).aggregate(ServerState.start(start()), [update])

    def test_a_mean_that_float32_cannot_hold_is_never_a_nan(self, name: str) -> None:
        """Factors of 1e30 have products of 1e60, which an SVD splits into factors of 1e30."""
        huge = start(1, zero_b=False).map(
            lambda layer: replace(layer, A=1e30 * layer.A, B=1e30 * layer.B)
        )
        state = method(name).aggregate(ServerState.start(start()), [Update(huge, 1.0, "c0")])
        for layer in state.trainable.layers.values():
            assert np.isfinite(layer.A).all()
            assert np.isfinite(layer.B).all()


@pytest.mark.parametrize("turn", [1, -1])
def test_hetlora_leaves_a_client_without_a_product_out(turn: int) -> None:
    """Its weight is zero, also for which directions are taken to be somebody's."""
    updates = [
        Update(start(1, rank=4), 1.0, "zero"),
        Update(start(2, rank=2, zero_b=False), 1.0, "low"),
    ][::turn]
    state = method("hetlora").aggregate(ServerState.start(start()), updates)
    layer = state.trainable["l1"]
    assert np.array_equal(layer.A[2:], start()["l1"].A[2:])
    assert not layer.B[:, 2:].any()
