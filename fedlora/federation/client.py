"""What a client does with a message: answer a query, or train and send back the shared factors.

The trainer is an argument (torch, ONNX, or a fake in a test). An error becomes an error reply whose
reason is one line. It never carries data: only texts of errors that cannot quote an example are
sent, of all others the name and the place. The whole error is logged on the client.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedlora.adapter import Adapter
from fedlora.aggregation import Broadcast
from fedlora.errors import AdapterError, FederationError, FedloraError, UsageError
from fedlora.federation._flower_private import CLIENT_ERROR
from fedlora.federation.guard import check_answer, check_reply
from fedlora.federation.layout import segments_of
from fedlora.federation.records import (
    ClientAnswer,
    ClientSetup,
    TrainOrder,
    decode_broadcast,
    encode_reply,
    from_record,
    to_record,
)
from fedlora.training import LocalRule, TrainConfig, TrainResult

__all__ = ["OpenTrainer", "Trainer", "handle_query", "handle_train", "one_line"]

T = TypeVar("T")
_log = logging.getLogger(__name__)

# Their texts are of configuration, shapes and layers, never of examples.
_PUBLIC_ERRORS = (AdapterError, FederationError, UsageError)


class Trainer(Protocol):
    """One client's own side: its data, and what trains on it."""

    @property
    def client_id(self) -> str:
        """The name under which this client takes part, the same in every run."""

    @property
    def num_examples(self) -> int:
        """Training examples that the client has."""

    @property
    def rank(self) -> int | None:
        """The rank that this client can train; None: the global adapter's."""

    def train(
        self, broadcast: Broadcast, config: TrainConfig, rule: LocalRule, round: int, seed: int
    ) -> TrainResult:
        """Train from the broadcast adapter, and return all its factors."""


OpenTrainer = Callable[[ClientSetup], Trainer]


def handle_query(message: Message, open_trainer: OpenTrainer) -> Message:
    """Say who this client is: its id, its rank, and its num_examples where weights need it."""
    return _answer(message, lambda: _query(message.content, open_trainer))


def handle_train(message: Message, open_trainer: OpenTrainer) -> Message:
    """Train for one round; the reply holds the uploaded factors and the declared metrics."""
    return _answer(message, lambda: _train(message.content, open_trainer))


def one_line(text: str, limit: int = 300) -> str:
    """Return `text` as one line of at most `limit` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def _query(content: RecordDict, open_trainer: OpenTrainer) -> RecordDict:
    setup = _read(ClientSetup, content, "setup")
    trainer = open_trainer(setup)
    shared = setup.share_num_examples
    count = trainer.num_examples if shared else None
    reply = RecordDict({"client": to_record(ClientAnswer(trainer.client_id, trainer.rank, count))})
    check_answer(reply, share_num_examples=shared)
    return reply


def _train(content: RecordDict, open_trainer: OpenTrainer) -> RecordDict:
    setup = _read(ClientSetup, content, "setup")
    order = _read(TrainOrder, content, "train")
    if not order.uploaded <= order.rule.trained:
        raise FederationError(
            f"message from the server: expected to upload some of {sorted(order.rule.trained)}, "
            f"what this round trains, found {sorted(order.uploaded)}"
        )
    broadcast = decode_broadcast(content, setup)
    trainer = open_trainer(setup)
    result = trainer.train(broadcast, order.train, order.rule, order.round, order.seed)
    _require_frozen(broadcast.trainable, result.adapter, order.rule)
    metrics = {"loss": float(result.loss), "steps": int(result.steps)} | dict(result.metrics)
    if setup.share_num_examples:
        metrics["num-examples"] = int(result.num_examples)
    reply = encode_reply(result.adapter, order.uploaded, metrics, order.round)
    segments = segments_of(broadcast.trainable, order.uploaded)
    check_reply(reply, segments, share_num_examples=setup.share_num_examples)
    return reply


def _require_frozen(sent: Adapter, trained: Adapter, rule: LocalRule) -> None:
    """Raise unless the trainer kept the layout, and every factor that it was not to train."""
    sent.require_same_layout(trained, "the trainer's result")
    for path, layer in sent.layers.items():
        mine = trained[path]
        for factor, before, after in (("A", layer.A, mine.A), ("B", layer.B, mine.B)):
            if factor not in rule.trained and not np.array_equal(before, after):
                raise FederationError(
                    f"the trainer's result, layer {path!r}: lora_{factor} is frozen in this round, "
                    "and it changed"
                )


def _answer(message: Message, build: Callable[[], RecordDict]) -> Message:
    try:
        content = build()
    except Exception as error:
        known = isinstance(error, FedloraError)
        _log.warning("no reply: %s", one_line(str(error)), exc_info=None if known else error)
        return Message(Error(CLIENT_ERROR, _reason(error)), reply_to=message)
    return Message(content, reply_to=message)


def _reason(error: Exception) -> str:
    if isinstance(error, _PUBLIC_ERRORS):
        return one_line(f"{type(error).__name__}: {error}")
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown place"
    return f"{type(error).__name__} at {where}; see the client's log"


def _read(cls: type[T], content: RecordDict, name: str) -> T:
    record: Mapping[str, object] | None = content.get(name)
    if not isinstance(record, ConfigRecord):
        raise FederationError(f"message from the server: expected a record {name!r}, found none")
    return from_record(cls, record, f"message from the server, {name}")
