"""Clients that train in ONNX Runtime: alone, and in one federation with clients in torch."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from clients import onnx_app, torch_app
from clients.app import app as client_app
from fedlora.adapter import Adapter
from fedlora.aggregation import Broadcast, method
from fedlora.errors import BaseMismatchError, ConfigError, FederationError, UnsupportedError
from fedlora.experiment import ExperimentConfig
from fedlora.federation import ClientSetup, read_rounds, run_federation
from fedlora.federation._flower_private import identify_process
from fedlora.federation.records import query_content, to_record
from fedlora.flat import pack, segments_of
from fedlora.nn import load_adapter_into, load_base
from fedlora.simulation.grid import InProcessGrid
from fedlora.world import open_world
from tests.clients.small_base import BASE, write_bundle
from tests.device.hand_made import FEATURES, write_language_model
from tests.federation.fakes import raises

PEOPLE = 12
DATA = "tests.simulation.small:data"


def config(**overrides: Any) -> ExperimentConfig:
    """Three rounds; keys as in the TOML, `__` for a dot."""
    table = {
        "name": "small",
        "base": {"id": BASE},
        "data": {"id": DATA, "task": "classification"},
        "lora": {"rank": 2, "lora_alpha": 4, "target_modules": ["fc1", "fc2"]},
        "federation": {
            "rounds": 3, "cohort": 8, "local_epochs": 2, "batch_size": 5, "learning_rate": 0.1,
            "optimizer": "sgd",
        },
    }  # fmt: skip
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return ExperimentConfig.from_table(table, dotted)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: Any) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle")).folder


@pytest.fixture
def node(bundle: Path) -> dict[str, Any]:
    return {"bundle": str(bundle), "base": BASE, "data": DATA, "partition-id": 3}


def run(
    experiment: ExperimentConfig, node: dict[str, Any], onnx: set[int], out: Path
) -> tuple[Adapter, list[float]]:
    """Run a federation in which the clients at these places train in ONNX Runtime."""

    def app(message: Message, context: Context) -> Message:
        number = context.node_config["partition-id"]
        context.node_config["trainer"] = "onnx" if number in onnx else "torch"
        return client_app(message, context)

    grid = InProcessGrid(app, PEOPLE, node_config=node)  # type: ignore[arg-type]
    adapter = run_federation(grid, experiment, out).adapter
    records = read_rounds(out)
    assert [record.dropped for record in records] == [()] * 3
    return adapter, [record.loss or 0.0 for record in records]


METHODS: dict[str, dict[str, Any]] = {
    "fedit": {},
    "clipped, proximal": {
        "federation__max_grad_norm": 0.2, "federation__proximal_weight": 0.1,
        "federation__momentum": 0.5,
    },
    "ffa-lora": {"federation__method": "ffa-lora"},
    "scaffold": {"federation__control_variates": True},
    "flora": {"federation__method": "flora"},
    "fedex-lora": {"federation__method": "fedex-lora"},
    "mixed ranks": {"federation__method": "flexlora", "federation__client_ranks": [1, 2]},
    "adamw": {"federation__optimizer": "adamw", "federation__learning_rate": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_mixed_federation_is_one_in_torch(
    name: str, node: dict[str, Any], tmp_path: Path
) -> None:
    experiment = config(**METHODS[name])
    torch_only, losses = run(experiment, node, set(), tmp_path / "torch")
    mixed, found = run(experiment, node, set(range(0, PEOPLE, 2)), tmp_path / "mixed")
    assert found != losses
    np.testing.assert_allclose(found, losses, rtol=0, atol=5e-5)
    if experiment.federation.train.optimizer == "sgd":
        if name == "fedex-lora":
            # Its residual is cut by an SVD, whose vectors of singular values near zero are
            # anything: of two roundings only the products can be compared.
            for path in torch_only:
                product = torch_only.delta_weight(path)
                np.testing.assert_allclose(mixed.delta_weight(path), product, rtol=0, atol=1e-5)
        else:
            segments = segments_of(torch_only, ("A", "B"))
            assert np.abs(pack(mixed, segments) - pack(torch_only, segments)).max() <= 1e-5
    assert difference_of_outputs(mixed, torch_only) <= 1e-4
    assert difference_of_outputs(mixed, None) > 0.05


def difference_of_outputs(one: Adapter, other: Adapter | None) -> float:
    """The largest difference of any logit on random features; None: of the base."""
    world = open_world(config().base, config().data, config().lora, 0)
    inputs = np.random.default_rng(0).normal(size=(64, FEATURES)).astype(np.float32)
    found = []
    for adapter in (one, other or world.initial):
        load_adapter_into(world.model, adapter)
        found.append(world.model(_tensor(inputs)).detach().numpy())
    return float(np.abs(found[0] - found[1]).max())


def _tensor(array: Any) -> Any:
    import torch

    return torch.tensor(array)


def test_one_client_is_the_same_in_both(node: dict[str, Any]) -> None:
    experiment = config()
    setup = ClientSetup.of(experiment)
    ours, theirs = onnx_app.open_trainer(setup, node), torch_app.open_trainer(setup, node)
    assert (ours.client_id, ours.num_examples) == (theirs.client_id, theirs.num_examples)
    world = open_world(experiment.base, experiment.data, experiment.lora, 0)
    options = (Broadcast(world.initial), experiment.federation.train, method("fedit").rule(1), 1, 0)
    one, other = ours.train(*options), theirs.train(*options)
    assert (one.steps, one.num_examples) == (other.steps, other.num_examples) == (2, 4)
    assert one.loss == pytest.approx(other.loss, abs=1e-6)


def test_a_client_keeps_nothing_of_another(node: dict[str, Any]) -> None:
    experiment = config()
    world = open_world(experiment.base, experiment.data, experiment.lora, 0)

    def train(number: int) -> Any:
        trainer = onnx_app.open_trainer(ClientSetup.of(experiment), node | {"partition-id": number})
        options = (experiment.federation.train, method("fedit").rule(1), 1, 0)
        return trainer.train(Broadcast(world.initial), *options).adapter

    alone = train(4)
    assert train(7) != alone
    assert train(4) == alone


def test_an_adapter_for_another_base_is_refused_as_in_torch(node: dict[str, Any]) -> None:
    experiment = config()
    world = open_world(experiment.base, experiment.data, experiment.lora, 0)
    fingerprint = load_base(BASE).card.fingerprint
    other = replace(world.initial, base="f" * 64)
    for broadcast in (Broadcast(other), Broadcast(world.initial, other)):
        for app in (onnx_app, torch_app):
            with raises(
                BaseMismatchError,
                f"this client's base is {fingerprint[:12]}, the server's adapter is for "
                "ffffffffffff; install the same base on both",
            ):
                app.open_trainer(ClientSetup.of(experiment), node).train(
                    broadcast, experiment.federation.train, method("fedit").rule(1), 1, 0
                )


def test_dropout_that_only_some_clients_had_is_refused(node: dict[str, Any]) -> None:
    experiment = config(lora__lora_dropout=0.1)
    world = open_world(experiment.base, experiment.data, experiment.lora, 0)
    with raises(
        UnsupportedError,
        "lora_dropout: expected 0 for a client that trains in ONNX Runtime, found 0.1; its graphs "
        "have no dropout, and it would train by another rule than the others",
    ):
        onnx_app.open_trainer(ClientSetup.of(experiment), node).train(
            Broadcast(world.initial), experiment.federation.train, method("fedit").rule(1), 1, 0
        )


def test_the_bundle_is_the_owners_word(
    bundle: Path, node: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = ClientSetup.of(config())
    del node["bundle"]
    with raises(
        ConfigError,
        "node config bundle: expected the folder of a bundle to train with, found none; make one "
        "with fedlora export",
    ):
        onnx_app.open_trainer(setup, node)
    monkeypatch.setenv("FEDLORA_BUNDLE", str(bundle))
    assert onnx_app.open_trainer(setup, node).client_id == "c03"
    # What the server calls its base opens nothing; its data would.
    del node["base"]
    other = replace(setup, base=replace(setup.base, id="/on/the/server"))
    assert onnx_app.open_trainer(other, node).client_id == "c03"
    del node["data"]
    with pytest.raises(FederationError, match=r"^the server asks for data 'tests.simulation"):
        onnx_app.open_trainer(setup, node)


def test_a_bundle_for_another_task_is_refused(node: dict[str, Any], tmp_path: Path) -> None:
    write_language_model(tmp_path / "language")
    with raises(
        ConfigError,
        "task: expected 'next-token', which this device's bundle is for, found 'classification'",
    ):
        onnx_app.open_trainer(
            ClientSetup.of(config()), node | {"bundle": str(tmp_path / "language")}
        )
    with raises(
        ConfigError,
        "this device's bundle tells 3 classes apart, and 'watch' has 7; install the bundle of the "
        "server's base",
    ):
        onnx_app.open_trainer(ClientSetup.of(config()), node | {"data": "watch"})


def _query(node_config: dict[str, Any]) -> Message:
    identify_process()
    context = Context(1, 1000, node_config, RecordDict(), {})
    setup = to_record(ClientSetup.of(config()))
    return client_app(Message(query_content(setup), 1000, "query"), context)


@pytest.mark.parametrize(
    ("trainer", "missing", "reason"),
    [
        ("onnx", None, None),
        (None, "torch", None),
        (
            "torch", "torch",
            "MissingExtraError: training in torch needs packages that are not installed: run pip "
            "install 'fedlora[train]'",
        ),
        (
            "onnx", "onnxruntime",
            "MissingExtraError: training without torch needs packages that are not installed: run "
            "pip install 'fedlora[device]'",
        ),
    ],
)  # fmt: skip
def test_the_app_takes_the_trainer_that_is_there(
    trainer: str | None,
    missing: str | None,
    reason: str | None,
    node: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "clients.app.find_spec", lambda name: None if name == missing else find(name)
    )
    if missing == "torch" and trainer is None:
        monkeypatch.delattr("clients.torch_app.open_trainer")
    reply = _query(node if trainer is None else node | {"trainer": trainer})
    if reason is None:
        assert reply.content["client"]["client_id"] == "c03"
    else:
        assert reply.error.reason == reason
