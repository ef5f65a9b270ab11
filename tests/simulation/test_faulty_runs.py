"""Whole simulations in which messages are lost and replies damaged: the result, and its record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.adapter import Adapter
from fedlora.federation import Checkpoint, read_rounds
from fedlora.federation.faults import draw_fault
from fedlora.simulation.rounds import run_rounds
from fedlora.simulation.simulate import simulate
from tests.simulation.small import PEOPLE, config

FAULTS = {"faults__drop": 0.3, "faults__corrupt": 0.1, "faults__crash": 0.05}


def finite(adapter: Adapter) -> bool:
    return all(
        np.isfinite(factor).all()
        for layer in adapter.layers.values()
        for factor in (layer.A, layer.B)
    )


@pytest.mark.parametrize("engine", ["cohort", "sequential"])
def test_a_run_with_faults_ends_and_names_who_was_hit(engine: str, tmp_path: Path) -> None:
    config_ = config(engine__kind=engine, federation__rounds=8, **FAULTS)
    checkpoint = run_rounds(config_, tmp_path, PEOPLE)
    assert checkpoint.state.round == 8
    assert finite(checkpoint.state.adapter)
    for record in read_rounds(tmp_path):
        hit = [c for c in record.cohort if draw_fault(config_.faults, c, str(record.round))]  # type: ignore[arg-type]
        assert sorted(dropped.client for dropped in record.dropped) == hit
        assert record.status == "updated"


def test_both_engines_lose_the_same_and_come_to_the_same(tmp_path: Path) -> None:
    ends: list[Checkpoint] = []
    for engine in ("cohort", "sequential"):
        changes: dict[str, Any] = {"engine__kind": engine, "federation__rounds": 4, **FAULTS}
        changes |= {"faults__delay": 0.3, "faults__seconds": 5000.0, "faults__duplicate": 0.2}
        ends.append(run_rounds(config(**changes), tmp_path / engine, PEOPLE))
    lost = [
        [sorted((d.client, d.reason[:20]) for d in r.dropped) for r in read_rounds(tmp_path / name)]
        for name in ("cohort", "sequential")
    ]
    assert lost[0] == lost[1]
    assert any("too late" in d.reason for r in read_rounds(tmp_path / "cohort") for d in r.dropped)
    one, other = (end.state.adapter for end in ends)
    for path in one:
        # As between the engines without faults: float32 sums in another order.
        np.testing.assert_allclose(one[path].A, other[path].A, rtol=0, atol=1e-6)
        np.testing.assert_allclose(one[path].B, other[path].B, rtol=0, atol=1e-6)


def test_the_summary_says_that_faults_were_injected(tmp_path: Path) -> None:
    run = simulate(config(federation__rounds=2, **FAULTS), out=tmp_path / "run")
    notes = json.loads((tmp_path / "run" / "summary.json").read_text())["extra"]["notes"]
    assert (
        "faults were injected: drop 0.3, crash 0.05, corrupt 0.1 (chance a message, faults.seed 0)"
        in notes
    )
    lost = sum(len(record.dropped) for record in read_rounds(tmp_path / "run"))
    assert any(note.startswith(f"{lost} replies did not count") for note in notes)
    assert "faults were injected" in run.table()


def test_lost_and_damaged_replies_leave_more_than_half_of_the_gain(tmp_path: Path) -> None:
    """Twenty rounds of twelve people, with few examples each: a loss near an undisturbed run's."""
    faults = {"faults__drop": 0.3, "faults__corrupt": 0.05}
    runs = {
        name: simulate(config(federation__rounds=20, **changes), out=tmp_path / name).summary
        for name, changes in (("plain", {}), ("faulty", faults))
    }
    base, plain = (runs["plain"][adapter]["loss"] for adapter in ("base", "global"))
    assert runs["faulty"]["global"]["loss"] - plain < 0.5 * (base - plain)


@pytest.mark.slow
def test_a_hundred_rounds_with_dropouts_end_within_a_point_of_undisturbed_runs(
    tmp_path: Path,
) -> None:
    apart: dict[str, list[float]] = {"global": [], "personal": []}
    for seed in (0, 1, 2):
        rounds = {"federation.rounds": 100, "seed": seed}
        faulty = rounds | {"faults.drop": 0.3, "faults.corrupt": 0.05}
        runs = {
            name: simulate("watch", overrides=overrides, out=tmp_path / f"{name}-{seed}")
            for name, overrides in (("plain", rounds), ("faulty", faulty))
        }
        assert finite(runs["faulty"].adapter)
        records = read_rounds(tmp_path / f"faulty-{seed}")
        assert len(records) == 100
        refused = [d for r in records for d in r.dropped if d.reason != "no reply in time"]
        # 1000 messages, of which 0.7 * 0.05 arrive and are damaged: 35, 12 being two deviations.
        assert 23 <= len(refused) <= 47
        assert all(d.reason.startswith(f"client '{d.client}'") for d in refused)
        for adapter, differences in apart.items():
            plain, other = (runs[name].summary[adapter]["mean"] for name in ("plain", "faulty"))
            differences.append(other - plain)
    # A point, which is what is asked for; one side, since a run may as well gain by its noise. Of
    # three seeds, as with a constant learning rate one of them moves by a point between two rounds.
    assert np.mean(apart["global"]) > -0.01
    assert np.mean(apart["personal"]) > -0.01
