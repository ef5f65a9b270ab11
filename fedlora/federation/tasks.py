"""What a message asks of a client, and the client's answer: the one way in and the one way out.

The real client and every engine of a simulation go through here. A virtual client costs little:
what many clients are asked alike is read once (`read_task` gives back the very same value for as
long as the records are the same objects; of one round, for clients of several ranks), and an answer
is made from one flat row. Nothing leaves unseen: each answer goes through the guard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import is_
from typing import Any, Generic, TypeVar

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedlora.adapter import Array
from fedlora.aggregation import Broadcast
from fedlora.errors import FederationError
from fedlora.federation.buffers import FixedList
from fedlora.federation.codecs import CODECS, FP32, rounding
from fedlora.federation.control import read_control, require_no_control
from fedlora.federation.guard import check_answer, check_reply
from fedlora.federation.records import (
    ClientAnswer,
    ClientSetup,
    TrainOrder,
    answer_content,
    decode_broadcast,
    from_record,
)
from fedlora.federation.replies import ReplyForm, encode_reply_row
from fedlora.flat import pack
from fedlora.privacy.noise import fresh_key

__all__ = ["TrainTask", "answer_query", "answer_task", "read_query", "read_task"]

T = TypeVar("T")

MOST_KEPT = 8  # contents that are told apart: those of clients of different ranks alternate


@dataclass(frozen=True, slots=True, eq=False)
class TrainTask:
    """A training message, read. All clients of a round that are sent the same share one."""

    setup: ClientSetup
    order: TrainOrder
    broadcast: Broadcast
    reply: ReplyForm  # the factors that it asks back, and how they lie in a row


def read_query(content: RecordDict) -> ClientSetup:
    """Read a query. Raises `FederationError`."""
    return _QUERY.of(content) or _QUERY.keep(content, _read(ClientSetup, content, "setup"), 0)


def read_task(content: RecordDict) -> TrainTask:
    """Read a training message. Raises `FederationError` or an `AdapterError`."""
    task = _TASK.of(content)
    if task is None:
        task = _read_task(content)
        _TASK.keep(content, task, task.order.round)
    return task


def answer_query(
    setup: ClientSetup,
    client_id: str,
    rank: int | None,
    num_examples: int,
    *,
    remembers: bool = False,
) -> RecordDict:
    """Return a client's answer to a query. Raises `FederationError` for a senseless value.

    remembers: whether the client keeps its own rows over restarts; told where a run is named.
    """
    count = num_examples if setup.share_num_examples else None
    asked = setup.run is not None
    answer = ClientAnswer(client_id, rank, count, CODECS, remembers if asked else None)
    content = answer_content(answer)
    check_answer(content, share_num_examples=setup.share_num_examples, remembers=asked)
    return content


def answer_task(
    task: TrainTask,
    row: Array,
    *,
    client_id: str,
    num_examples: int,
    loss: float,
    steps: int,
    metrics: Mapping[str, float] | None = None,
    control: Array | None = None,
) -> RecordDict:
    """Return a client's answer to a training message.

    row: ``(task.reply.rows.size,)`` float32, the trained factors in the order of
    ``task.reply.segments``; it is copied. client_id: keys the rounding of a codec. control: the
    change of the client's control variate, a row of the same layout, where the task asks for it.
    metrics: what the trainer tells beside these, which the guard refuses unless it is declared; of
    all of them nothing is told in a run with privacy. Where the order asks for local noise, the row
    is clipped and noised here, before anything else is made of it.

    Raises `ShapeMismatchError`, `NonFiniteError` for what a codec cannot hold, and
    `FederationError` for what must not leave.
    """
    told: dict[str, int | float] = {"loss": float(loss), "steps": int(steps), **(metrics or {})}
    if task.setup.share_num_examples:
        told["num-examples"] = int(num_examples)
    form, order = task.reply, task.order
    if order.noise is not None:
        row = _noised(task, row)
    draws = rounding(form.wire.codec, order.seed, client_id, order.round)
    content = encode_reply_row(form, row, told, control, draws)
    check_reply(
        content,
        form.wire,
        share_num_examples=task.setup.share_num_examples,
        control=form.buffer if form.controlled else None,
        share_metrics=task.setup.share_metrics,
    )
    return content


def _noised(task: TrainTask, row: Array) -> Array:
    """Return what a client with local privacy tells in place of its row.

    The randomness is the operating system's, a new key for every reply: nothing that another can
    know or repeat.
    """
    noise = task.order.noise
    if noise is None:
        return row
    sent = pack(task.broadcast.trainable, task.reply.segments)
    if row.shape != sent.shape:
        raise FederationError(f"expected a row of {sent.shape}, found {row.shape}")
    difference = row.astype(np.float64) - sent
    return (sent + noise.applied(difference, fresh_key())).astype(np.float32)


def _read_task(content: RecordDict) -> TrainTask:
    setup = _read(ClientSetup, content, "setup")
    order = _read(TrainOrder, content, "train")
    if not order.uploaded <= order.rule.trained:
        raise FederationError(
            f"message from the server: expected to upload some of {sorted(order.rule.trained)}, "
            f"what this round trains, found {sorted(order.uploaded)}"
        )
    broadcast = decode_broadcast(content, setup)
    controlled, who = order.rule.correction is not None, "message from the server"
    form = ReplyForm.of(
        broadcast.trainable,
        order.uploaded,
        order.round,
        controlled=controlled,
        codec=order.upload_codec or FP32,
        measured=setup.share_metrics,
    )
    if not controlled:
        require_no_control(content, who)
        return TrainTask(setup, order, broadcast, form)
    if order.uploaded != order.rule.trained:
        raise FederationError(
            f"{who}: expected control variates of all that this round trains, "
            f"{sorted(order.rule.trained)}, found {sorted(order.uploaded)}"
        )
    control = read_control(content, form.rows, form.buffer, who)
    return TrainTask(setup, order, replace(broadcast, control=control), form)


def _read(cls: type[T], content: RecordDict, name: str) -> T:
    record: Mapping[str, object] | None = content.get(name)
    if not isinstance(record, ConfigRecord):
        raise FederationError(f"message from the server: expected a record {name!r}, found none")
    return from_record(cls, record, f"message from the server, {name}")


class _Last(Generic[T]):
    """The last contents that were read, and what they were read as.

    The messages of a round have records of their own, whose values are the same objects: comparing
    identities costs a hundredth of reading, and cannot take True for 1. Where messages come by a
    wire or are copied whole, nothing is the same object, and every message is read.
    """

    def __init__(self) -> None:
        # Replaced whole: threads may read at any time.
        self._last: tuple[tuple[_Seen, T, int], ...] = ()

    def of(self, content: RecordDict) -> T | None:
        return next((value for seen, value, _ in self._last if seen.is_again(content)), None)

    def keep(self, content: RecordDict, value: T, round: int) -> T:
        """Keep a value beside the others of its round."""
        others = (kept for kept in self._last if kept[2] == round)
        self._last = ((_Seen(content), value, round), *others)[:MOST_KEPT]
        return value


class _Seen:
    """The objects that a content was made of."""

    def __init__(self, content: RecordDict) -> None:
        self._names = list(content.keys())
        self._records: list[tuple[Any, list[Any]]] = [
            (record.copy(), list(record.values())) for record in content.values()
        ]
        values = [value for _, values in self._records for value in values]
        # What can be changed in place; most lists of a message cannot.
        plain = (v for v in values if isinstance(v, list) and not isinstance(v, FixedList))
        self._lists = [(value, tuple(value)) for value in plain]
        self._arrays = [
            (value, (value.dtype, value.shape, value.data))
            for value in values
            if isinstance(value, FlowerArray)
        ]

    def is_again(self, content: RecordDict) -> bool:
        """Whether `content` is made of the very same objects, none of them changed since."""
        if list(content.keys()) != self._names or not self._has_arrays_of(content):
            return False
        record: Any
        for record, (seen, values) in zip(content.values(), self._records, strict=True):
            # Equal keys, and then identical values: 1 equals True.
            if type(record) is not type(seen) or record != seen:
                return False
            if not all(map(is_, record.values(), values)):
                return False
        for array, parts in self._arrays:
            if not all(map(is_, (array.dtype, array.shape, array.data), parts)):
                return False
        return all(
            len(value) == len(parts) and all(map(is_, value, parts)) for value, parts in self._lists
        )

    def _has_arrays_of(self, content: RecordDict) -> bool:
        """Whether the arrays are the same objects: a quick no for the message of another rank."""
        arrays: Any = (record for record in content.values() if isinstance(record, ArrayRecord))
        found = [array for record in arrays for array in record.values()]
        return len(found) == len(self._arrays) and all(
            map(is_, found, (array for array, _ in self._arrays))
        )


_QUERY: _Last[ClientSetup] = _Last()
_TASK: _Last[TrainTask] = _Last()
