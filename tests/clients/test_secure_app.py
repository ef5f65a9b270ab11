"""The app's clients in secure sums: torch and ONNX together, and the words of a device's owner."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from clients.app import app as client_app
from fedlora.adapter import Adapter
from fedlora.experiment import ExperimentConfig
from fedlora.federation import RoundRecord, read_rounds, run_federation
from fedlora.federation.deploy.keys import make_node_key
from fedlora.flat import pack, segments_of
from fedlora.privacy.secure.quantize import Quantizer
from fedlora.simulation.grid import InProcessGrid
from tests.clients.small_base import BASE, write_bundle

PEOPLE = 12
DATA = "tests.simulation.small:data"
SECURE = {"secure_aggregation.clipping_range": 2.0}


def config(overrides: dict[str, Any]) -> ExperimentConfig:
    """One round of six people."""
    table = {
        "name": "small",
        "base": {"id": BASE},
        "data": {"id": DATA, "task": "classification"},
        "lora": {"rank": 2, "lora_alpha": 4, "target_modules": ["fc1", "fc2"]},
        "federation": {
            "rounds": 1, "cohort": 6, "local_steps": 4, "batch_size": 5, "learning_rate": 0.1,
            "optimizer": "sgd", "weights": "equal",
        },
    }  # fmt: skip
    return ExperimentConfig.from_table(table, overrides)


@pytest.fixture(scope="module")
def node(tmp_path_factory: Any) -> dict[str, Any]:
    bundle = write_bundle(tmp_path_factory.mktemp("bundle")).folder
    return {"bundle": str(bundle), "base": BASE, "data": DATA}


def run(
    experiment: ExperimentConfig,
    node: dict[str, Any],
    out: Path,
    more: dict[int, dict[str, Any]] | None = None,
) -> tuple[Adapter, RoundRecord, Counter[str]]:
    """Every other client trains in ONNX Runtime; more: in the node config of some."""
    trained: Counter[str] = Counter()

    def app(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        context.node_config["trainer"] = "torch" if number % 2 else "onnx"
        context.node_config.update((more or {}).get(number, {}))
        reply = client_app(message, context)
        trained[f"{context.node_config['trainer']} {message.metadata.message_type}"] += 1
        return reply

    grid = InProcessGrid(app, PEOPLE, node_config=node)  # type: ignore[arg-type]
    adapter = run_federation(grid, experiment, out).adapter
    (record,) = read_rounds(out)
    return adapter, record, trained


def row(adapter: Adapter) -> np.ndarray:
    return pack(adapter, segments_of(adapter, ("A", "B"))).astype(np.float64)


def test_torch_and_onnx_clients_add_up_to_what_they_do_in_the_open(
    node: dict[str, Any], tmp_path: Path
) -> None:
    secure, record, trained = run(config(SECURE), node, tmp_path / "secure")
    plain, opened, _ = run(config({}), node, tmp_path / "plain")
    assert record.cohort == opened.cohort
    assert record.dropped == ()
    expected = row(plain)
    step = Quantizer(32, 2.0, 6).step
    # A step off, and each of the two rounded to float32 once.
    bound = step + 2 * np.spacing(np.abs(expected).astype(np.float32))
    assert (np.abs(row(secure) - expected) <= bound).all()
    for phase in ("keys", "shares", "masked", "agree", "unmask"):
        found = {kind: trained[f"{kind} train.{phase}"] for kind in ("torch", "onnx")}
        assert sum(found.values()) == 6
        assert min(found.values()) > 0


@pytest.fixture(scope="module")
def trusting(tmp_path_factory: Any) -> dict[int, dict[str, Any]]:
    """Node configs with a key of its own for each of the twelve, and a file of all their keys."""
    folder = tmp_path_factory.mktemp("keys")
    publics = [make_node_key(folder / f"key{number}") for number in range(PEOPLE)]
    trusted = folder / "trusted"
    trusted.write_text("".join(path.read_text() for path in publics))
    return {
        number: {"identity": str(folder / f"key{number}"), "trusted-keys": str(trusted)}
        for number in range(PEOPLE)
    }


def test_devices_with_trusted_keys_add_up_with_these_alone(
    node: dict[str, Any], trusting: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    everyone = {"federation.cohort": PEOPLE, **SECURE}
    _, record, _ = run(config(everyone), node, tmp_path / "all", trusting)
    assert record.status == "updated"
    assert record.dropped == ()
    one_less = {number: words for number, words in trusting.items() if number != 3}
    _, record, _ = run(config(everyone), node, tmp_path / "less", one_less)
    # The others see a key that nobody has signed, and do not go on with it.
    assert record.status == "failed"
    reasons = Counter(dropped.reason[:70] for dropped in record.dropped)
    assert reasons.most_common(1)[0][1] == 11
    assert "keys of client 3: expected an identity that this" in record.dropped[0].reason


def test_a_device_with_trusted_keys_trains_in_no_other_way(
    node: dict[str, Any], trusting: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    _, record, _ = run(config({}), node, tmp_path, {0: trusting[0], 2: trusting[2]})
    asked = sorted(client for client in ("c00", "c02") if client in record.cohort)
    assert asked
    assert sorted(dropped.client for dropped in record.dropped) == asked
    assert {dropped.reason for dropped in record.dropped} == {
        "FederationError: this device's owner has named trusted-keys: expected a secure sum, found "
        "a round in which the server would see this device's update"
    }


def test_the_owner_says_of_how_many_a_sum_is_at_least(node: dict[str, Any], tmp_path: Path) -> None:
    wants = {number: {"least-clients": 4 + number % 2} for number in range(PEOPLE)}
    wants[11] = {"least-clients": "1"}
    experiment = config({"federation.cohort": PEOPLE, **SECURE})
    _, record, _ = run(experiment, node, tmp_path / "eight", wants)
    assert [(d.client, d.reason) for d in record.dropped] == [
        ("c11", "keys: ConfigError: node config least-clients: expected a whole number >= 2, found "
         "'1'"),
    ]  # fmt: skip
    wants = {number: {"least-clients": 9} for number in (2, 5)}
    _, record, _ = run(experiment, node, tmp_path / "nine", wants)
    reason = (
        "keys: FederationError: this device's owner wants sums of 9 or more updates, found a "
        "threshold of 8: node config least-clients"
    )
    assert [(d.client, d.reason) for d in record.dropped] == [("c02", reason), ("c05", reason)]


def test_a_device_that_declines_does_so_before_it_costs_the_others_anything(
    node: dict[str, Any], tmp_path: Path
) -> None:
    experiment = config({"federation.cohort": PEOPLE, **SECURE})
    limits = {3: {"min-examples": 1000}, 4: {"metered-file": "/none", "unmetered": "true"}}
    _, record, trained = run(experiment, node, tmp_path, limits)
    assert sorted(record.declined) == ["c03", "c04"]
    assert sorted((d.client, d.reason) for d in record.dropped) == [
        ("c03", "declined: examples"),
        ("c04", "declined: metered"),
    ]
    assert [phase["clients"] for phase in record.secure.values()] == [10] * 5
    assert sum(trained[f"{kind} train.shares"] for kind in ("torch", "onnx")) == 10
