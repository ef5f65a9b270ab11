"""Secure sums in a simulation: the plain run to the rounding, in both engines, faults and all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.adapter import Adapter
from fedlora.federation import read_rounds
from fedlora.flat import pack, segments_of
from fedlora.privacy.secure.quantize import Quantizer
from fedlora.simulation.rounds import run_rounds
from fedlora.simulation.simulate import simulate
from tests.simulation.small import PEOPLE, config

SECURE = {"federation__weights": "equal", "secure_aggregation__clipping_range": 2.0}


def row(adapter: Adapter) -> np.ndarray:
    return pack(adapter, segments_of(adapter, ("A", "B"))).astype(np.float64)


@pytest.mark.parametrize("engine", ["cohort", "sequential"])
def test_a_secure_run_is_the_plain_one_to_its_rounding(engine: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"engine__kind": engine, "federation__rounds": 1}
    secure = run_rounds(config(**changes, **SECURE), tmp_path / "secure", PEOPLE)
    plain = run_rounds(config(**changes, federation__weights="equal"), tmp_path / "plain", PEOPLE)
    (record,) = read_rounds(tmp_path / "secure")
    expected = row(plain.state.adapter)
    step = Quantizer(32, 2.0, len(record.cohort)).step
    # A step off, and each of the two rounded to float32 once.
    bound = step + 2 * np.spacing(np.abs(expected).astype(np.float32))
    assert (np.abs(row(secure.state.adapter) - expected) <= bound).all()
    assert record.dropped == ()
    assert record.loss is None
    assert [c.rounds for c in secure.clients] == [c.rounds for c in plain.clients]


def test_both_engines_lose_the_same_in_the_same_phases(tmp_path: Path) -> None:
    faults = {
        "faults__drop": 0.03, "faults__crash": 0.01, "faults__delay": 0.02,
        "faults__duplicate": 0.1, "faults__seconds": 5000.0,
        "secure_aggregation__threshold": 0.51,
    }  # fmt: skip
    ends, lost = [], []
    for engine in ("cohort", "sequential"):
        changes = {"engine__kind": engine, "federation__rounds": 4, "federation__cohort": 10}
        out = tmp_path / engine
        ends.append(run_rounds(config(**changes, **SECURE, **faults), out, PEOPLE))
        lost.append([sorted((d.client, d.reason) for d in r.dropped) for r in read_rounds(out)])
    assert lost[0] == lost[1]
    assert {reason.partition(":")[0] for found in lost[0] for _, reason in found} >= {
        "keys", "shares", "masked", "agree", "unmask",
    }  # fmt: skip
    one, other = (row(end.state.adapter) for end in ends)
    # float32 sums in another order, and numbers that fall on the other side of a level for it.
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 + 5 * Quantizer(32, 2.0, 10).step)


def test_the_summary_says_what_the_server_saw(tmp_path: Path) -> None:
    run = simulate(config(federation__rounds=2, **SECURE), out=tmp_path / "run")
    privacy = json.loads((tmp_path / "run" / "summary.json").read_text())["privacy"]
    assert privacy["mechanism"] is None
    assert privacy["secure_aggregation"] is True
    assert privacy["notes"] == [
        "the server saw sums of at least 60% of a cohort's updates, and no single one, if it "
        "passed on the devices' own keys: devices with trusted-keys check that",
        "sums without noise are no differential privacy",
    ]
    line = "privacy: the server saw sums of updates, by secure aggregation; no epsilon is promised"
    assert line in run.table().splitlines()


@pytest.mark.slow
def test_a_cohort_of_a_hundred_with_few_neighbors(tmp_path: Path) -> None:
    more = {
        "data__clients": 120, "federation__cohort": 100, "federation__rounds": 1,
        "secure_aggregation__neighbors": 76, "federation__local_epochs": None,
        "federation__local_steps": 1,
    }  # fmt: skip
    checkpoint = run_rounds(config(**SECURE, **more), tmp_path, 120)
    (record,) = read_rounds(tmp_path)
    assert record.status == "updated"
    assert [phase["clients"] for phase in record.secure.values()] == [100] * 5
    assert sum(client.rounds for client in checkpoint.clients) == 100
