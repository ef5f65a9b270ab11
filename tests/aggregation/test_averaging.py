"""FedIT and FFA-LoRA against their slow twins, and what they refuse."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.aggregation import Method, ServerState, Update, method, methods
from fedlora.aggregation.averaging import GROUP, SHORT, RunningMean
from fedlora.errors import (
    ConfigError,
    FederationError,
    FedloraError,
    LayerMismatchError,
    ShapeMismatchError,
    UnknownNameError,
    UnsupportedError,
)
from fedlora.flat import RowForm, pack
from tests.federation.fakes import raises
from tests.reference import averaging as slow


def adapter(
    seed: int, *, rank: int = 2, out: int = 5, width: int = 6, scale: float = 1.0
) -> Adapter:
    rng = np.random.default_rng(seed)

    def layer(in_shape: tuple[int, ...], kind: str = "linear") -> LoraLayer:
        return LoraLayer(
            scale * rng.normal(size=(rank, *in_shape)),
            scale * rng.normal(size=(out, rank)),
            1.5,
            None,
            kind,  # type: ignore[arg-type]
        )

    layers = {"fc": layer((width,)), "conv": layer((width, 3), "conv"), "last": layer((width,))}
    return Adapter(layers, LoraConfig(rank=rank, lora_alpha=1.5 * rank))


def updates_of(start: Adapter, weights: list[float], *, same_a: bool = False) -> list[Update]:
    """One update a weight; with `same_a` the clients kept the server's A."""
    updates = []
    for number, weight in enumerate(weights):
        mine = adapter(number + 1, rank=start.ranks[0])
        if same_a:
            layers = {path: replace(mine[path], A=start[path].A) for path in mine}
            mine = replace(mine, layers=layers)
        updates.append(Update(mine, weight, f"c{number}"))
    return updates


weights = st.lists(st.floats(0.5, 1e6), min_size=1, max_size=6)
# One rounding to float32 at the end, of means whose terms are of order 4.
ROUNDING = 4 * np.finfo(np.float32).eps


@given(weights)
def test_fedit_is_its_slow_twin(numbers: list[float]) -> None:
    start = adapter(0)
    updates = updates_of(start, numbers)
    state = method("fedit").aggregate(ServerState.start(start), updates)
    for path, (a, b) in slow.fedit(updates).items():
        np.testing.assert_allclose(state.adapter[path].A, a, rtol=0, atol=ROUNDING)
        np.testing.assert_allclose(state.adapter[path].B, b, rtol=0, atol=ROUNDING)
    assert state.round == 1


@given(weights)
def test_ffa_lora_keeps_a_and_is_the_exact_mean(numbers: list[float]) -> None:
    start = adapter(0)
    updates = updates_of(start, numbers, same_a=True)
    state = method("ffa-lora").aggregate(ServerState.start(start), updates)
    exact = slow.mean_delta_weights(updates)
    for path in start:
        assert np.array_equal(state.adapter[path].A, start[path].A)
        np.testing.assert_allclose(state.adapter.delta_weight(path), exact[path], rtol=0, atol=1e-5)


def test_ffa_lora_ignores_an_a_that_a_client_sent_anyway() -> None:
    start = adapter(0)
    state = method("ffa-lora").aggregate(ServerState.start(start), updates_of(start, [1.0, 2.0]))
    assert all(np.array_equal(state.adapter[path].A, start[path].A) for path in start)


def test_fedit_misses_the_exact_mean_by_the_covariance_of_the_factors() -> None:
    start = adapter(0)
    updates = updates_of(start, [1.0, 2.0, 5.0])
    state = method("fedit").aggregate(ServerState.start(start), updates)
    exact, means = slow.mean_delta_weights(updates), slow.fedit(updates)
    for path, (a, b) in means.items():
        error = exact[path] - state.adapter.delta_weight(path)
        covariance = sum(
            u.num_examples / 8 * 1.5
            * np.tensordot(u.adapter[path].B - b, u.adapter[path].A - a, axes=(1, 0))
            for u in updates
        )  # fmt: skip
        assert np.abs(covariance).max() > 0.1
        np.testing.assert_allclose(error, covariance, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["fedit", "ffa-lora"])
class TestEveryMethod:
    def test_one_client_alone_gives_its_own_factors(self, name: str) -> None:
        start = adapter(0)
        (update,) = updates_of(start, [3.0], same_a=True)
        state = method(name).aggregate(ServerState.start(start), [update])
        assert state.adapter == update.adapter

    def test_weights_are_relative(self, name: str) -> None:
        start = adapter(0)
        one = method(name).aggregate(ServerState.start(start), updates_of(start, [1.0, 3.0]))
        two = method(name).aggregate(ServerState.start(start), updates_of(start, [250.0, 750.0]))
        assert one.adapter == two.adapter

    def test_the_order_of_clients_changes_nothing(self, name: str) -> None:
        start = adapter(0)
        updates = updates_of(start, [1.0, 7.0, 3.0, 1e5, 0.5])
        forth = method(name).aggregate(ServerState.start(start), updates).adapter
        back = method(name).aggregate(ServerState.start(start), updates[::-1]).adapter
        for path in start:
            # Sums in float64 differ by 1e-16 at most; after the rounding to float32 by nothing,
            # or by one last bit where they straddle it.
            np.testing.assert_allclose(forth[path].A, back[path].A, rtol=2e-7, atol=0)
            np.testing.assert_allclose(forth[path].B, back[path].B, rtol=2e-7, atol=0)

    def test_the_arguments_are_not_changed_and_the_other_state_stays(self, name: str) -> None:
        start = adapter(0)
        updates = updates_of(start, [1.0, 2.0])
        before = [start.fingerprint(), *(u.adapter.fingerprint() for u in updates)]
        state = replace(ServerState.start(start), round=4, frozen=start)
        after = method(name).aggregate(state, updates)
        assert (after.round, after.frozen) == (5, start)
        assert [start.fingerprint(), *(u.adapter.fingerprint() for u in updates)] == before
        assert state.round == 4

    def test_no_update_is_refused(self, name: str) -> None:
        with raises(FederationError, f"round 1: {name} got no update to average"):
            method(name).aggregate(ServerState.start(adapter(0)), [])


def test_updates_are_read_once_and_one_at_a_time() -> None:
    start = adapter(0, out=400, width=400)

    def stream(count: int) -> Iterator[Update]:
        for number in range(count):
            yield Update(adapter(number + 1, out=400, width=400), 1.0, f"c{number}")

    def peak(count: int) -> int:
        tracemalloc.start()
        method("fedit").aggregate(ServerState.start(start), stream(count))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(2)
    assert peak(40) < 1.3 * peak(4)


def test_a_stream_gives_the_same_as_a_list() -> None:
    start = adapter(0)
    updates = updates_of(start, [1.0, 2.0, 9.0])
    batch = method("fedit").aggregate(ServerState.start(start), updates)
    assert (
        method("fedit").aggregate(ServerState.start(start), iter(updates)).adapter == batch.adapter
    )


@pytest.mark.parametrize("name", ["fedit", "ffa-lora"])
def test_adapters_made_of_rows_give_the_same_bits_as_others(name: str) -> None:
    """A row of the uploaded factors, of both, and no row at all; each against the others."""
    start = adapter(0)
    plain = updates_of(start, [1.0, 7.0, 0.3], same_a=True)
    results = []
    for factors in (method(name).uploaded(1), frozenset({"A", "B"})):
        form = RowForm.of(start, factors)  # type: ignore[arg-type]
        rows = [pack(update.adapter, form.segments).tobytes() for update in plain]
        updates = [
            replace(update, adapter=form.read(row)) for update, row in zip(plain, rows, strict=True)
        ]
        results.append(method(name).aggregate(ServerState.start(start), updates).adapter)
    expected = method(name).aggregate(ServerState.start(start), plain).adapter
    assert results == [expected, expected]


def test_a_state_does_not_keep_the_states_before_it_alive() -> None:
    """What is made of a row knows the adapter it is like: the global adapter must not."""
    start = adapter(0)
    state = method("fedit").aggregate(ServerState.start(start), updates_of(start, [1.0]))
    assert state.adapter.made_of is None
    assert not any(state.adapter[path].A.flags.writeable for path in start)


def test_a_thousand_clients_lose_no_precision() -> None:
    """The mean of 1000 equal updates is the update itself; a float32 sum misses it by 1e-5."""
    start, mine = adapter(0), adapter(1)
    updates = (Update(mine, 0.1, f"c{number}") for number in range(1000))
    assert method("fedit").aggregate(ServerState.start(start), updates).adapter == mine


def test_float64_sums_survive_what_float32_would_swallow() -> None:
    start, big = adapter(0), adapter(1, scale=1e8)
    updates = [Update(big, 1.0, "a"), Update(adapter(2), 1.0, "b"), Update(big, 1.0, "c")]
    minus = big.map(lambda layer: replace(layer, A=-layer.A, B=-layer.B))
    updates[2] = Update(minus, 1.0, "c")
    state = method("fedit").aggregate(ServerState.start(start), updates)
    expected = updates[1].adapter
    for path in start:
        np.testing.assert_allclose(
            state.adapter[path].A, expected[path].A / 3, rtol=1e-6, atol=1e-7
        )


def _refuse(change: dict[str, object]) -> list[Update]:
    good = updates_of(adapter(0), [1.0, 1.0])
    return [good[0], replace(good[1], **change)]  # type: ignore[arg-type]


def _layers(**change: LoraLayer) -> Adapter:
    return replace(adapter(2), layers={**adapter(2).layers, **change})


def _scaled() -> Adapter:
    return adapter(2).scaled(2.0)


_DORA = Adapter(
    {"fc": LoraLayer(np.ones((2, 6)), np.ones((5, 2)), 1.5, np.ones(5))},
    LoraConfig(rank=2, variant="dora"),
)
REFUSALS: dict[str, tuple[dict[str, object], type[FedloraError], str]] = {
    "another rank": (
        {"adapter": adapter(2, rank=3)},
        ShapeMismatchError,
        "client 'c1', layer 'conv': expected A (2, 6, 3) and B (5, 2), found A (3, 6, 3) and B "
        "(5, 3); fedit needs equal ranks, use flexlora, flora or hetlora for mixed ones",
    ),
    "rank 1, which would broadcast": (
        {"adapter": adapter(2, rank=1)},
        ShapeMismatchError,
        "client 'c1', layer 'conv': expected A (2, 6, 3) and B (5, 2), found A (1, 6, 3) and B "
        "(5, 1); fedit needs equal ranks, use flexlora, flora or hetlora for mixed ones",
    ),
    "a layer too many": (
        {"adapter": _layers(head=adapter(2)["fc"])},
        LayerMismatchError,
        "client 'c1': 1 unexpected layer(s): 'head'",
    ),
    "no examples": (
        {"num_examples": 0.0},
        FederationError,
        "client 'c1': expected num_examples > 0 and finite, found 0.0",
    ),
    "fewer than none": (
        {"num_examples": -50.0},
        FederationError,
        "client 'c1': expected num_examples > 0 and finite, found -50.0",
    ),
    "an infinity": (
        {"num_examples": float("inf")},
        FederationError,
        "client 'c1': expected num_examples > 0 and finite, found inf",
    ),
    "not a number": (
        {"num_examples": float("nan")},
        FederationError,
        "client 'c1': expected num_examples > 0 and finite, found nan",
    ),
    "another scaling": (
        {"adapter": _scaled()},
        FederationError,
        "client 'c1', layer 'conv': expected scaling 1.5 as the server has, found 3; factors "
        "can only be averaged under one scaling, use flexlora, flora or hetlora for mixed ones",
    ),
    "DoRA": (
        {"adapter": _DORA},
        UnsupportedError,
        "client 'c1': fedit averages A and B alone, DoRA has a magnitude; use variant 'lora'",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_wrong_update_is_refused_and_its_client_named(name: str) -> None:
    change, error, text = REFUSALS[name]
    with raises(error, text):
        method("fedit").aggregate(ServerState.start(adapter(0)), _refuse(change))


def test_the_methods_say_what_they_are() -> None:
    table = {name: (m.exact, m.linear, sorted(m.uploaded(1))) for name, m in methods().items()}
    assert table["fedit"] == (False, True, ["A", "B"])
    assert table["ffa-lora"] == (True, True, ["B"])
    assert all(isinstance(m, Method) and m.name == name for name, m in methods().items())
    assert method("ffa-lora").rule(3).trained == {"B"}


def test_an_unknown_method_or_option_is_refused() -> None:
    with raises(UnknownNameError, "unknown method 'fedti'; did you mean 'fedit'?"):
        method("fedti")
    with pytest.raises(
        ConfigError, match=r"^method 'fedit': .*unexpected keyword argument 'rank'$"
    ):
        method("fedit", rank=3)


@pytest.mark.parametrize("clients", [1, 15, 16, 17, 140])
def test_the_grouped_sum_of_long_rows_is_the_slow_twin(clients: int) -> None:
    """16 rows a product, 8 products a float32 sum, and what is left over in float64."""
    start = adapter(0, rank=8, out=700, width=900)  # rows of some 38,000 numbers: odd last block
    weights = [float(w) for w in np.random.default_rng(1).integers(1, 10**6, clients)]
    updates = [
        Update(adapter(k % 5 + 1, rank=8, out=700, width=900), weight, f"c{k}")
        for k, weight in enumerate(weights)
    ]
    state = method("fedit").aggregate(ServerState.start(start), iter(updates))
    for path, (a, b) in slow.fedit(updates).items():
        # Sums of 16 and of 8 terms in float32, and the last rounding; values are about 4 at most.
        np.testing.assert_allclose(state.adapter[path].A, a, rtol=0, atol=1e-6)
        np.testing.assert_allclose(state.adapter[path].B, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("first", [1, GROUP, GROUP + 5])
def test_a_mean_that_was_looked_at_goes_on(first: int) -> None:
    """Long rows change their way of summing with the first whole group, whenever it comes."""
    rng = np.random.default_rng(0)
    like = Adapter({"fc": LoraLayer(np.zeros((4, SHORT)), np.zeros((8, 4)), 1.0)}, LoraConfig())
    form = RowForm.of(like, {"A", "B"})
    rows = rng.normal(size=(2 * GROUP + 7, form.size)).astype(np.float32)
    weights = rng.integers(1, 100, len(rows)).astype(float)
    mean = RunningMean(like, frozenset({"A", "B"}))
    for number, (row, weight) in enumerate(zip(rows, weights, strict=True), 1):
        mean.add(form.read(row.tobytes()), weight)
        if number in (first, len(rows)):
            expected = weights[:number] @ rows[:number].astype(np.float64) / weights[:number].sum()
            # A few roundings of float32, of numbers of about 1.
            np.testing.assert_allclose(mean.row, expected, rtol=0, atol=2e-7)
