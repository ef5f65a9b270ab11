"""The study of the owner: what is compared with what, and the page."""

from __future__ import annotations

import numpy as np
import pytest

from fedlora.experiment import ExperimentConfig
from simulations.studies.owner import owner_aucs, page, person_aucs, window_scores


def test_scores_are_log_probabilities():
    logits = np.log([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]) + 3.0
    found = window_scores(logits, [1, 2])
    np.testing.assert_allclose(found["known"], np.log([0.2, 0.5]))
    np.testing.assert_allclose(found["unknown"], np.log([0.7, 0.5]))
    huge = window_scores([[1e4, 0.0]], [1])  # no overflow
    assert huge["known"].tolist() == [-1e4]


def test_an_owner_is_compared_with_others_windows_of_the_same_wrist():
    ids = ("1_left", "1_right", "2_left", "2_right", "3_left", "3_right")
    low = {name: np.array([0.0, 1.0]) for name in ids}
    by_owner = {name: dict(low) for name in ids}
    # The other wrist, even the owner's own, does not count: only 2_left and 3_left are compared.
    by_owner["1_left"] = {
        "1_left": np.array([5.0, 5.0]), "1_right": np.array([9.0]), "2_left": np.array([4.0]),
        "2_right": np.array([9.0]), "3_left": np.array([6.0]), "3_right": np.array([9.0]),
    }  # fmt: skip
    found = person_aucs(by_owner)
    assert found == {"1": pytest.approx((0.5 + 0.5) / 2), "2": 0.5, "3": 0.5}
    by_owner["1_left"]["3_left"] = np.array([4.5])
    assert person_aucs(by_owner)["1"] == pytest.approx((1.0 + 0.5) / 2)


def test_the_page_has_a_line_an_adapter_and_the_paired_differences():
    persons = ("1", "2", "3")
    values = {"base": 0.5, "global": 0.5, "personal": 0.8}
    aucs = {
        (score, adapter): {p: value + 0.01 * int(p) for p in persons}
        for score in ("known", "unknown", "gain")
        for adapter, value in values.items()
        if (score, adapter) != ("gain", "base")
    }
    text = page(aucs, ExperimentConfig.from_toml("simulations/watch.toml"))
    lines = text.splitlines()
    assert "| known | personal | 0.820 | 0.795 to 0.845 | 0.810 | 0.820 | 0.830 |" in lines
    assert "| known | global − base | +0.000 | +0.000 to +0.000 | none |" in lines
    assert "| gain | personal − global | +0.300 | +0.300 to +0.300 | better |" in lines
    assert not any("gain | global − base" in line for line in lines)


def test_a_finished_run_is_read_and_adapters_of_a_kind_are_compared(tmp_path):
    from fedlora.simulation import simulate

    short = {
        "federation.rounds": 1, "federation.local_steps": 1, "federation.cohort": 2,
        "personalization.steps": 2,
    }  # fmt: skip
    simulate("watch", overrides=short, out=tmp_path / "run")
    found = owner_aucs(tmp_path / "run")
    assert len(found) == 8
    assert all(set(values) == {"1", "2", "3", "4", "5"} for values in found.values())
    assert all(0 <= value <= 1 for values in found.values() for value in values.values())
    # The base is one for everyone: its AUCs lie around chance.
    assert np.mean(list(found["known", "base"].values())) == pytest.approx(0.5, abs=0.1)
