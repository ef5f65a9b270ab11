"""Two attackers among ten clients: every attack, method and rule, through the server's own path."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from fedlora.adapter import Adapter, Array
from fedlora.aggregation import method, methods, with_rule
from fedlora.aggregation.robust import RULES
from fedlora.errors import ConfigError
from fedlora.federation import RoundRecord, read_checkpoint
from fedlora.federation.replies import LARGEST
from fedlora.simulation.grid import InProcessGrid
from simulations.studies.attackers import ATTACKS, SILENT, Attack, with_attackers
from tests.federation.fakes import experiment, fake_app, run

CLIENTS, BAD, ROUNDS = 10, (2, 7), 3
NAMES = tuple(f"c{number}" for number in BAD)
OPTIONS: Mapping[str, dict[str, Any]] = {
    "multi-krum": {"attackers": 2},
    "trimmed-mean": {"share": 0.25},
    "norm-bound": {"max_share": 0.125},
    "max-share": {"share": 0.125},
}
REFUSED = {name: attack for name, attack in ATTACKS.items() if attack.refused}
BELIEVED = {name: attack for name, attack in ATTACKS.items() if not attack.refused}


def pairs() -> list[tuple[str, str | None]]:
    """Every method with every rule that it does not refuse, and without one."""
    found: list[tuple[str, str | None]] = []
    for name in methods():
        found.append((name, None))
        for rule in RULES:
            try:
                with_rule(method(name), rule, **OPTIONS.get(rule, {}))
            except ConfigError:
                continue
            found.append((name, rule))
    return found


def some_pairs() -> list[Any]:
    """Return `pairs`, as cases; by default each method by itself and with one rule, FedIT with all.

    Between them the other methods have every rule; the rest of the product is slow.
    """
    by_method: dict[str, list[str | None]] = {}
    for name, rule in pairs():
        by_method.setdefault(name, []).append(rule)
    kept: set[tuple[str, str | None]] = set()
    used: Counter[str | None] = Counter()
    for name, rules in by_method.items():
        one = min(rules[1:], key=used.__getitem__, default=None)  # the one that fewest have so far
        used[one] += name != "fedit"
        kept |= {(name, rule) for rule in (rules if name == "fedit" else (None, one))}
    return [pytest.param(*pair, marks=() if pair in kept else pytest.mark.slow) for pair in pairs()]


def attacked(
    out: Path, name: str, rule: str | None, attack: Attack | None
) -> tuple[Adapter, list[RoundRecord]]:
    table = {
        "federation__method": name,
        "federation__cohort": CLIENTS,
        "federation__rounds": ROUNDS,
    }
    if rule is not None:
        table |= {"federation__robust": rule, "federation__robust_options": OPTIONS.get(rule, {})}
    grid = InProcessGrid(fake_app(), CLIENTS)
    if attack is not None:
        with_attackers(grid, BAD, attack)
    state, records = run(experiment(**table), out, grid=grid)
    return state.adapter, records


@pytest.fixture(scope="module")
def without_them(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same run where the attackers say nothing; each once."""

    @functools.cache
    def adapter(name: str, rule: str | None) -> Adapter:
        return attacked(tmp_path_factory.mktemp("silent"), name, rule, SILENT)[0]

    return adapter


def size(adapter: Adapter, name: str) -> float:
    """The norm of the product; of A where the server's B is zero and the product says nothing."""
    if name != "fedsa-lora":
        return adapter.norm()
    return float(
        np.sqrt(sum(np.sum(layer.A.astype(float) ** 2) for layer in adapter.layers.values()))
    )


def assert_finite(adapter: Adapter) -> None:
    for path in adapter:
        assert np.isfinite(adapter[path].A).all()
        assert np.isfinite(adapter[path].B).all()
        assert np.isfinite(adapter.delta_weight(path)).all()


def in_turn(attacks: Sequence[Attack]) -> Attack:
    """Return an attacker each of whose answers is the next of these attacks."""
    coming = iter(attacks)
    content: list[Callable[[RecordDict], None]] = []

    def row(trained: Array, sent: Array) -> Array:
        attack = next(coming)
        content[:] = [attack.content]
        return attack.row(trained, sent)

    return Attack(None, row=row, content=lambda answer: content[0](answer))


@pytest.mark.parametrize(("name", "rule"), some_pairs())
def test_malformed_updates_are_named_and_dropped_and_leave_no_trace(
    name: str, rule: str | None, without_them: Any, tmp_path: Path
) -> None:
    """Both attackers of every round try something else, so that each attack is made once."""
    attacks = [attack for attack in REFUSED.values() if attack.num_examples is None]
    assert len(attacks) == len(BAD) * ROUNDS
    adapter, records = attacked(tmp_path, name, rule, in_turn(attacks))
    assert adapter == without_them(name, rule)
    assert_finite(adapter)
    for record in records:
        assert record.status == "updated"
        assert sorted(dropped.client for dropped in record.dropped) == sorted(NAMES)
    reasons = [dropped.reason for record in records for dropped in record.dropped]
    for attack, reason in zip(attacks, reasons, strict=True):
        assert reason.startswith("client 'c")
        assert str(attack.refused) in reason


@pytest.mark.parametrize(("name", "rule"), some_pairs())
def test_who_claims_a_weight_that_is_none_is_never_drawn(
    name: str, rule: str | None, without_them: Any, tmp_path: Path
) -> None:
    attack = REFUSED["weight -50"]
    adapter, records = attacked(tmp_path, name, rule, attack)
    assert adapter == without_them(name, rule)
    assert [record.status for record in records] == ["updated"] * ROUNDS
    left_out = read_checkpoint(tmp_path).left_out
    assert len(left_out) == len(BAD)
    assert all(str(attack.refused) in dropped.reason for dropped in left_out)


@pytest.mark.parametrize(("name", "rule"), some_pairs())
def test_well_formed_attacks_never_stop_a_run_and_a_rule_bounds_them(
    name: str, rule: str | None, without_them: Any, tmp_path: Path
) -> None:
    honest = size(without_them(name, rule), name)
    for attack, value in BELIEVED.items():
        adapter, records = attacked(tmp_path / attack, name, rule, value)
        assert_finite(adapter)
        assert [record.status for record in records] == ["updated"] * ROUNDS
        assert all(record.dropped == () for record in records)
        if rule is not None and (rule != "max-share" or "sign" not in attack):
            # Honest clients here move at random, so that even their mean differs by half from one
            # set of them to another; what is bounded is the order of magnitude.
            assert size(adapter, name) < 3 * honest, attack


@pytest.mark.parametrize("name", ["fedit", "ffa-lora"])
def test_without_a_rule_the_attack_is_one(name: str, without_them: Any, tmp_path: Path) -> None:
    adapter, _ = attacked(tmp_path, name, None, ATTACKS["sign x 10"])
    assert adapter.norm() > 4 * without_them(name, None).norm()


def test_a_round_with_too_few_for_its_rule_is_given_up_and_the_run_goes_on(tmp_path: Path) -> None:
    config = experiment(
        federation__cohort=7, federation__rounds=6, federation__robust="multi-krum",
        federation__robust_options={"attackers": 2},
    )  # fmt: skip
    grid = with_attackers(InProcessGrid(fake_app(), 20), BAD[:1], ATTACKS["NaN"])
    _, records = run(config, tmp_path, grid=grid)
    given_up = [record for record in records if NAMES[0] in record.cohort]
    assert [record.status == "failed" for record in records] == [r in given_up for r in records]
    assert 0 < len(given_up) < 6
    for record in given_up:
        assert {dropped.client for dropped in record.dropped} == set(record.cohort)
        reason = (
            f"round {record.round}: expected at least 7 updates for multi-krum with attackers = 2, "
            "found 6"
        )
        assert reason in {dropped.reason for dropped in record.dropped}
    counted = {client.client_id: client.rounds for client in read_checkpoint(tmp_path).clients}
    good = [record for record in records if record not in given_up]
    assert counted == {
        client: sum(client in record.cohort for record in good) for client in counted
    }


LARGE = Attack(None, row=lambda trained, sent: np.full_like(trained, LARGEST), num_examples=10**12)


@pytest.mark.parametrize("name", sorted(methods()))
def test_the_largest_numbers_at_the_largest_weight_never_stop_a_run(
    name: str, tmp_path: Path
) -> None:
    """An attacker who is drawn now and then; no rule stands in front of the method."""
    config = experiment(
        federation__method=name, federation__cohort=4, federation__rounds=8,
    )  # fmt: skip
    grid = with_attackers(InProcessGrid(fake_app(), CLIENTS), BAD[:1], LARGE)
    state, records = run(config, tmp_path, grid=grid)
    assert_finite(state.adapter)
    attacked_in = [record.round for record in records if NAMES[0] in record.cohort]
    assert 0 < len(attacked_in) < 8
    for record in records:
        if record.status == "failed":  # then all are named, with what was too large
            assert record.round in attacked_in
            assert sorted(dropped.client for dropped in record.dropped) == sorted(record.cohort)
            (reason,) = {dropped.reason for dropped in record.dropped}
            assert reason.startswith("all updates together: layer ")
            assert ": expected numbers up to 1e+06, found " in reason
        else:  # no honest client is refused for what an attacker did in a round before
            assert record.dropped == ()
