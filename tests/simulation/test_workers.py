"""Ray workers give what this process gives, also when one of them dies in the middle of a round."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from fedlora.errors import ConfigError
from fedlora.experiment import EngineConfig
from fedlora.federation import read_rounds, run_federation
from fedlora.simulation.cohort_grid import CohortGrid
from fedlora.simulation.groups import GroupOrder, Outcome
from fedlora.simulation.rounds import run_rounds
from fedlora.simulation.workers import ray_workers
from fedlora.world import shared_world
from tests.simulation.small import PEOPLE, config


@pytest.mark.slow
def test_two_workers_give_the_bits_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    here = run_rounds(config(), tmp_path / "here", PEOPLE)
    there = run_rounds(config(engine__workers=2), tmp_path / "there", PEOPLE)
    assert there.state.adapter == here.state.adapter
    assert there.clients == here.clients
    losses = [[r.loss for r in read_rounds(tmp_path / name)] for name in ("here", "there")]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced_and_its_group_runs_again(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    experiment = config(federation__rounds=4, federation__cohort=PEOPLE)
    expected = run_rounds(experiment, tmp_path / "here", PEOPLE)
    world = shared_world(experiment.base, experiment.data, experiment.lora, experiment.seed)
    killed: list[int] = []
    with ray_workers(2) as pool:
        before = pool.pids()
        lock = threading.Lock()

        def train(order: GroupOrder) -> list[Outcome]:
            with lock:
                if order.order.round == 2 and not killed:
                    killed.append(before[0])
                    os.kill(before[0], signal.SIGKILL)
                    time.sleep(0.5)
            return pool(order)

        grid = CohortGrid(PEOPLE, workers=2, train=train, positions=8)
        state = run_federation(grid, experiment, tmp_path / "there", initial=world.initial)
        after = pool.pids()
    assert killed
    assert set(after) != set(before)
    assert len(set(after)) == 2
    assert all(record.dropped == () for record in read_rounds(tmp_path / "there"))
    small = CohortGrid(PEOPLE, positions=8)
    again = run_federation(small, experiment, tmp_path / "again", initial=world.initial)
    assert state.adapter == again.adapter
    assert state.round == expected.state.round == 4


def test_workers_belong_to_the_cohort_engine() -> None:
    with pytest.raises(ConfigError, match=r"engine.workers is the cohort engine's"):
        EngineConfig(kind="sequential", workers=2)
    assert config(engine__workers="cluster").engine.workers == "cluster"
