"""The last stage of a run on devices: a simulation's numbers, in torch and in ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from clients import onnx_app, torch_app
from clients.app import app as client_app
from fedlora.errors import ConfigError, FederationError
from fedlora.experiment import ExperimentConfig
from fedlora.federation import ClientSetup, run_federation
from fedlora.federation.folder import read_rows
from fedlora.federation.owner import owner_node_config
from fedlora.formats import load_adapter
from fedlora.simulation import simulate
from fedlora.simulation.grid import InProcessGrid
from fedlora.simulation.threads import one_torch_thread
from fedlora.store import Store
from tests.clients.small_base import BASE, write_bundle
from tests.clients.test_onnx_app import DATA, PEOPLE, config
from tests.federation.fakes import raises

# The same factors, bit for bit, are evaluated in passes of another shape: logits of order 10 differ
# by float32's 1e-6, and losses by no more.
CLOSE = 5e-6


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: Any) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle")).folder


def devices(
    experiment: ExperimentConfig,
    out: Path,
    clients: int,
    node: dict[str, Any],
    states: Path | None = None,
    onnx: frozenset[int] = frozenset(),
) -> dict[str, Any]:
    """Run a federation of real clients, each with a state folder of its own."""

    def app(message: Message, context: Context) -> Message:
        number = context.node_config["partition-id"]
        context.node_config["trainer"] = "onnx" if number in onnx else "torch"
        if number not in onnx:
            context.node_config.pop("bundle", None)
        if states is not None:
            context.node_config["state"] = str(states / str(number))
        return client_app(message, context)

    grid = InProcessGrid(app, clients, node_config=node)  # type: ignore[arg-type]
    with one_torch_thread():
        run_federation(grid, experiment, out, evaluate=True)
    return json.loads((out / "summary.json").read_text())


def scores_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows by client, without what no two runs share."""
    rows = read_rows(folder / "clients.jsonl")
    return {row["client"]: {k: v for k, v in row.items() if k != "seconds"} for row in rows}


def assert_close(found: Any, expected: Any, where: str = "") -> None:
    """Equal tables, whose numbers may differ by `CLOSE`."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}.{key}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=CLOSE, rel=CLOSE), where
    else:
        assert found == expected, where


def test_devices_in_torch_have_the_numbers_of_a_simulation(tmp_path: Path) -> None:
    watch = {
        "data.clients": 5, "data.held_out_clients": 0.2, "data.validation_share": 0.1,
        "federation.rounds": 2, "federation.cohort": 3, "federation.local_steps": 2,
        "personalization.steps": 4, "personalization.keep_better": True,
        "personalization.proximal_weight": 0.1, "personalization.learning_rate": 2e-3,
    }  # fmt: skip
    alone = simulate(
        "watch", overrides=watch | {"engine.kind": "sequential"}, out=tmp_path / "alone"
    )
    experiment = ExperimentConfig.from_toml("simulations/watch.toml", watch)
    states = tmp_path / "states"
    summary = devices(experiment, tmp_path / "run", 5, owner_node_config(experiment), states)
    assert_close(scores_of(tmp_path / "run"), scores_of(tmp_path / "alone"))
    assert summary["extra"].pop("notes") == []
    alone.summary["extra"].pop("notes")  # of the data, which the server has not
    assert_close(summary | {"seconds": 0}, alone.summary | {"seconds": 0})
    assert load_adapter(tmp_path / "run" / "adapter") == alone.adapter
    numbers = {c: n for n, c in enumerate(sorted(scores_of(tmp_path / "run")))}
    for client, number in numbers.items():
        store = Store.open(states / str(number))
        assert store.global_adapter() == alone.adapter
        personal = load_adapter(tmp_path / "alone" / "personal" / f"{client}.safetensors")
        kept = scores_of(tmp_path / "run")[client]["kept_global"]
        assert store.personal_adapter() == (None if kept else personal)


METHODS: dict[str, dict[str, Any]] = {
    "fedit": {},
    "flora, beside a frozen part": {"federation__method": "flora"},
    "fedsa-lora, own factors": {"federation__method": "fedsa-lora"},
    "adamw": {"federation__optimizer": "adamw", "federation__learning_rate": 0.01},
}


@pytest.mark.parametrize("name", METHODS)
def test_onnx_and_torch_devices_and_the_cohort_engine_agree(
    name: str, bundle: Path, tmp_path: Path
) -> None:
    experiment = config(**METHODS[name], personalization__steps=6, federation__rounds=2)
    node = {"bundle": str(bundle), "base": BASE, "data": DATA, "threads": 1}
    onnx = frozenset(range(0, PEOPLE, 2))
    summary = devices(experiment, tmp_path / "mixed", PEOPLE, node, tmp_path / "states", onnx)
    assert (summary["clients"], summary["extra"]["notes"]) == (PEOPLE, [])
    simulated = simulate(experiment, out=tmp_path / "simulated")
    found, expected = scores_of(tmp_path / "mixed"), scores_of(tmp_path / "simulated")
    for client, row in expected.items():
        for adapter, measures in row["scores"].items():
            mine = found[client]["scores"][adapter]
            # DESIGN: outputs of AdamW in either runtime within 1e-4; a loss is a mean of those.
            assert mine["loss"] == pytest.approx(measures["loss"], abs=1e-4), (client, adapter)
            assert mine["accuracy"] == measures["accuracy"], (client, adapter)
    whole = load_adapter(tmp_path / "mixed" / "adapter")
    for number in range(PEOPLE):
        store = Store.open(tmp_path / "states" / str(number))
        assert store.global_adapter() == whole
        assert (store.status().bundle.digest is not None) == (number in onnx)
        mine, theirs = (
            store.personal_adapter(),
            load_adapter(tmp_path / "simulated" / "personal" / f"c{number:02}.safetensors"),
        )
        assert mine is not None
        for path in theirs:
            np.testing.assert_allclose(
                mine.delta_weight(path), theirs.delta_weight(path), rtol=0, atol=1e-4
            )
    assert simulated.summary["personal"] != simulated.summary["global"]


def test_a_device_finds_its_bundle_in_its_state(bundle: Path, tmp_path: Path) -> None:
    Store.create(tmp_path / "state", bundle)
    setup = ClientSetup.of(config())
    node = {"state": str(tmp_path / "state"), "base": BASE, "data": DATA, "client": "c03"}
    trainer = onnx_app.open_trainer(setup, node)
    assert trainer.trainer.bundle.folder == tmp_path / "state" / "bundle"
    assert trainer.initial == torch_app.open_trainer(setup, node).initial


def test_the_owner_says_rank_threads_and_memory(bundle: Path) -> None:
    setup = ClientSetup.of(config())
    node: dict[str, Any] = {"bundle": str(bundle), "base": BASE, "data": DATA, "partition-id": 3}
    told = node | {"rank": 1, "threads": "1", "low_memory": "true"}
    trainer = onnx_app.open_trainer(setup, told)
    assert (trainer.rank, torch_app.open_trainer(setup, told).rank) == (1, 1)
    assert (trainer.trainer.bundle.threads, trainer.trainer.bundle.low_memory) == (1, True)
    assert onnx_app.open_trainer(setup, node).rank is None
    for key, value in (("rank", 0), ("rank", "two"), ("threads", -1), ("rank", True)):
        with raises(
            ConfigError, f"node config {key}: expected a whole number >= 1, found {value!r}"
        ):
            onnx_app.open_trainer(setup, node | {key: value})
    with raises(FederationError, "node config low_memory: expected true or false, found 'little'"):
        onnx_app.open_trainer(setup, node | {"low_memory": "little"})


def test_devices_of_several_ranks_in_one_federation(bundle: Path, tmp_path: Path) -> None:
    """Client 3 trains rank 1, whatever the server's is; what is served is the whole adapter."""
    experiment = config(
        federation__method="flexlora", federation__cohort=PEOPLE, federation__rounds=1
    )
    node = {"bundle": str(bundle), "base": BASE, "data": DATA, "threads": 1}

    def app(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        context.node_config["trainer"] = "onnx" if number % 2 else "torch"
        context.node_config["state"] = str(tmp_path / "states" / str(number))
        if number < 4:
            context.node_config["rank"] = 1 if number in (2, 3) else 50
        if number % 2 == 0:
            context.node_config.pop("bundle")
        return client_app(message, context)

    grid = InProcessGrid(app, PEOPLE, node_config=node)  # type: ignore[arg-type]
    with one_torch_thread():
        state = run_federation(grid, experiment, tmp_path / "run", evaluate=True)
    assert set(state.adapter.ranks) == {2}
    rows = read_rows(tmp_path / "run" / "clients.jsonl")
    assert all("scores" in row for row in rows)
    for number in range(6):
        store = Store.open(tmp_path / "states" / str(number))
        personal = store.personal_adapter()
        assert personal is not None
        assert set(personal.ranks) == {1 if number in (2, 3) else 2}
        assert store.global_adapter() == state.adapter


def test_the_owners_limits_hold_for_the_last_stage_too(bundle: Path, tmp_path: Path) -> None:
    """Client c02 has 3 training examples, and its owner wants at least 5."""

    def app(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 2:
            context.node_config["min-examples"] = 5
        return client_app(message, context)

    node = {"bundle": str(bundle), "base": BASE, "data": DATA, "trainer": "onnx", "threads": 1}
    grid = InProcessGrid(app, PEOPLE, node_config=node)  # type: ignore[arg-type]
    run_federation(grid, config(federation__rounds=0), tmp_path, evaluate=True)
    rows = read_rows(tmp_path / "clients.jsonl")
    assert rows[2]["failed"] == "client 'c02': declined: examples"
    assert [row["client"] for row in rows if "failed" in row] == ["c02"]
    # Without a round every client's own adapter is what it trains in the personalization.
    assert rows[5]["scores"]["base"] == rows[5]["scores"]["global"]
    assert rows[5]["scores"]["own"] != rows[5]["scores"]["base"]
