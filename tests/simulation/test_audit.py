"""Audits of whole runs: canaries found in them, broken mechanisms caught, inputs rebuilt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedlora.cli.main import app
from fedlora.errors import ConfigError, RunError
from fedlora.experiment import ExperimentConfig
from fedlora.federation import read_checkpoint
from fedlora.federation.audit import AUDIT, audit_canaries
from fedlora.federation.folder import EXPERIMENT
from fedlora.privacy.audit import Trace
from fedlora.privacy.central import CentralMechanism
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.noise import derive
from fedlora.simulation.inversion import audit_inversion
from fedlora.simulation.rounds import run_rounds
from simulations.studies.small_world import PEOPLE, experiment

K = 40


@pytest.fixture(autouse=True)
def the_same_noise_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate has a spread: with a new secret each time these tests would fail by chance.

    Noise is keyed by the exact sum too, whose last bits are the processor's: not here.
    """

    def key(
        self: CentralMechanism, purpose: str, total: Any, round: int, bits: int | None
    ) -> bytes:
        return derive(self.secret, "noise", purpose, round)

    monkeypatch.setattr(CentralMechanism, "_key", key)
    monkeypatch.setattr("fedlora.privacy.noise.fresh_key", lambda: bytes(range(32)))


def audited(folder: Path, **overrides: Any) -> Path:
    """Run nine rounds with canaries in which everyone takes part; return the folder."""
    table = {
        "clipping_norm": 0.2, "noise_multiplier": 4.5, "canaries": K, "accountant": "rdp"
    } | overrides.pop("privacy", {})  # fmt: skip
    config = experiment(
        federation__rounds=9, federation__weights="equal", federation__local_steps=1,
        privacy=table, **overrides,
    )  # fmt: skip
    return rounds(folder, config)


def rounds(folder: Path, config: ExperimentConfig) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / EXPERIMENT).write_text(config.to_toml())
    run_rounds(config, folder, PEOPLE)
    return folder


@pytest.mark.parametrize("method", ["fedit", "ffa-lora", "fedsvd", "rolora"])
def test_canaries_are_measured_whatever_a_method_makes_of_its_factors(
    tmp_path: Path, method: str
) -> None:
    found = audit_canaries(audited(tmp_path, federation__method=method))
    assert found is not None
    # Nine rounds of everyone at z = 4.5 are two Gaussians 3 / 4.5 apart. Both deviations of the
    # mean of 40, and people's ten updates in the length of the sum, which make it shorter.
    assert 3 / 4.5 - 3 / K**0.5 < found["distance"] < 3 / 4.5 + 2 / K**0.5
    assert found["k"] == K
    assert found["exceeds_ledger"] is False
    assert "no bound" in found["words"]
    assert found["epsilon"] == pytest.approx(2.985, abs=0.01)  # RDP of nine rounds at 4.5


@pytest.mark.parametrize("fault", ["noise forgotten", "noise a tenth", "clipping forgotten"])
def test_a_broken_mechanism_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    right = CentralMechanism.release
    scale = {"noise forgotten": 0.0, "noise a tenth": 0.1}.get(fault)
    if scale is None:
        monkeypatch.setattr(CentralMechanism, "clip", lambda self, row: np.asarray(row, np.float64))
    else:
        monkeypatch.setattr(
            CentralMechanism,
            "release",
            lambda self, total, round, bits=None: right(
                replace(self, noise_multiplier=max(scale * self.noise_multiplier, 1e-9)),
                total, round, bits,
            ),
        )  # fmt: skip
    found = audit_canaries(audited(tmp_path))
    assert found is not None
    assert found["exceeds_ledger"] is True, found
    assert "does not keep its promise" in found["words"]


def test_sampled_canaries_are_in_the_population_that_the_ledger_counts(tmp_path: Path) -> None:
    folder = audited(tmp_path, federation__sampling="poisson", federation__cohort=5)
    events = Ledger.read(folder).events()
    assert [event.sampling_probability for event in events] == [5 / (PEOPLE + K)]
    found = audit_canaries(folder)
    assert found is not None
    assert found["exceeds_ledger"] is False
    assert all(len(r) <= PEOPLE for r in _cohorts(folder))


def _cohorts(folder: Path) -> list[list[str]]:
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    cohorts = [json.loads(line)["cohort"] for line in lines]
    assert not any("canary" in client for cohort in cohorts for client in cohort)
    return cohorts


def test_a_resumed_run_has_the_same_trace(tmp_path: Path) -> None:
    whole = audited(tmp_path / "whole")
    config = ExperimentConfig.from_toml(whole / EXPERIMENT)
    half = tmp_path / "half"
    (half / "checkpoint").mkdir(parents=True)
    (half / "checkpoint" / "noise.key").write_bytes(
        (whole / "checkpoint" / "noise.key").read_bytes()
    )
    (half / "checkpoint" / "noise.key").chmod(0o600)
    first = ExperimentConfig.from_table(config.to_table(), {"federation.rounds": 4})
    rounds(half, first)
    rounds(half, config)
    traces = [Trace.of_state(read_checkpoint(f).state.method_state).sums for f in (whole, half)]
    assert traces[0].keys() == {"A+B"}
    assert np.array_equal(traces[0]["A+B"], traces[1]["A+B"])


def test_the_command_writes_what_it_has_found(tmp_path: Path) -> None:
    folder = audited(tmp_path)
    result = CliRunner().invoke(app, ["privacy", "audit", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads((folder / AUDIT).read_text())
    assert json.loads(result.stdout) == found
    assert found["canaries"]["k"] == K
    assert found["inversion"]["method"] == "fedit"
    assert next(threat["who"] for threat in found["threats"]) == "server"
    shown = CliRunner().invoke(app, ["privacy", "audit", str(folder), "--no-inversion"])
    assert "no bound" in shown.stdout
    assert "has to be trusted" in shown.stdout


def test_single_inputs_are_rebuilt_from_plain_steps_and_not_under_noise(tmp_path: Path) -> None:
    config = experiment(federation__rounds=3, federation__local_steps=2)
    rows = _inverted(tmp_path / "fedit", config)
    # B is zero in the first round: A does not move, and B says A x alone.
    assert rows["first round", "A+B", 1, "gradient", False]["span"] == 0.0
    one = rows["next round", "A+B", 1, "gradient", False]
    assert one["cosine"] == pytest.approx(1.0, abs=1e-4)  # float32 steps
    assert rows["next round", "A+B", 2, "gradient", False]["span"] > 0.99
    assert one["chance"] < 0.9  # of 16 inputs and 3 layers, chance is high

    table = {"clipping_norm": 0.5, "noise_multiplier": 5.0, "accountant": "rdp"}
    frozen = experiment(
        federation__rounds=3, federation__method="ffa-lora", federation__weights="equal",
        privacy=table,
    )  # fmt: skip
    rows = _inverted(tmp_path / "ffa", frozen)
    clear = rows["next round", "B", 1, "gradient", False]
    noised = rows["next round", "B", 1, "gradient", True]
    assert clear["cosine"] < 0.99  # what A lets through
    assert noised["cosine"] < clear["cosine"]


def _inverted(folder: Path, config: ExperimentConfig) -> dict[tuple[Any, ...], dict[str, Any]]:
    found = audit_inversion(config, read_checkpoint(rounds(folder, config)))
    assert "one attack" in found["words"]
    keys = ("stage", "uploaded", "examples", "step", "noised")
    return {
        tuple("+".join(row[key]) if key == "uploaded" else row[key] for key in keys): row
        for row in found["rows"]
    }


def test_turns_of_factors_are_both_attacked(tmp_path: Path) -> None:
    rows = _inverted(tmp_path, experiment(federation__rounds=2, federation__method="rolora"))
    assert {key[1] for key in rows if key[0] == "next round"} == {"A", "B"}


def test_runs_without_canaries_say_so(tmp_path: Path) -> None:
    folder = audited(tmp_path, privacy={"canaries": 0})
    assert audit_canaries(folder) is None
    shown = CliRunner().invoke(app, ["privacy", "audit", str(folder), "--no-inversion"])
    assert "this run has none" in shown.stdout
    with pytest.raises(RunError, match="expected a run's folder"):
        audit_canaries(tmp_path / "elsewhere")


def test_canaries_beside_secure_aggregation_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.canaries: expected 0 with"):
        experiment(
            federation__weights="equal",
            privacy={"clipping_norm": 1.0, "noise_multiplier": 1.0, "canaries": 2},
            secure_aggregation={},
        )
