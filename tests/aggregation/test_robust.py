"""Robust rules against their slow twins, what they bound, and what they leave alone."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapter import Adapter
from fedlora.aggregation import (
    ClientProfile,
    Method,
    ServerState,
    Update,
    method,
    methods,
    with_rule,
)
from fedlora.aggregation.product_space import moved_by, reach, squared_distances
from fedlora.aggregation.robust import RULES, fewest_updates
from fedlora.errors import (
    ConfigError,
    ShapeMismatchError,
    TooFewUpdatesError,
    UnknownNameError,
)
from fedlora.federation.replies import LARGEST
from tests.aggregation.test_averaging import adapter, updates_of
from tests.federation.fakes import raises
from tests.reference import robust as slow

MEANS = sorted(name for name, value in methods().items() if value.linear)
METHODS = sorted(methods())
# Options with which a rule changes nothing, for clients of equal weight.
LOOSE: Mapping[str, dict[str, Any]] = {
    "max-share": {"share": 1.0},
    "multi-krum": {"attackers": 0},
    "norm-bound": {"bound": 1e12},
    "trimmed-mean": {"share": 0.0},
}


def near(start: Adapter, seed: int, size: float = 0.1) -> Adapter:
    """A client's small step from what was sent."""
    noise = adapter(seed, rank=start.ranks[0])
    layers = {
        path: replace(
            start[path],
            A=start[path].A + np.float32(size) * noise[path].A,
            B=start[path].B + np.float32(size) * noise[path].B,
        )
        for path in start
    }
    return replace(start, layers=layers)


def sent_by(built: Method, state: ServerState) -> Adapter:
    """What a client of the global rank trains on."""
    return built.broadcast(state, ClientProfile("c0")).trainable


def cohort(built: Method, state: ServerState, count: int, **options: float) -> list[Update]:
    """Honest clients of equal weight; the factors that are not uploaded are those sent."""
    updates, sent = [], sent_by(built, state)
    for number in range(count):
        mine = near(sent, number + 1, **options)
        uploaded = built.uploaded(state.round + 1)
        layers = {
            path: replace(
                mine[path],
                A=mine[path].A if "A" in uploaded else sent[path].A,
                B=mine[path].B if "B" in uploaded else sent[path].B,
            )
            for path in sent
        }
        updates.append(Update(replace(mine, layers=layers), 1.0, f"c{number}"))
    return updates


def scaled(update: Update, sent: Adapter, factor: float) -> Update:
    """The attack "sign x n": the change times a negative number."""
    return replace(update, adapter=moved_by(sent, update.adapter, factor))


def ruled(name: str, rule: str, **options: Any) -> Method:
    return with_rule(method(name), rule, **options)


def pairs(rules: Iterable[str]) -> list[tuple[str, str]]:
    """Every method with every rule that it allows; what is refused is tested apart."""
    of_factors = ("median", "trimmed-mean")
    return [(name, r) for name in METHODS for r in rules if name in MEANS or r not in of_factors]


@pytest.mark.parametrize(("name", "rule"), pairs(LOOSE))
@pytest.mark.parametrize("count", [3, 4, 7])
def test_loose_settings_are_the_plain_method_bit_for_bit(name: str, rule: str, count: int) -> None:
    built, state = ruled(name, rule, **LOOSE[rule]), ServerState.start(adapter(0))
    updates = cohort(built, state, count)
    expected = method(name).aggregate(state, updates)
    assert built.aggregate(state, updates).adapter == expected.adapter


@pytest.mark.parametrize("name", MEANS)
def test_the_median_of_one_or_two_is_their_mean(name: str) -> None:
    built, state = ruled(name, "median"), ServerState.start(adapter(0))
    for count in (1, 2):
        updates = cohort(built, state, count)
        expected = method(name).aggregate(state, updates).adapter
        found = built.aggregate(state, updates).adapter
        for path in found:
            # The median of two is taken in float32: one rounding of numbers of order 4.
            np.testing.assert_allclose(found[path].A, expected[path].A, rtol=0, atol=5e-7)
            np.testing.assert_allclose(found[path].B, expected[path].B, rtol=0, atol=5e-7)


@pytest.mark.parametrize(("name", "rule"), pairs(RULES))
def test_the_order_of_clients_changes_not_a_bit_and_no_argument_changes(
    name: str, rule: str
) -> None:
    built, state = ruled(name, rule), ServerState.start(adapter(0))
    updates = [
        replace(update, num_examples=1.0 + number)
        for number, update in enumerate(cohort(built, state, 7))
    ]
    updates[2] = scaled(updates[2], sent_by(built, state), -10.0)
    before = [state.adapter.fingerprint(), *(u.adapter.fingerprint() for u in updates)]
    expected = built.aggregate(state, updates)
    for seed in range(4):
        shuffled = random.Random(seed).sample(updates, len(updates))
        assert built.aggregate(state, iter(shuffled)).adapter == expected.adapter
    assert [state.adapter.fingerprint(), *(u.adapter.fingerprint() for u in updates)] == before
    assert (expected.round, state.round) == (1, 0)


@pytest.mark.parametrize(("name", "rule"), pairs(RULES))
def test_clients_that_all_send_the_same_are_believed(name: str, rule: str) -> None:
    built, state = ruled(name, rule), ServerState.start(adapter(0))
    (one,) = cohort(built, state, 1)
    updates = [replace(one, client_id=f"c{number}") for number in range(7)]
    expected = method(name).aggregate(state, updates).adapter
    found = built.aggregate(state, updates).adapter
    if method(name).linear:
        assert found == expected
    for path in found:  # an SVD of fewer equal parts differs in the last bits of order 10
        np.testing.assert_allclose(
            found.delta_weight(path), expected.delta_weight(path), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.3, 0.49])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 10])
def test_the_trimmed_mean_is_its_slow_twin(share: float, count: int) -> None:
    state, built = (
        ServerState.start(adapter(0)),
        with_rule(method("fedit"), "trimmed-mean", share=share),
    )
    updates = cohort(built, state, count)
    found = built.aggregate(state, updates).adapter
    cut = min(int(np.ceil(round(share * count, 6))), (count - 1) // 2)
    for path in found:
        for factor in ("A", "B"):
            rows = [getattr(u.adapter[path], factor).ravel().astype(float) for u in updates]
            expected = [slow.trimmed_mean(list(column), cut) for column in zip(*rows, strict=True)]
            # One rounding to float32 of numbers of order 4.
            np.testing.assert_allclose(
                getattr(found[path], factor).ravel(), expected, rtol=0, atol=5e-7
            )


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize(
    ("rule", "options"),
    [("median", {}), ("trimmed-mean", {"share": 0.2}), ("multi-krum", {"attackers": 2})],
)
@pytest.mark.parametrize("factor", [-10.0, 1e4])
def test_two_attackers_of_ten_cannot_leave_what_honest_clients_span(
    name: str, rule: str, options: dict[str, Any], factor: float
) -> None:
    built, state = ruled(name, rule, **options), ServerState.start(adapter(0))
    updates = cohort(built, state, 10)
    honest = updates[2:]
    updates[:2] = [
        replace(scaled(update, sent_by(built, state), factor), num_examples=1e12)
        for update in updates[:2]
    ]
    sent, after = sent_by(built, state), built.aggregate(state, updates).trainable
    for path in after:
        for part in built.uploaded(1):
            low, high = (
                end([getattr(u.adapter[path], part) for u in honest], axis=0)
                for end in (np.min, np.max)
            )
            found, rounding = getattr(after[path], part), 5e-7  # of numbers of order 4 to float32
            if name == "fedsvd":
                # Its server's factors are new ones for the product that the clients' B has with the
                # A that was sent: that B is what they span. The product's rounding, of numbers of
                # order 10, grows by what A's inverse is larger than 1.
                inverse = np.linalg.pinv(sent[path].A.reshape(sent[path].rank, -1))
                product = after[path].B.astype(float) @ after[path].A.reshape(len(inverse.T), -1)
                found = product @ inverse
                rounding = 2e-6 * max(1.0, float(np.linalg.norm(inverse, 2)))
            assert np.all((found >= low - rounding) & (found <= high + rounding))


@given(
    seed=st.integers(0, 10**6), size=st.floats(1e-4, 100), share=st.floats(1e-3, 1),
    zero=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_reach_is_its_slow_twin_and_no_less_than_the_products_change(
    seed: int, size: float, share: float, zero: bool
) -> None:
    sent = adapter(seed)
    if zero:  # as in the first round
        sent = sent.map(lambda layer: replace(layer, B=np.zeros_like(layer.B)))
    got = near(sent, seed + 1, size)
    found = reach(sent, got)
    line, curve = slow.reach(sent, got)
    # Norms from Gram matrices lose half the digits of float64 where the product nearly cancels.
    assert found.line == pytest.approx(line, rel=1e-6, abs=1e-9)
    assert found.curve == pytest.approx(curve, rel=1e-12)
    assert found.whole >= slow.change_norm(sent, got) * (1 - 1e-9)
    bound = share * found.whole
    inside = moved_by(sent, got, found.share_within(bound))
    # The factors are rounded to float32: 6e-8 of numbers of order 4, next to a change of `size`.
    assert reach(sent, inside).whole == pytest.approx(bound, rel=1e-4 + 1e-5 / (size * share))


def test_reach_sees_an_a_that_hides_beside_a_zero_b() -> None:
    sent = adapter(0).map(lambda layer: replace(layer, B=np.zeros_like(layer.B)))
    got = sent.map(lambda layer: replace(layer, A=layer.A + np.float32(1e5)))
    assert slow.change_norm(sent, got) == 0
    assert reach(sent, got).whole > 1e10


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bound", [0.5, "median"])
@given(seed=st.integers(0, 1000), weight=st.sampled_from([1.0, 1e12]))
@settings(max_examples=12, deadline=None)
def test_norm_bound_bounds_what_the_global_product_moves_by(
    name: str, bound: float | str, seed: int, weight: float
) -> None:
    """For a mean of products and for a product of means, cross terms between clients included."""
    built = with_rule(method(name), "norm-bound", bound=bound)
    state = ServerState.start(adapter(seed))
    sent, updates = sent_by(built, state), cohort(built, state, 10)
    hidden = moved_by(sent, updates[1].adapter, 1e3)
    layers = {path: replace(hidden[path], B=sent[path].B) for path in hidden}
    updates[0] = replace(scaled(updates[0], sent, -1e3), num_examples=weight)
    updates[1] = replace(updates[1], adapter=replace(hidden, layers=layers))
    limit = bound
    if isinstance(bound, str):
        reaches = [sum(slow.reach(sent, u.adapter)) for u in updates]
        limit = float(np.median([value for value in reaches if value > 0]))
    after = built.aggregate(state, updates).adapter
    # A method that cuts its mean to a rank moves by that much once more at most (Eckart-Young: the
    # adapter before is of that rank too, so that the cut is no farther from the mean than it is).
    times = 1.0 if method(name).linear or method(name).exact else 2.0
    # The sums are rounded to float32: 6e-8 of products of order 10 to 100.
    assert slow.change_norm(state.adapter, after) <= times * float(limit) * (1 + 1e-5) + 1e-4


def test_norm_bound_leaves_updates_in_bounds_as_they_are() -> None:
    built, state = with_rule(method("fedit"), "norm-bound"), ServerState.start(adapter(0))
    updates = cohort(built, state, 5)
    wild = [
        *updates,
        *(replace(scaled(updates[0], state.trainable, -10.0), client_id=f"d{n}") for n in range(2)),
    ]
    seen: list[Update] = []
    spy = replace(method("fedit"), aggregate=lambda state, got: (seen.extend(got), state)[1])
    with_rule(spy, "norm-bound").aggregate(state, wild)
    by_client = {update.client_id: update for update in seen}
    reaches = {u.client_id: reach(state.trainable, u.adapter).whole for u in wild}
    limit = float(np.median(list(reaches.values())))
    for update in wild:
        if reaches[update.client_id] <= limit:
            assert by_client[update.client_id] is update
        else:
            now = reach(state.trainable, by_client[update.client_id].adapter).whole
            assert now == pytest.approx(limit, rel=1e-5)
    assert built.name == "fedit+norm-bound"


def test_a_fixed_bound_reads_updates_as_a_stream() -> None:
    state, order = ServerState.start(adapter(0)), []

    def consume(state: ServerState, updates: Any) -> ServerState:
        for update in updates:
            order.append(f"used {update.client_id}")
        return state

    def stream() -> Any:
        for update in cohort(method("fedit"), state, 3):
            order.append(f"sent {update.client_id}")
            yield update

    with_rule(replace(method("fedit"), aggregate=consume), "norm-bound", bound=1.0).aggregate(
        state, stream()
    )
    assert order == ["sent c0", "used c0", "sent c1", "used c1", "sent c2", "used c2"]


@pytest.mark.parametrize("count", [3, 5, 9])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_distances_are_their_slow_twin(count: int, size: float) -> None:
    state = ServerState.start(adapter(0))
    got = [update.adapter for update in cohort(method("fedit"), state, count, size=size)]
    found = squared_distances([(state.trainable, mine) for mine in got])
    # Inner products in float64 of changes that are all of one size.
    np.testing.assert_allclose(
        found, slow.squared_distances(state.trainable, got), rtol=1e-9, atol=1e-9
    )


def test_distances_of_mixed_ranks_are_those_of_products() -> None:
    sent = {rank: adapter(rank, rank=rank) for rank in (1, 2, 3)}
    got = {rank: near(sent[rank], 7) for rank in sent}
    found = squared_distances([(sent[rank], got[rank]) for rank in sent])
    changes = [{p: slow.delta(got[r][p]) - slow.delta(sent[r][p]) for p in got[r]} for r in sent]
    squares = np.array([
        [sum(np.sum((one[p] - two[p]) ** 2) for p in one) for two in changes] for one in changes
    ])  # fmt: skip
    expected = squares / np.median(squares[np.triu_indices(3, 1)])
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("hide", [False, True])
def test_multi_krum_keeps_whom_its_slow_twin_keeps(name: str, hide: bool) -> None:
    state, seen = ServerState.start(adapter(0)), []
    built = method(name)
    spy = replace(built, aggregate=lambda state, got: (seen.extend(got), state)[1])
    updates = cohort(built, state, 9)
    updates[4] = scaled(updates[4], sent_by(built, state), -10.0)
    if hide and "A" in built.uploaded(1):  # a huge A whose product is that of the zero B sent
        zero = state.trainable.map(lambda layer: replace(layer, B=np.zeros_like(layer.B)))
        state = ServerState.start(zero)
        updates = cohort(built, state, 9)
        bad = updates[4].adapter.map(
            lambda layer: replace(layer, A=100 * layer.A, B=np.zeros_like(layer.B))
        )
        updates[4] = replace(updates[4], adapter=bad)
    with_rule(spy, "multi-krum", attackers=2, keep=5).aggregate(state, updates)
    squares = slow.squared_distances(sent_by(built, state), [u.adapter for u in updates])
    scores = slow.krum_scores(squares, 2)
    best = {f"c{place}" for place in np.argsort(scores)[:5]}
    assert {update.client_id for update in seen} == best
    assert "c4" not in best
    assert all(update.num_examples == 1.0 for update in seen)


def test_multi_krum_of_too_few_updates_is_refused() -> None:
    built, state = (
        with_rule(method("fedit"), "multi-krum", attackers=2),
        ServerState.start(adapter(0)),
    )
    with raises(
        TooFewUpdatesError,
        "round 1: expected at least 7 updates for multi-krum with attackers = 2, found 6",
    ):
        built.aggregate(state, cohort(built, state, 6))
    assert fewest_updates("multi-krum", attackers=2) == 7
    assert fewest_updates("median") == 1


@given(
    weights=st.lists(st.floats(0.5, 1e12), min_size=1, max_size=9), share=st.floats(0.05, 1.0)
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_max_share_caps_weights(weights: list[float], share: float) -> None:
    state, seen = ServerState.start(adapter(0)), []
    spy = replace(method("fedit"), aggregate=lambda state, got: (seen.extend(got), state)[1])
    updates = updates_of(adapter(0), weights)
    with_rule(spy, "max-share", share=share).aggregate(state, updates)
    found = [update.num_examples for update in seen]
    if share * len(weights) <= 1:
        assert found == [1.0] * len(weights)
        return
    assert max(found) <= share * sum(found) * (1 + 1e-9)
    cap = max(found)
    for before, after in zip(weights, found, strict=True):
        assert after == (before if before <= cap else cap)
    if cap < max(weights):  # no lower than it must be
        assert cap == pytest.approx(share * sum(found), rel=1e-9)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "name": ("medain", {}, "unknown robust rule 'medain'; did you mean 'median'?"),
    "no options": (
        "median",
        {"share": 0.2},
        "robust rule 'median': unknown option 'share'; it has none",
    ),
    "share": (
        "trimmed-mean",
        {"share": 0.5},
        "robust rule 'trimmed-mean': share: expected a number in [0, 0.5), found 0.5",
    ),
    "attackers": (
        "multi-krum",
        {"attackers": -1},
        "robust rule 'multi-krum': attackers: expected a whole number >= 0, found -1",
    ),
    "bound": (
        "norm-bound",
        {"bound": "mean"},
        "robust rule 'norm-bound': bound: expected 'median' or a finite number > 0, found 'mean'",
    ),
    "max share": (
        "norm-bound",
        {"max_share": 1.5},
        "robust rule 'norm-bound': max_share: expected a share in (0, 1], found 1.5",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_name_or_option_is_refused(case: str) -> None:
    name, options, text = REFUSED[case]
    with raises(UnknownNameError if case == "name" else ConfigError, text):
        with_rule(method("fedit"), name, **options)


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
@pytest.mark.parametrize("name", sorted(set(METHODS) - set(MEANS)))
def test_rules_of_coordinates_refuse_methods_that_take_products(rule: str, name: str) -> None:
    with raises(
        ConfigError,
        f"robust rule '{rule}': expected a method that averages factors, such as fedit, ffa-lora "
        f"or rolora, found {name}; use 'norm-bound' or 'multi-krum', which measure products",
    ):
        with_rule(method(name), rule)


@pytest.mark.parametrize(("name", "rule"), [*pairs(RULES), *((name, None) for name in METHODS)])
@pytest.mark.parametrize("weight", [1.0, 1e12])
def test_the_largest_numbers_that_a_server_accepts_do_not_overflow(
    name: str, rule: str | None, weight: float
) -> None:
    """Round after round, from all clients or from one; float32 ends at 3.4e38."""
    built = method(name) if rule is None else with_rule(method(name), rule)
    for many in (1, 7):
        state = ServerState.start(adapter(0))
        for number in range(4):
            updates = cohort(built, state, 7)
            for place in range(many):
                uploaded = built.uploaded(number + 1)
                sign = LARGEST * (-1) ** (place + number)
                large = updates[place].adapter.map(
                    lambda layer, sign=sign, uploaded=uploaded: replace(
                        layer,
                        A=np.full_like(layer.A, sign) if "A" in uploaded else layer.A,
                        B=np.full_like(layer.B, sign) if "B" in uploaded else layer.B,
                    )
                )
                updates[place] = replace(updates[place], adapter=large, num_examples=weight)
            state = built.aggregate(state, updates)
            for path, layer in state.adapter.layers.items():
                assert np.isfinite(layer.A).all()
                assert np.isfinite(layer.B).all()
                assert np.isfinite(state.adapter.delta_weight(path)).all()
        assert state.round == 4


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_neither_linear_nor_exact_and_checks_before_it_counts(rule: str) -> None:
    built = with_rule(method("ffa-lora"), rule)
    assert (built.linear, built.exact, built.continues) == (False, False, True)
    state = ServerState.start(adapter(0))
    wrong = Update(adapter(2, rank=1), 1.0, "c9")
    with pytest.raises(ShapeMismatchError, match=r"^client 'c9', layer 'conv': expected A \(2, "):
        built.aggregate(state, [*cohort(built, state, 6), wrong])
