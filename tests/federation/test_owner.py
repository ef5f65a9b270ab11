"""A server cannot make a device open a path or import a module; its owner can."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.errors import ConfigError, FederationError
from fedlora.federation import ClientSetup
from fedlora.federation.owner import (
    owner_environment,
    owner_node_config,
    owners_bundle,
    owners_checkpointing,
    owners_client,
    owners_setup,
)
from tests.federation.fakes import experiment, raises

KNOWN = {"base": ["watch-cnn"], "data": ["watch"], "task": ["classification"]}
GOOD = {"base__id": "watch-cnn", "data__id": "watch"}


def test_a_registered_name_is_taken_from_a_message() -> None:
    setup = ClientSetup.of(experiment(**GOOD))
    assert owners_setup(setup, {}, {}, KNOWN) == setup


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base", "/etc"),
        ("base", "../secrets"),
        ("base", "secrets"),  # a folder of this name may be in the working directory
        ("base", "os:system"),
        ("data", "os:system"),
        ("data", "/home/alice/chats"),
        ("task", "os:system"),
        ("base", ""),
    ],
)
def test_anything_else_in_a_message_is_refused(key: str, value: str) -> None:
    field = "data__task" if key == "task" else f"{key}__id"
    setup = ClientSetup.of(experiment(**GOOD | {field: value}))
    with raises(
        FederationError,
        f"the server asks for {key} {value!r}, which is not one of {KNOWN[key][0]}; a path or a "
        f"function is only opened when this device's owner names it: node config {key}='…'",
    ):
        owners_setup(setup, {"partition-id": 0}, {}, KNOWN)


def test_the_owners_word_wins_over_the_servers() -> None:
    setup = ClientSetup.of(experiment(base__id="/etc", data__id="/etc", data__task="os:system"))
    node = {"base": "/models/mine", "data": "mine:chats", "task": "mine:task"}
    mine = owners_setup(setup, node, {"FEDLORA_BASE": "other"}, KNOWN)
    assert (mine.base.id, mine.data.id, mine.data.task) == tuple(node.values())
    environment = {"FEDLORA_BASE": "a", "FEDLORA_DATA": "b", "FEDLORA_TASK": "c"}
    mine = owners_setup(setup, {}, environment, KNOWN)
    assert (mine.base.id, mine.data.id, mine.data.task) == ("a", "b", "c")


def test_a_simulation_vouches_for_its_own_experiment() -> None:
    config = experiment(base__id="mine:base", data__id="mine:data", data__task="mine:task")
    setup = ClientSetup.of(config)
    assert owners_setup(setup, owner_node_config(config), {}, KNOWN) == setup
    assert owners_setup(setup, {}, owner_environment(config), KNOWN) == setup


@pytest.mark.parametrize("wanted", [True, False])
def test_a_simulation_decides_about_checkpointing_in_whatever_process(wanted: bool) -> None:
    config = experiment(engine__checkpointing=wanted)
    assert owners_checkpointing(owner_node_config(config), {}) is wanted
    assert owners_checkpointing({}, owner_environment(config)) is wanted
    assert "checkpointing" not in str(ClientSetup.of(config))


def test_a_device_checkpoints_only_by_its_owners_word() -> None:
    assert owners_checkpointing({}, {}) is False
    assert owners_checkpointing({"checkpointing": True}, {}) is True
    assert owners_checkpointing({"checkpointing": "false"}, {"FEDLORA_CHECKPOINTING": "true"}) is (
        False
    )
    with raises(FederationError, "node config checkpointing: expected true or false, found 'yes'"):
        owners_checkpointing({"checkpointing": "yes"}, {})


def test_the_bundle_and_the_client_are_the_owners() -> None:
    with raises(
        ConfigError,
        "node config bundle: expected the folder of a bundle to train with, found none; make one "
        "with fedlora export",
    ):
        owners_bundle({}, {})
    assert owners_bundle({}, {"FEDLORA_BUNDLE": "b"}) == Path("b")
    assert owners_bundle({"bundle": "a"}, {"FEDLORA_BUNDLE": "b"}) == Path("a")
    assert owners_client(("x", "y"), {"partition-id": 1}) == "y"
    assert owners_client(("x", "y"), {"partition-id": 1, "client": "x"}) == "x"
