"""Whose word opens a base, a data set or a task on a device: the owner's, or a bundled name.

A server's message names them, so that a simulation needs no settings on its clients. A path or a
"module:function" in a message would let the server open any file or import any module of the
device. The rule is therefore:

1. What the device's owner has set wins: the node config (``base``, ``data``, ``task``), or else the
   process environment (``FEDLORA_BASE``, ``FEDLORA_DATA``, ``FEDLORA_TASK``). It may be anything.
2. From a message only a name that is in fedlora's own registry is taken.

`fedlora simulate` is the owner of its virtual clients: it puts the experiment's own ids there.

How a device computes is its owner's word alone: gradient checkpointing is on with
``checkpointing="true"`` in the node config (``FEDLORA_CHECKPOINTING``), and no message asks for it.
So is the bundle with which a device without torch trains: ``bundle="DIR"`` (``FEDLORA_BUNDLE``, or
the one that its state is of), the ``rank`` that it trains at most, and its ``threads`` and
``low_memory``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedlora.errors import ConfigError, FederationError
from fedlora.experiment import ExperimentConfig
from fedlora.federation.device_state import owners_state
from fedlora.federation.records import ClientSetup
from fedlora.store import Store

__all__ = [
    "owner_environment",
    "owner_node_config",
    "owners_bundle",
    "owners_checkpointing",
    "owners_client",
    "owners_low_memory",
    "owners_rank",
    "owners_setup",
    "owners_state",
    "owners_threads",
]

_KEYS = ("base", "data", "task")


def owners_setup(
    setup: ClientSetup,
    node_config: Mapping[str, object],
    environment: Mapping[str, str],
    known: Mapping[str, Collection[str]],
) -> ClientSetup:
    """Return `setup` with the owner's ids in it; `known` holds the registered names by key.

    Raises `FederationError` when the server names what is neither the owner's nor registered.
    """
    asked = {"base": setup.base.id, "data": setup.data.id, "task": setup.data.task}
    chosen = {}
    for key in _KEYS:
        own = node_config.get(key) or environment.get(f"FEDLORA_{key.upper()}")
        if not own and asked[key] not in known[key]:
            raise FederationError(
                f"the server asks for {key} {asked[key]!r}, which is not one of "
                f"{', '.join(sorted(known[key]))}; a path or a function is only opened when this "
                f"device's owner names it: node config {key}='…'"
            )
        chosen[key] = str(own) if own else asked[key]
    return replace(
        setup,
        base=replace(setup.base, id=chosen["base"]),
        data=replace(setup.data, id=chosen["data"], task=chosen["task"]),
    )


def owners_checkpointing(node_config: Mapping[str, object], environment: Mapping[str, str]) -> bool:
    """Whether this device trains with gradient checkpointing.

    Raises `FederationError` for another word than true or false.
    """
    word = node_config.get("checkpointing", environment.get("FEDLORA_CHECKPOINTING", False))
    return _flag("checkpointing", word)


def owners_low_memory(node_config: Mapping[str, object]) -> bool:
    """Whether ONNX Runtime computes from the weights' mapping. Raises `FederationError`."""
    return _flag("low_memory", node_config.get("low_memory", False))


def owners_rank(node_config: Mapping[str, object]) -> int | None:
    """Return the rank that this device trains at most; None: the server's. Raises `ConfigError`."""
    return _count("rank", node_config.get("rank"))


def owners_threads(node_config: Mapping[str, object]) -> int | None:
    """Return the threads of ONNX Runtime; None: its own choice. Raises `ConfigError`."""
    return _count("threads", node_config.get("threads"))


def owners_bundle(node_config: Mapping[str, object], environment: Mapping[str, str]) -> Path:
    """Return the folder of this device's bundle. Raises `ConfigError` when none is named."""
    found = node_config.get("bundle") or environment.get("FEDLORA_BUNDLE")
    state = owners_state(node_config)
    if not found and state is not None and (state.folder / "state.json").is_file():
        return Store.open(state.folder).bundle
    if not found:
        raise ConfigError(
            "node config bundle: expected the folder of a bundle to train with, found none; make "
            "one with fedlora export"
        )
    return Path(str(found))


def owners_client(client_ids: Sequence[str], node_config: Mapping[str, object]) -> str:
    """Return the node config's ``client``, or the one at its ``partition-id``.

    Raises `ConfigError` when the data has no such client.
    """
    name, number = node_config.get("client"), node_config.get("partition-id")
    if name is not None:
        if name not in client_ids:
            raise ConfigError(f"node config client: the data has no client {name!r}")
        return str(name)
    if not isinstance(number, int) or not 0 <= number < len(client_ids):
        raise ConfigError(
            f"node config partition-id: expected 0 to {len(client_ids) - 1}, the clients of the "
            f"data, found {number!r}"
        )
    return client_ids[number]


def owner_node_config(config: ExperimentConfig) -> dict[str, str]:
    """Return the node config with which the caller vouches for an experiment's own ids."""
    ids = {"base": config.base.id, "data": config.data.id, "task": config.data.task}
    return ids | {"checkpointing": str(config.engine.checkpointing).lower()}


def owner_environment(config: ExperimentConfig) -> dict[str, str]:
    """Return the same as environment variables, for clients in processes that we start."""
    return {f"FEDLORA_{key.upper()}": value for key, value in owner_node_config(config).items()}


def _flag(key: str, word: object) -> bool:
    known = {"true": True, "false": False}
    if str(word).lower() not in known:
        raise FederationError(f"node config {key}: expected true or false, found {word!r}")
    return known[str(word).lower()]


def _count(key: str, value: object) -> int | None:
    """A whole number, which Flower's node config may also give as a text."""
    if value is None:
        return None
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdigit() and 0 < int(text) < 10**6):
        raise ConfigError(f"node config {key}: expected a whole number >= 1, found {value!r}")
    return int(text)
