"""Flower's own simulation: the same result as in this process, and nothing left behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.errors import ConfigError, MissingExtraError
from fedlora.experiment import ExperimentConfig
from fedlora.federation import RoundRecord, read_rounds
from fedlora.privacy.secure.quantize import Quantizer
from fedlora.simulation import flower
from fedlora.simulation.flower import run_in_flower
from fedlora.simulation.rounds import run_rounds
from tests.federation.fakes import raises

TABLE: dict[str, Any] = {
    "name": "watch",
    "base": {"id": "watch-cnn"},
    "data": {"id": "watch", "task": "classification", "clients": 3},
    "lora": {"rank": 4, "lora_alpha": 8},
    "federation": {"rounds": 2, "cohort": 2, "local_steps": 4, "batch_size": 8},
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_flowers_simulation_gives_what_this_process_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    config = ExperimentConfig.from_table(TABLE)
    here = run_rounds(config, tmp_path / "here", 3)
    there = ExperimentConfig.from_table(TABLE, {"engine.kind": "flower"})
    seen: list[RoundRecord] = []
    ray = run_rounds(there, tmp_path / "ray", 3, on_round=seen.append)
    assert [record.round for record in seen] == [1, 2]
    assert ray.clients == here.clients
    for a, b in zip(read_rounds(tmp_path / "here"), read_rounds(tmp_path / "ray"), strict=True):
        assert (a.cohort, a.dropped) == (b.cohort, b.dropped)
        # A ClientApp also tells its seconds: the name's 7 bytes and a float.
        assert a.bytes_up + 15 * len(a.cohort) == b.bytes_up
        assert a.loss == pytest.approx(b.loss, abs=1e-6)
    for path, layer in here.state.adapter.layers.items():
        # One thread each: the same sums, so in practice 0; DESIGN allows 1e-6.
        np.testing.assert_allclose(ray.state.adapter[path].A, layer.A, rtol=0, atol=1e-6)
        np.testing.assert_allclose(ray.state.adapter[path].B, layer.B, rtol=0, atol=1e-6)
    assert _ours() == []


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_secure_sum_in_flowers_simulation_is_that_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client's state between the phases goes through Flower, from one process to another."""
    pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    secure = {
        "federation.cohort": 3, "federation.weights": "equal",
        "secure_aggregation.clipping_range": 1.0,
    }  # fmt: skip
    here = run_rounds(ExperimentConfig.from_table(TABLE, secure), tmp_path / "here", 3)
    there = ExperimentConfig.from_table(TABLE, secure | {"engine.kind": "flower"})
    ray = run_rounds(there, tmp_path / "ray", 3)
    assert ray.clients == here.clients
    for a, b in zip(read_rounds(tmp_path / "here"), read_rounds(tmp_path / "ray"), strict=True):
        assert (a.cohort, a.dropped, a.secure.keys()) == (b.cohort, b.dropped, b.secure.keys())
        assert [phase["clients"] for phase in b.secure.values()] == [3] * 5
        assert a.bytes_up == b.bytes_up
    for path, layer in here.state.adapter.layers.items():
        # As without the sum; a number at the edge of a level may fall on its other side.
        bound = 1e-6 + 2 * Quantizer(32, 1.0, 3).step
        np.testing.assert_allclose(ray.state.adapter[path].A, layer.A, rtol=0, atol=bound)
        np.testing.assert_allclose(ray.state.adapter[path].B, layer.B, rtol=0, atol=bound)
    assert _ours() == []


@pytest.mark.slow
def test_an_error_in_flowers_simulation_comes_back_as_itself(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    config = ExperimentConfig.from_table(TABLE, {"federation.cohort": 4})
    with raises(
        ConfigError,
        "federation.cohort: expected at most 3, the clients that are not held out, found 4",
    ):
        run_in_flower(config, tmp_path / "out", 3)
    assert _ours() == []


def _ours() -> list[int]:
    """Every process that any simulation of this machine's user has left, by its mark."""
    if sys.platform != "linux":
        return []
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if b"FEDLORA_SIMULATION=" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "find_spec", lambda name: None)
    with raises(
        MissingExtraError,
        "Flower's own simulation needs packages that are not installed: run pip install "
        "'fedlora[ray]'",
    ):
        run_in_flower(ExperimentConfig.from_table(TABLE), tmp_path, 3)
