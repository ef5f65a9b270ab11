"""Server optimizers against their slow twins, and which methods they refuse."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapter import Adapter
from fedlora.aggregation import Method, ServerState, Update, method, methods, with_server_optimizer
from fedlora.aggregation.server_optimizers import PREFIX, SERVER_OPTIMIZERS
from fedlora.errors import ConfigError, NonFiniteError, RunError, UnknownNameError
from fedlora.federation import read_checkpoint
from tests.aggregation.test_averaging import adapter, updates_of
from tests.federation.fakes import experiment, raises, run
from tests.reference import server_optimizers as slow

CONTINUING = sorted(name for name, value in methods().items() if value.continues)


def rounds(built: Method, start: Adapter, count: int) -> list[ServerState]:
    """The states of some rounds with three clients whose updates depend on the round alone."""
    states = [ServerState.start(start)]
    for number in range(count):
        updates = [
            Update(adapter(10 * number + client, rank=start.ranks[0]), 1.0 + client, f"c{client}")
            for client in range(3)
        ]
        states.append(built.aggregate(states[-1], updates))
    return states


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
@given(
    lr=st.floats(1e-3, 2.0), beta1=st.floats(0, 0.99), beta2=st.floats(0, 0.99),
    tau=st.floats(1e-3, 0.1),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_four_rounds_are_their_slow_twin(
    name: str, lr: float, beta1: float, beta2: float, tau: float
) -> None:
    options = {"learning_rate": lr, "beta1": beta1}
    options |= {} if name == "momentum" else {"tau": tau}
    options |= {"beta2": beta2} if name in ("adam", "yogi") else {}
    start = adapter(0)
    built = with_server_optimizer(method("fedit"), name, **options)
    at = {
        (path, factor): [
            (float(x), 0.0, tau**2) for x in getattr(start[path], factor).ravel()
        ]
        for path in start for factor in ("A", "B")
    }  # fmt: skip
    state = ServerState.start(start)
    for number in range(4):
        updates = updates_of(adapter(number), [1.0, 2.0])
        mean = method("fedit").aggregate(state, updates).adapter
        state = built.aggregate(state, updates)
        for (path, factor), coordinates in at.items():
            means = getattr(mean[path], factor).ravel().astype(float)
            at[path, factor] = [
                slow.momentum(x, m, float(to), lr, beta1) if name == "momentum"
                else slow.adaptive(name, (x, m, v), float(to), lr, beta1, beta2, tau)
                for (x, m, v), to in zip(coordinates, means, strict=True)
            ]  # fmt: skip
            found = getattr(state.adapter[path], factor).ravel()
            # x and the moments are kept in float32, of order 10 here (a rounding of 1e-6), and an
            # adaptive step divides that by sqrt(v) + tau >= tau.
            largest = 1e-5 if name == "momentum" else 1e-5 + 1e-6 * lr / tau
            np.testing.assert_allclose(
                found, [x for x, _, _ in at[path, factor]], rtol=1e-5, atol=largest
            )


@pytest.mark.parametrize("name", CONTINUING)
def test_momentum_of_rate_1_and_no_memory_is_the_plain_method_bit_for_bit(name: str) -> None:
    plain = method(name)
    built = with_server_optimizer(plain, "momentum", learning_rate=1, beta1=0)
    for one, two in zip(rounds(plain, adapter(0), 3), rounds(built, adapter(0), 3), strict=True):
        assert one.adapter == two.adapter


@pytest.mark.parametrize("name", CONTINUING)
@pytest.mark.parametrize("optimizer", SERVER_OPTIMIZERS)
def test_what_a_round_does_not_upload_is_left_alone(name: str, optimizer: str) -> None:
    built = with_server_optimizer(method(name), optimizer)
    states = rounds(built, adapter(0), 3)
    for before, after in itertools.pairwise(states):
        uploaded = built.uploaded(after.round)
        changed = {
            key.removeprefix(PREFIX).split(".")[1]
            for key, value in after.method_state.items()
            if key not in before.method_state
            or not np.array_equal(value, before.method_state[key])
        }  # fmt: skip
        assert changed == uploaded
        for factor in {"A", "B"} - uploaded:
            for path in before.trainable:
                assert np.array_equal(
                    getattr(before.trainable[path], factor), getattr(after.trainable[path], factor)
                )


def test_an_alternating_method_moves_the_moments_of_its_round_only() -> None:
    """As RoLoRA does: B in odd rounds, A in even ones."""
    odd = method("ffa-lora")
    alternating = replace(
        odd,
        shared=frozenset({"A", "B"}),
        trained=lambda round: frozenset({"B"} if round % 2 else {"A"}),
        aggregate=lambda state, updates: (
            odd.aggregate(state, updates) if state.round % 2 == 0 else _mean_of_a(state, updates)
        ),
    )
    built = with_server_optimizer(alternating, "adam")
    states = rounds(built, adapter(0), 4)
    keys = [set(state.method_state) for state in states]
    assert keys[1] == {PREFIX + "m.B", PREFIX + "v.B"}
    assert keys[2] == keys[1] | {PREFIX + "m.A", PREFIX + "v.A"}
    for before, after in ((1, 2), (3, 4)):  # rounds 2 and 4 train A
        for moment in ("m.B", "v.B"):
            assert np.array_equal(
                states[before].method_state[PREFIX + moment],
                states[after].method_state[PREFIX + moment],
            )
        assert not np.array_equal(states[before].adapter["fc"].A, states[after].adapter["fc"].A)


def _mean_of_a(state: ServerState, updates: Any) -> ServerState:
    whole = method("fedit").aggregate(state, updates)
    layers = {
        path: replace(whole.trainable[path], B=state.trainable[path].B) for path in state.trainable
    }
    return replace(whole, trainable=replace(whole.trainable, layers=layers))


def test_the_other_state_of_a_method_is_kept_and_the_arguments_stay() -> None:
    start = adapter(0)
    before = replace(ServerState.start(start), method_state={"mine": np.ones(2, np.float32)})
    updates = updates_of(start, [1.0, 2.0])
    prints = [start.fingerprint(), *(u.adapter.fingerprint() for u in updates)]
    after = with_server_optimizer(method("fedit"), "adam").aggregate(before, updates)
    assert np.array_equal(after.method_state["mine"], np.ones(2))
    assert list(before.method_state) == ["mine"]
    assert [start.fingerprint(), *(u.adapter.fingerprint() for u in updates)] == prints
    assert after.adapter.made_of is None


@pytest.mark.parametrize("optimizer", SERVER_OPTIMIZERS)
def test_a_resumed_run_takes_the_same_steps_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    options = {"federation__server_optimizer": optimizer}
    whole, _ = run(experiment(federation__rounds=4, **options), tmp_path / "whole")
    run(experiment(federation__rounds=2, **options), tmp_path / "parts")
    parts, _ = run(experiment(federation__rounds=4, **options), tmp_path / "parts")
    assert parts.adapter == whole.adapter
    kept = read_checkpoint(tmp_path / "parts").state.method_state
    assert kept.keys() == whole.method_state.keys()
    assert all(key.startswith(PREFIX) for key in kept)
    assert all(kept[key].tobytes() == whole.method_state[key].tobytes() for key in kept)


@pytest.mark.parametrize(
    "name", sorted(name for name, value in methods().items() if not value.continues)
)
def test_a_method_that_begins_anew_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"expected a method whose clients go on .* found {name}"):
        with_server_optimizer(method(name), "adam")


def test_a_method_that_does_not_claim_to_continue_is_refused() -> None:
    anew = replace(method("fedit"), name="mine", continues=False)
    with raises(
        ConfigError,
        "server optimizer 'adam': expected a method whose clients go on from the mean of their "
        "factors, such as fedit, ffa-lora or rolora, found mine, which factors or begins anew "
        "every round; remove the server optimizer",
    ):
        with_server_optimizer(anew, "adam")


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "name": ("adan", {}, "unknown server optimizer 'adan'; did you mean 'adam'?"),
    "option": (
        "adam",
        {"bta1": 0.9},
        "server optimizer 'adam': unknown option 'bta1'; did you mean 'beta1'?",
    ),
    "option of another": (
        "momentum",
        {"tau": 0.1},
        "server optimizer 'momentum': unknown option 'tau'; known: beta1, learning_rate",
    ),
    "rate": (
        "adam",
        {"learning_rate": 0},
        "server optimizer 'adam': learning_rate: expected a finite number > 0, found 0",
    ),
    "text": (
        "yogi",
        {"beta2": "0.9"},
        "server optimizer 'yogi': beta2: expected a number in [0, 1), found '0.9'",
    ),
    "beta": (
        "adagrad",
        {"beta1": 1.0},
        "server optimizer 'adagrad': beta1: expected a number in [0, 1), found 1.0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_name_or_option_is_refused(case: str) -> None:
    name, options, text = REFUSED[case]
    with raises(UnknownNameError if case == "name" else ConfigError, text):
        with_server_optimizer(method("fedit"), name, **options)


def test_moments_of_another_adapter_are_refused() -> None:
    built = with_server_optimizer(method("fedit"), "momentum")
    start = adapter(0)
    state = replace(
        ServerState.start(start), method_state={PREFIX + "m.A": np.zeros(3, np.float32)}
    )
    with raises(
        RunError,
        "server optimizer 'momentum': expected moment 'server_optimizer.m.A' of (60,), found (3,); "
        "it belongs to another adapter",
    ):
        built.aggregate(state, updates_of(start, [1.0]))


def test_a_step_out_of_range_is_an_error_and_never_an_infinity() -> None:
    built = with_server_optimizer(method("fedit"), "momentum", learning_rate=1e39)
    with pytest.raises(NonFiniteError, match=r"^round 1: server optimizer 'momentum' left the .*"):
        built.aggregate(ServerState.start(adapter(0)), updates_of(adapter(0), [1.0]))


def test_a_share_of_the_step_is_taken_and_the_moments_move_by_all_of_it() -> None:
    start, updates = ServerState.start(adapter(0)), updates_of(adapter(0), [1.0, 2.0])
    options = {"learning_rate": 0.1, "tau": 1e-4}
    whole = with_server_optimizer(method("fedit"), "adam", **options)
    half = with_server_optimizer(
        method("fedit"), "adam", share_in=lambda round: 0.5 / round, **options
    )
    far, near = whole.aggregate(start, updates), half.aggregate(start, updates)
    for path, layer in start.trainable.layers.items():
        step = far.trainable[path].B.astype(np.float64) - layer.B
        # Both ends of a step of at most 0.1 are rounded to float32, values are of order 4.
        np.testing.assert_allclose(near.trainable[path].B - layer.B, step / 2, rtol=0, atol=1e-6)
    assert all(
        np.array_equal(near.method_state[key], far.method_state[key]) for key in far.method_state
    )
