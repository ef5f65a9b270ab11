"""Laws that every method keeps, whatever the shapes, ranks and weights; and who breaks them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.aggregation import ClientProfile, Method, ServerState, Update, methods
from fedlora.aggregation.averaging import running_mean
from fedlora.aggregation.ranks import mean_products
from fedlora.aggregation.svd import orthonormal
from tests.aggregation.rounds import (
    EPS,
    Round,
    assert_products,
    products,
    random_adapter,
    rounds,
    trained,
)
from tests.reference import methods as slow
from tests.reference.wrong_methods import WRONG

METHODS = methods()
every = pytest.mark.parametrize("name", METHODS)
few = settings(max_examples=20)


def after(method: Method, case: Round) -> ServerState:
    return method.aggregate(case.state, case.updates)


def is_its_slow_twin(method: Method, case: Round) -> None:
    """The whole adapter is what the dense loops make: for exact methods the mean of products."""
    expected = slow.EXPECTED[method.name](case.state, case.updates)
    assert_products(products(after(method, case).adapter), expected, case.size)


def keeps_what_all_clients_agree_on(method: Method, case: Round) -> None:
    """K equal clients are a fixed point, in product space."""
    (mine,) = case.updates
    same = [replace(mine, client_id=f"c{k}", num_examples=k + 1.0) for k in range(4)]
    found = method.aggregate(case.state, same)
    expected = slow.exact(case.state, [mine])
    if "B" not in method.shared:  # B stayed at home: the law is of A alone
        expected = slow.fedsa_lora(case.state, [mine])
    assert_products(products(found.adapter), expected, case.size)


@every
@few
@given(data=st.data())
def test_a_method_is_its_slow_twin(name: str, data: st.DataObject) -> None:
    is_its_slow_twin(METHODS[name], data.draw(rounds(METHODS[name])))


@every
@few
@given(data=st.data())
def test_equal_clients_are_a_fixed_point(name: str, data: st.DataObject) -> None:
    case = data.draw(rounds(METHODS[name], clients=1, larger=0))  # what fits into the rank
    keeps_what_all_clients_agree_on(METHODS[name], case)


@every
@few
@given(data=st.data())
def test_the_order_of_clients_and_of_keys_changes_nothing(name: str, data: st.DataObject) -> None:
    case = data.draw(rounds(METHODS[name]))
    turned = [
        replace(u, adapter=replace(u.adapter, layers=dict(reversed(u.adapter.layers.items()))))
        for u in reversed(case.updates)
    ]
    one, two = after(METHODS[name], case), METHODS[name].aggregate(case.state, turned)
    assert_products(products(two.adapter), products(one.adapter), case.size)
    assert_products(products(two.trainable), products(one.trainable), case.size)


@every
@few
@given(data=st.data(), factor=st.floats(1e-3, 1e3))
def test_the_scale_of_the_weights_changes_nothing(
    name: str, data: st.DataObject, factor: float
) -> None:
    case = data.draw(rounds(METHODS[name]))
    scaled = [replace(u, num_examples=u.num_examples * factor) for u in case.updates]
    one, two = after(METHODS[name], case), METHODS[name].aggregate(case.state, scaled)
    assert_products(products(two.adapter), products(one.adapter), case.size)


@every
@few
@given(data=st.data())
def test_a_stream_is_a_list_and_nothing_that_went_in_changes(
    name: str, data: st.DataObject
) -> None:
    case = data.draw(rounds(METHODS[name]))
    inputs = [case.state.adapter, case.state.trainable, *(u.adapter for u in case.updates)]
    before = [adapter.fingerprint() for adapter in inputs]
    batch = after(METHODS[name], case)
    stream = METHODS[name].aggregate(case.state, (update for update in case.updates))
    assert (stream.trainable, stream.frozen) == (batch.trainable, batch.frozen)
    assert [adapter.fingerprint() for adapter in inputs] == before
    assert stream.round == case.state.round + 1


@every
@few
@given(data=st.data())
def test_clients_can_go_on_from_the_state_after(name: str, data: st.DataObject) -> None:
    """The trainable part keeps its layout, and no direction of it is dead: A's rows are not zero
    where B's columns are."""
    case = data.draw(rounds(METHODS[name]))
    found = after(METHODS[name], case)
    case.state.trainable.require_same_layout(found.trainable, "after")
    for path, layer in found.trainable.layers.items():
        assert layer.scaling == case.state.trainable[path].scaling
        rows = np.abs(layer.A.reshape(layer.rank, -1)).max(axis=1)
        columns = np.abs(layer.B).max(axis=0)
        assert np.all(rows + columns > 0)
    if found.frozen is not None:
        assert list(found.frozen) == list(found.trainable)
        for path, layer in found.frozen.layers.items():
            like = found.trainable[path]
            assert layer.rank <= min(layer.out_features, int(np.prod(like.in_shape)))


@every
@few
@given(data=st.data())
def test_a_broadcast_has_the_rank_that_was_asked_for(name: str, data: st.DataObject) -> None:
    """For methods of mixed ranks; the others send all the same. The whole rank is the state."""
    case = data.draw(rounds(METHODS[name]))
    state, method = after(METHODS[name], case), METHODS[name]
    rank = data.draw(st.integers(1, 5))
    sent = method.broadcast(state, ClientProfile("c", rank))
    assert method.broadcast(state, ClientProfile("d", rank)).trainable is sent.trainable
    whole = method.broadcast(state, ClientProfile("e"))
    assert (whole.trainable, whole.frozen) == (state.trainable, state.frozen)
    for path, layer in sent.trainable.layers.items():
        expected = min(rank, state.trainable[path].rank) if method.any_rank else layer.rank
        assert (layer.rank, layer.scaling) == (
            expected,
            pytest.approx(sent.trainable.config.scaling_of(path)),
        )


# -- in float64: what the methods compute before they round ---------------------------------------


@pytest.mark.parametrize("name", sorted(n for n, m in METHODS.items() if m.exact and m.linear))
@few
@given(data=st.data())
def test_linear_exact_methods_equal_the_mean_of_products_in_float64(
    name: str, data: st.DataObject
) -> None:
    """The other factor is the same at all clients, so the float64 mean of one is the mean of all.
    1e-12: some hundred float64 roundings of numbers of order 10."""
    method = METHODS[name]
    case = data.draw(rounds(method))
    (factor,) = method.uploaded(case.state.round + 1)
    mean = running_mean(case.state, case.updates, frozenset({factor}), name)
    exact = slow.mean_products(case.updates)
    for segment, value in mean.factor_rows():
        layer = case.state.trainable[segment.path]
        B = value if factor == "B" else layer.B.astype(float)
        A = (value if factor == "A" else layer.A.astype(float)).reshape(layer.rank, -1)
        if name == "fedsvd":
            [(B, A)] = orthonormal([(B, A)])
            np.testing.assert_allclose(A @ A.T, np.eye(len(A)), rtol=0, atol=1e-12)
        expected = exact[segment.path]
        np.testing.assert_allclose(layer.scaling * B @ A, expected, rtol=0, atol=1e-12 * case.size)


@few
@given(data=st.data())
def test_stacks_equal_the_mean_of_products_in_float64(data: st.DataObject) -> None:
    case = data.draw(rounds(METHODS["flora"]))
    sums, total = mean_products(case.state, case.updates, "flora")
    for path, expected in slow.mean_products(case.updates).items():
        B, A = sums[path].svd(total).balanced(0.7)
        np.testing.assert_allclose(0.7 * B @ A, expected, rtol=0, atol=1e-12 * case.size)


@few
@given(data=st.data())
def test_the_error_of_fedit_is_its_formula(data: st.DataObject) -> None:
    """``Σ p_k s (B_k - B)(A_k - A)``, which two different clients make other than zero."""
    case = data.draw(rounds(METHODS["fedit"], clients=2))
    case = replace(case, updates=[u for u in case.updates if u.adapter.norm() > 0])
    if len(case.updates) < 2:
        return
    total = sum(update.num_examples for update in case.updates)
    found = products(after(METHODS["fedit"], case).adapter)
    for path, exact in slow.mean_products(case.updates).items():
        parts = [(u.num_examples / total, *slow.factors(u, path)) for u in case.updates]
        b = sum(p * b_k for p, b_k, _, _ in parts)
        a = sum(p * a_k for p, _, a_k, _ in parts)
        formula = sum(p * s * (b_k - b) @ (a_k - a) for p, b_k, a_k, s in parts)
        assert np.abs(formula).max() > 0
        np.testing.assert_allclose(exact - found[path], formula, rtol=0, atol=EPS * case.size)


@few
@given(data=st.data())
def test_the_error_of_flexlora_is_the_tail_of_the_spectrum(data: st.DataObject) -> None:
    case = data.draw(rounds(METHODS["flexlora"]))
    found = products(after(METHODS["flexlora"], case).adapter)
    for path, exact in slow.mean_products(case.updates).items():
        tail = np.linalg.svd(exact, compute_uv=False)[case.state.trainable[path].rank :]
        error = np.linalg.norm(exact - found[path])
        # 7 x 14 numbers at most, each with its rounding.
        np.testing.assert_allclose(error, np.linalg.norm(tail), rtol=0, atol=10 * EPS * case.size)


# -- known errors, and the mistakes of others ------------------------------------------------------

CLIENTS, WIDTH, RANK = 5, 64, 4


def relative_error(method: Method) -> float:
    """Over ten draws of independent random factors, K=5, d=64, r=4, s=2."""
    errors = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        start = random_adapter(rng, [(WIDTH, WIDTH)], RANK, alpha=2.0 * RANK)
        state = ServerState.start(start)
        case = [
            Update(trained(method, state, ClientProfile(""), rng), 1.0, f"c{k}")
            for k in range(CLIENTS)
        ]
        (exact,) = slow.mean_products(case).values()
        (found,) = products(method.aggregate(state, case).adapter).values()
        errors.append(float(np.linalg.norm(found - exact) / np.linalg.norm(exact)))
    return float(np.mean(errors))


# Means over draws that scatter by 0.01; exact methods have the rounding of float32 left.
KNOWN_ERRORS = {
    "fedit": 0.893,
    "flexlora": 0.732,
    "fedex-lora": 0.0,
    "fedsvd": 0.0,
    "ffa-lora": 0.0,
    "flora": 0.0,
    "rolora": 0.0,
}


@pytest.mark.parametrize("name", KNOWN_ERRORS)
def test_methods_have_their_known_errors(name: str) -> None:
    expected = KNOWN_ERRORS[name]
    assert relative_error(METHODS[name]) == pytest.approx(expected, abs=0.01 if expected else 1e-6)


# Errors of public code in this setting, over the same draws; the last two are K - 1.
KNOWN_MISTAKES = {
    "fedex-unscaled": 0.447,
    "fedex-transposed": 1.263,
    "flexlora-rootless": 0.864,
    "ffa-summed": 4.0,
    "flora-unweighted": 4.0,
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_have_their_known_errors(name: str) -> None:
    assert relative_error(WRONG[name]) == pytest.approx(KNOWN_MISTAKES[name], abs=0.01)


@pytest.mark.parametrize("name", WRONG)
def test_the_laws_catch_the_mistake(name: str) -> None:
    """One draw of square layers, where shapes alone would let every mistake pass."""
    rng = np.random.default_rng(7)
    state = ServerState.start(random_adapter(rng, [(6, 6)], 2, alpha=4.0))
    updates = [
        Update(trained(WRONG[name], state, ClientProfile(""), rng), 1.0 + k, f"c{k}")
        for k in range(3)
    ]
    right = METHODS[WRONG[name].name]
    is_its_slow_twin(right, Round(state, updates))
    with pytest.raises(AssertionError):
        is_its_slow_twin(WRONG[name], Round(state, updates))


def test_every_method_has_a_slow_twin() -> None:
    assert slow.EXPECTED.keys() == METHODS.keys()


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_the_frozen_part_holds_all_rounds_each_once(name: str) -> None:
    method, rng = METHODS[name], np.random.default_rng(3)
    state = ServerState.start(random_adapter(rng, [(9, 8)], 2, zero_b=True))
    for _ in range(3):
        updates = [
            Update(trained(method, state, ClientProfile(""), rng), 1.0 + k, f"c{k}")
            for k in range(3)
        ]
        before = slow.frozen_products(state)["l0"]
        state = method.aggregate(state, updates)
        expected = before + slow.mean_products(updates)["l0"]
        found = products(state.adapter)["l0"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)  # float32, of order 10
