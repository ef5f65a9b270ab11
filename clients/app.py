"""The one ClientApp of fedlora; it picks the trainer that this device has.

A Flower bundle can name only one ClientApp, and a SuperNode starts a new process for every message.
So the trainer is chosen here, by the node config's ``trainer``, and only then imported. There is
one so far: ``torch``.
"""

from __future__ import annotations

from importlib.util import find_spec

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.errors import ConfigError, MissingExtraError
from fedlora.federation import ClientSetup, Trainer, handle_query, handle_train

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say who this client is."""
    return handle_query(message, lambda setup: _open(setup, context))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for one round."""
    return handle_train(message, lambda setup: _open(setup, context), context.state)


def _open(setup: ClientSetup, context: Context) -> Trainer:
    kind = context.node_config.get("trainer", "torch")
    if kind != "torch":
        raise ConfigError(f"node config trainer: expected 'torch', found {kind!r}")
    if find_spec("torch") is None:
        raise MissingExtraError("training in torch", "train")
    from clients.torch_app import open_trainer

    return open_trainer(setup, context.node_config)
