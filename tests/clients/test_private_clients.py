"""Private rounds with real trainers, in torch and in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from clients.app import app as client_app
from fedlora.experiment import ExperimentConfig
from fedlora.federation import read_rounds, run_federation
from fedlora.privacy.ledger import Ledger
from fedlora.simulation.grid import InProcessGrid
from tests.clients.small_base import BASE, write_bundle

DATA = "tests.simulation.small:data"
PEOPLE = 12


def config(**privacy: Any) -> ExperimentConfig:
    return ExperimentConfig.from_table(
        {
            "name": "small",
            "base": {"id": BASE},
            "data": {"id": DATA, "task": "classification"},
            "lora": {"rank": 2, "lora_alpha": 4, "target_modules": ["fc1", "fc2"]},
            "federation": {
                "method": "ffa-lora", "weights": "equal", "rounds": 1, "cohort": PEOPLE,
                "local_epochs": 2, "batch_size": 5, "learning_rate": 0.1, "optimizer": "sgd",
            },
            "privacy": {"clipping_norm": 0.1, "noise_multiplier": 50.0, **privacy},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def node(tmp_path_factory: Any) -> dict[str, Any]:
    bundle = write_bundle(tmp_path_factory.mktemp("bundle")).folder
    return {"bundle": str(bundle), "base": BASE, "data": DATA}


@pytest.mark.parametrize("mechanism", ["central", "local"])
def test_torch_and_onnx_clients_run_a_private_round(
    mechanism: str, node: dict[str, Any], tmp_path: Path
) -> None:
    told: dict[int, np.ndarray] = {}

    def app(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        context.node_config["trainer"] = "onnx" if number % 2 else "torch"
        reply = client_app(message, context)
        if "factors" in reply.content:
            assert set(reply.content) == {"factors", "layout"}
            told[number] = reply.content["factors"]["factors"].numpy().copy()
        return reply

    grid = InProcessGrid(app, PEOPLE, node_config=node)  # type: ignore[arg-type]
    run_federation(grid, config(mechanism=mechanism), tmp_path)
    (record,) = read_rounds(tmp_path)
    assert (record.status, record.dropped, record.loss) == ("updated", (), None)
    assert len(told) == PEOPLE
    (line,) = Ledger.read(tmp_path).lines
    assert line.mechanism == mechanism
    # B was zero. A device's own noise has the deviation 5; without it updates are below 1.
    kinds = {kind: np.concatenate([told[i] for i in told if i % 2 == kind]) for kind in (0, 1)}
    for row in kinds.values():
        if mechanism == "local":
            assert row.std() == pytest.approx(5.0, rel=0.25)
        else:
            assert 0 < row.std() < 1


def test_an_owner_who_demands_noise_takes_part_in_nothing_else(
    node: dict[str, Any], tmp_path: Path
) -> None:
    strict = node | {"trainer": "torch", "min-noise-multiplier": 1.0}
    grid = InProcessGrid(client_app, PEOPLE, node_config=strict)
    run_federation(grid, config(), tmp_path)
    (record,) = read_rounds(tmp_path)
    assert len(record.dropped) == PEOPLE
    assert "this device's owner demands local noise" in record.dropped[0].reason
