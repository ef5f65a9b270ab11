"""The one ClientApp of fedlora; it picks the trainer that this device has.

A Flower bundle can name only one ClientApp, and a SuperNode starts a new process for every message.
So the trainer is chosen here, by the node config's ``trainer`` (``torch`` or ``onnx``; without one
torch where it is installed, else onnx), and only then imported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.errors import ConfigError, MissingExtraError
from fedlora.federation.client import (
    Trainer,
    error_reply,
    handle_declined,
    handle_evaluate,
    handle_query,
    handle_train,
)
from fedlora.federation.device_state import owners_state
from fedlora.federation.limits import owners_limits, reason_to_decline, tells_nothing
from fedlora.federation.records import ClientSetup

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say who this client is; also when it could not train now: it stays one of the run's."""
    device = owners_state(context.node_config)
    try:
        quiet = tells_nothing(context.node_config)
    except Exception as error:  # as in `_if_allowed`
        return error_reply(message, error)
    return handle_query(message, lambda setup: _open(setup, context), device, quiet=quiet)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for one round, if this device's owner allows it now (`fedlora.federation.limits`)."""
    if context.node_config.get("trusted-keys"):
        return _secure().handle_plain(message)
    return _if_allowed(message, context, handle_train, train=True)


@app.train("keys")
def keys(message: Message, context: Context) -> Message:
    """Begin a secure sum, if this device's owner allows it now."""
    handle = partial(_secure().handle_keys, node_config=context.node_config)
    return _if_allowed(message, context, handle)


@app.train("shares")
def shares(message: Message, context: Context) -> Message:
    """Deal shares of this client's secrets of a secure sum."""
    return _secure().handle_shares(message, context.state, context.node_config)


@app.train("masked")
def masked(message: Message, context: Context) -> Message:
    """Train for one round of secure sums; a device that may not by now falls out of the sum."""
    handle = partial(_secure().handle_masked, node_config=context.node_config)
    return _if_allowed(message, context, handle)


@app.train("agree")
def agree(message: Message, context: Context) -> Message:
    """Make sure that all were told the same of who is left, whatever the limits say by now."""
    return _secure().handle_agree(message, context.state, context.node_config)


@app.train("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Help to take the masks off a sum, whatever this device's limits say by now."""
    return _secure().handle_unmask(message, context.state, context.node_config)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Personalize the global adapter, evaluate, and keep both; under the same limits."""

    def handle(*given: Any, **more: Any) -> Message:
        return handle_evaluate(*given, **more, quiet=tells_nothing(context.node_config))

    return _if_allowed(message, context, handle)


def _secure() -> ModuleType:
    """Return what answers in a secure sum; its cryptography is not loaded for any other message."""
    from fedlora.federation.secure import handlers

    return handlers


def _if_allowed(
    message: Message, context: Context, handle: Callable[..., Message], *, train: bool = False
) -> Message:
    try:
        limits = owners_limits(context.node_config)
        reason = reason_to_decline(limits)
    except Exception as error:  # a limit that cannot be understood is not one that is kept
        return error_reply(message, error)
    if reason is not None:
        return handle_declined(message, reason)
    return handle(
        message,
        lambda setup: _open(setup, context),
        context.state,
        owners_state(context.node_config),
        min_examples=limits.min_examples,
        **({"noise": limits.noise} if train else {}),
    )


def _open(setup: ClientSetup, context: Context) -> Trainer:
    has_torch = find_spec("torch") is not None
    kind = context.node_config.get("trainer", "torch" if has_torch else "onnx")
    if kind == "torch":
        if not has_torch:
            raise MissingExtraError("training in torch", "train")
        from clients import torch_app

        return torch_app.open_trainer(setup, context.node_config)
    if kind == "onnx":
        if find_spec("onnxruntime") is None:
            raise MissingExtraError("training without torch", "device")
        from clients import onnx_app

        return onnx_app.open_trainer(setup, context.node_config)
    raise ConfigError(f"node config trainer: expected 'torch' or 'onnx', found {kind!r}")
