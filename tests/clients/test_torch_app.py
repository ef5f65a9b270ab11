"""The Flower app as it is shipped, on the smartwatch's base and data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from clients.app import app as client_app
from clients.torch_app import open_trainer
from fedlora.aggregation import Broadcast, method
from fedlora.data import draw_batches
from fedlora.errors import BaseMismatchError, ConfigError, FederationError
from fedlora.experiment import ExperimentConfig
from fedlora.federation import ClientSetup, read_checkpoint, run_federation
from fedlora.federation._flower_private import identify_process
from fedlora.federation.records import query_content, to_record
from fedlora.federation.results import run_table
from fedlora.nn import extract_adapter, get_task, inject_lora, load_base, train_local
from fedlora.simulation.grid import InProcessGrid
from fedlora.simulation.rounds import load_app
from fedlora.world import open_world
from tests.federation.fakes import raises

TABLE: dict[str, Any] = {
    "name": "watch",
    "base": {"id": "watch-cnn"},
    "data": {"id": "watch", "task": "classification"},
    "lora": {"rank": 4, "lora_alpha": 8},
    "federation": {"rounds": 2, "cohort": 3, "local_steps": 2, "batch_size": 8},
}
CONFIG = ExperimentConfig.from_table(TABLE)
SETUP = ClientSetup.of(CONFIG)
NODE = {"partition-id": 2, "num-partitions": 10}


@pytest.fixture(scope="module")
def world() -> Any:
    return open_world(CONFIG.base, CONFIG.data, CONFIG.lora, CONFIG.seed)


def test_a_client_trains_as_it_would_by_hand(world: Any) -> None:
    """The same factors, bit for bit, as a freshly loaded base with LoRA on the same batches."""
    client_id = world.data.client_ids[2]
    examples = world.data.client(client_id).train
    rule = method("fedit").rule(1)
    config = CONFIG.federation.train
    result = open_trainer(SETUP, NODE).train(Broadcast(world.initial), config, rule, 3, 0)

    base = load_base("watch-cnn")
    inject_lora(base.model, CONFIG.lora, 0, base=base.card.fingerprint)
    by_hand = train_local(
        base.model,
        draw_batches(examples, config, 0, client_id, 3),
        config,
        task=get_task("classification"),
        rule=rule,
    )
    assert result.adapter == by_hand.adapter
    assert result.adapter != extract_adapter(world.model)
    assert (result.loss, result.steps) == (by_hand.loss, 2)
    assert result.num_examples == len(examples) > 16


def test_a_client_does_not_remember_what_another_one_trained(world: Any) -> None:
    rule = method("fedit").rule(1)
    config = CONFIG.federation.train

    def train(partition: int) -> Any:
        trainer = open_trainer(SETUP, NODE | {"partition-id": partition})
        return trainer.train(Broadcast(world.initial), config, rule, 1, 0).adapter

    alone = train(2)
    train(5)
    assert train(2) == alone
    assert train(5) != alone


def test_the_server_draws_the_same_start_as_torch_injects(world: Any, tmp_path: Path) -> None:
    config = ExperimentConfig.from_table(TABLE, {"federation.rounds": 0})
    state = run_federation(InProcessGrid(client_app, 10), config, tmp_path)
    assert state.adapter == world.initial
    assert state.adapter.base == world.initial.base


def test_the_whole_app_in_process_is_the_server_app_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = run_federation(InProcessGrid(client_app, 10), CONFIG, tmp_path / "a")
    short = ExperimentConfig.from_table(TABLE, {"personalization.steps": 1})
    (tmp_path / "x.toml").write_text(short.to_toml())
    settings = {
        "experiment": str(tmp_path / "x.toml"),
        "out": str(tmp_path / "b"),
        "min-clients": 10,
    }
    context = Context(1, 1, {}, RecordDict(), settings)
    load_app("serverapp")(grid=InProcessGrid(load_app("clientapp"), 10), context=context)
    again = read_checkpoint(tmp_path / "b").state
    assert again.adapter == state.adapter
    assert run_table(tmp_path / "b") in capsys.readouterr().out
    assert not (tmp_path / "a" / "summary.json").exists()
    assert any(np.abs(state.adapter[path].B).max() > 1e-4 for path in state.adapter)


def test_two_workers_give_the_same_as_one(tmp_path: Path) -> None:
    one = run_federation(InProcessGrid(client_app, 10), CONFIG, tmp_path / "one")
    two = run_federation(InProcessGrid(client_app, 10, workers=2), CONFIG, tmp_path / "two")
    # Each worker has one torch thread, this thread has the process's number: sums may be split.
    for path in one.adapter:
        np.testing.assert_allclose(one.adapter[path].B, two.adapter[path].B, rtol=0, atol=1e-6)


def test_an_adapter_for_another_base_is_refused(world: Any) -> None:
    other = replace(world.initial, base="f" * 64)
    with raises(
        BaseMismatchError,
        f"this client's base is {world.initial.base[:12]}, the server's adapter is for "
        "ffffffffffff; install the same base on both",
    ):
        open_trainer(SETUP, NODE).train(
            Broadcast(other), CONFIG.federation.train, method("fedit").rule(1), 1, 0
        )


def test_a_client_trains_beside_a_frozen_adapter(world: Any) -> None:
    """It starts at the loss of both, and trains one of them."""
    random = np.random.default_rng(0)
    layers = {
        path: replace(layer, B=random.normal(0, 0.05, layer.B.shape))
        for path, layer in world.initial.layers.items()
    }
    frozen = replace(world.initial, layers=layers)
    config, rule = replace(CONFIG.federation.train, local_steps=1), method("fedit").rule(1)

    def train(broadcast: Broadcast) -> Any:
        return open_trainer(SETUP, NODE).train(broadcast, config, rule, 1, 0)

    both = train(Broadcast(world.initial, frozen))
    whole = train(Broadcast(Broadcast(world.initial, frozen).whole))
    base = train(Broadcast(world.initial))
    assert both.loss == pytest.approx(whole.loss, rel=1e-5)
    assert abs(both.loss - base.loss) > 1e-3
    assert both.adapter.ranks == world.initial.ranks
    assert train(Broadcast(world.initial)).adapter == base.adapter  # nothing of it is left


def test_a_frozen_adapter_for_another_base_is_refused(world: Any) -> None:
    with pytest.raises(BaseMismatchError, match=r"the server's adapter is for ffffffffffff"):
        open_trainer(SETUP, NODE).train(
            Broadcast(world.initial, replace(world.initial, base="f" * 64)),
            CONFIG.federation.train,
            method("fedit").rule(1),
            1,
            0,
        )


@pytest.mark.parametrize(
    ("node", "text"),
    [
        (
            {"partition-id": 10},
            "node config partition-id: expected 0 to 9, the clients of the data, found 10",
        ),
        ({}, "node config partition-id: expected 0 to 9, the clients of the data, found None"),
        ({"client": "nobody"}, "node config client: the data has no client 'nobody'"),
    ],
)
def test_a_node_without_a_client_is_refused(node: dict[str, Any], text: str) -> None:
    with raises(ConfigError, text):
        open_trainer(SETUP, node)


def test_a_device_can_name_its_client(world: Any) -> None:
    name = world.data.client_ids[4]
    assert open_trainer(SETUP, {"client": name, "partition-id": 0}).client_id == name


def test_a_path_in_a_message_is_not_opened(tmp_path: Path) -> None:
    setup = replace(SETUP, base=replace(SETUP.base, id=str(tmp_path)))
    with pytest.raises(FederationError, match=r"^the server asks for base '/"):
        open_trainer(setup, NODE)


def _query(node_config: dict[str, Any]) -> Message:
    identify_process()
    context = Context(1, 1000, node_config, RecordDict(), {})
    return client_app(Message(query_content(to_record(SETUP)), 1000, "query"), context)


def test_the_app_answers_for_the_trainer_that_is_installed() -> None:
    assert _query(NODE).content["client"]["client_id"] == open_trainer(SETUP, NODE).client_id


def test_a_trainer_that_is_not_there_is_an_error_reply() -> None:
    assert _query(NODE | {"trainer": "tpu"}).error.reason == (
        "ConfigError: node config trainer: expected 'torch' or 'onnx', found 'tpu'"
    )
