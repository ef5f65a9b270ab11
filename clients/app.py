"""The one ClientApp of fedlora; it picks the trainer that this device has.

A Flower bundle can name only one ClientApp, and a SuperNode starts a new process for every message.
So the trainer is chosen here, by the node config's ``trainer`` (``torch`` or ``onnx``; without one
torch where it is installed, else onnx), and only then imported.
"""

from __future__ import annotations

from importlib.util import find_spec

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.errors import ConfigError, MissingExtraError
from fedlora.federation import (
    ClientSetup,
    Trainer,
    handle_evaluate,
    handle_query,
    handle_train,
)
from fedlora.federation.owner import owners_state

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say who this client is."""
    device = owners_state(context.node_config)
    return handle_query(message, lambda setup: _open(setup, context), device)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for one round."""
    device = owners_state(context.node_config)
    return handle_train(message, lambda setup: _open(setup, context), context.state, device)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Personalize the global adapter, evaluate, and keep both where the owner says."""
    device = owners_state(context.node_config)
    return handle_evaluate(message, lambda setup: _open(setup, context), context.state, device)


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
