"""What a client does with a message: answer a query, or train and send back the shared factors.

The trainer is an argument (torch, ONNX, or a fake in a test). An error becomes an error reply whose
reason is one line. It never carries data: only texts of errors that cannot quote an example are
sent, of all others the name and the place. The whole error is logged on the client.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flwr.app import Error, Message, RecordDict

from fedlora.adapter import Adapter, Array
from fedlora.aggregation import Broadcast
from fedlora.errors import (
    AdapterError,
    BaseMismatchError,
    FederationError,
    FedloraError,
    UsageError,
)
from fedlora.federation._flower_private import CLIENT_ERROR
from fedlora.federation.control import next_control, read_own_control, write_own_control
from fedlora.federation.device_state import DeviceState
from fedlora.federation.evaluate import answer_scores, read_evaluate
from fedlora.federation.guard import check_declined
from fedlora.federation.kept_factors import (
    kept_factors,
    kept_segments,
    read_own_factors,
    with_kept,
    write_own_factors,
)
from fedlora.federation.limits import declined_content
from fedlora.federation.own_rows import ContextRows, OwnRows
from fedlora.federation.person import Part, compare_adapters, provenance_of, require_rank
from fedlora.federation.records import ClientSetup
from fedlora.federation.tasks import TrainTask, answer_query, answer_task, read_query, read_task
from fedlora.flat import pack
from fedlora.privacy.local import NO_LIMITS, NoiseLimits
from fedlora.training import LocalRule, TrainConfig, TrainResult

__all__ = [
    "Answer",
    "OpenTrainer",
    "Trainer",
    "declined",
    "error_reply",
    "handle_declined",
    "handle_evaluate",
    "handle_query",
    "handle_train",
    "one_line",
    "reply_with",
    "require_base",
    "trained",
]

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

    @property
    def initial(self) -> Adapter:
        """A₀ and zero B on this client's base: the base's own behaviour."""

    def train(
        self,
        broadcast: Broadcast,
        config: TrainConfig,
        rule: LocalRule,
        round: int | str,
        seed: int,
    ) -> TrainResult:
        """Train from the broadcast adapter, and return all its factors.

        Batches are keyed by (seed, client, round); after the rounds that is a word, "own" or
        "personal".

        With `rule.correction` there is one more argument, ``correction``: the row ``(n,)`` float32
        over the trained factors that is added to every step's gradient. A trainer that does not
        know it fails at the call, and never trains as if nothing had been asked.
        """

    def evaluate(self, adapter: Adapter, part: Part) -> Mapping[str, float] | None:
        """Return the measures of an adapter on a part of this client's data, None for an empty one.

        They have the names of `fedlora.evaluation`. Raises `NonFiniteError` for a loss that is not
        finite.
        """


OpenTrainer = Callable[[ClientSetup], Trainer]
# Makes the reply of a task, its trainer, what that trained, and when this began.
Answer = Callable[[TrainTask, Trainer, TrainResult, float], RecordDict]


def handle_query(
    message: Message,
    open_trainer: OpenTrainer,
    device: DeviceState | None = None,
    *,
    quiet: bool = False,
) -> Message:
    """Say who this client is: its id, its rank, and its num_examples where weights need it.

    quiet: its owner lets no count leave (`limits.tells_nothing`); a run that needs one is refused.
    """
    return reply_with(message, lambda: _query(message.content, open_trainer, device, quiet))


def handle_train(
    message: Message,
    open_trainer: OpenTrainer,
    state: RecordDict | None = None,
    device: DeviceState | None = None,
    *,
    min_examples: int = 0,
    noise: NoiseLimits = NO_LIMITS,
) -> Message:
    """Train for one round; the reply holds the uploaded factors and the declared metrics.

    state, device: this client's own (`Context.state`, and the folder that its owner has named,
    which goes first), for factors that it trains and does not share and for its control variate;
    without any of them a round that has either is refused. min_examples: with fewer the device
    declines, as its owner wants. noise: what its owner demands of local noise.
    """

    def build() -> RecordDict:
        return trained(message.content, open_trainer, state, device, min_examples, noise)

    return reply_with(message, build)


def handle_evaluate(
    message: Message,
    open_trainer: OpenTrainer,
    state: RecordDict | None = None,
    device: DeviceState | None = None,
    *,
    min_examples: int = 0,
    quiet: bool = False,
) -> Message:
    """Train this client's own and personal adapter; the reply holds their declared measures.

    The arguments are those of `handle_train`. The device keeps the global and the personal adapter.
    quiet: its owner lets no score leave, whatever is asked.
    """

    def build() -> RecordDict:
        return _evaluate(message.content, open_trainer, state, device, min_examples, quiet)

    return reply_with(message, build)


def handle_declined(message: Message, reason: str) -> Message:
    """Decline to take part in a round; the reply holds one of the words of `limits.REASONS`."""
    return reply_with(message, lambda: declined(reason))


def one_line(text: str, limit: int = 300) -> str:
    """Return `text` as one line of at most `limit` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def require_base(broadcast: Broadcast, base: str | None) -> None:
    """Raise `BaseMismatchError` unless what was sent is for this client's base."""
    for adapter in (broadcast.trainable, broadcast.frozen):
        if adapter is not None and adapter.base != base:
            raise BaseMismatchError(
                f"this client's base is {_short(base)}, the server's adapter is for "
                f"{_short(adapter.base)}; install the same base on both"
            )


def error_reply(message: Message, error: Exception) -> Message:
    """Return the reply that says of `error` what may leave this client, and log the rest here."""
    known = isinstance(error, FedloraError)
    _log.warning("no reply: %s", one_line(str(error)), exc_info=None if known else error)
    return Message(Error(CLIENT_ERROR, _reason(error)), reply_to=message)


def _short(fingerprint: str | None) -> str:
    return fingerprint[:12] if fingerprint else "of no name"


def _query(
    content: RecordDict, open_trainer: OpenTrainer, device: DeviceState | None, quiet: bool
) -> RecordDict:
    setup = read_query(content)
    if quiet and setup.share_num_examples:
        raise FederationError(
            "this device's owner lets no count of examples leave it: expected equal weights, found "
            "a run that weights by examples"
        )
    trainer = open_trainer(setup)
    # Not asked where it is not shared: it may mean to read the data.
    count = trainer.num_examples if setup.share_num_examples else 0
    remembers = device is not None
    return answer_query(setup, trainer.client_id, trainer.rank, count, remembers=remembers)


def declined(reason: str) -> RecordDict:
    """Return what a device that declines sends, past the guard."""
    content = declined_content(reason)
    check_declined(content)
    return content


def trained(
    content: RecordDict,
    open_trainer: OpenTrainer,
    state: RecordDict | None,
    device: DeviceState | None,
    min_examples: int,
    noise: NoiseLimits,
    answer: Answer | None = None,
) -> RecordDict:
    """Train as a message asks, and return the reply; see `handle_train`.

    answer: makes the reply, and no other leaves; None: the ordinary one.
    """
    started = time.monotonic()
    task = _limited(read_task(content), noise)
    order, broadcast = task.order, task.broadcast
    if answer is not None and (order.rule.correction is not None or order.noise is not None):
        raise FederationError(
            "message from the server: expected neither control variates nor local noise in a "
            "secure sum, found some"
        )
    trainer = open_trainer(task.setup)
    if min_examples and trainer.num_examples < min_examples:
        return declined("examples")
    require_rank(broadcast.trainable, trainer.rank)
    rows = None
    own = kept_factors(task)
    if own or order.rule.correction is not None:
        rows = _rows(task.setup, trainer, state, device)
    if own:
        if rows is None:
            raise FederationError(
                f"{', '.join(sorted(own))}: expected a place for factors that are trained and not "
                "shared, found none"
            )
        row = read_own_factors(task, rows)
        if row is not None:
            broadcast = Broadcast(with_kept(task, row), broadcast.frozen)
    if order.rule.correction is not None:
        return _train_corrected(task, trainer, rows, started)
    result = trainer.train(broadcast, order.train, order.rule, order.round, order.seed)
    _require_kept(broadcast.trainable, result.adapter, order.rule)
    if rows is not None:
        write_own_factors(task, rows, pack(result.adapter, kept_segments(task)))
    if order.noise is not None and device is not None:
        device.note_release(trainer.initial.base, order.round, order.noise)
    return (answer or _answered)(task, trainer, result, started)


def _evaluate(
    content: RecordDict,
    open_trainer: OpenTrainer,
    state: RecordDict | None,
    device: DeviceState | None,
    min_examples: int,
    quiet: bool,
) -> RecordDict:
    task = read_evaluate(content)
    trainer = open_trainer(task.setup)
    if min_examples and trainer.num_examples < min_examples:
        return declined("examples")
    rows = _rows(task.setup, trainer, state, device) if task.order.kept else None
    if device is not None:
        device.open(trainer.initial.base)  # what is wrong with it is said before the training
    person = compare_adapters(task, trainer, rows)
    told = task.order.tell and not quiet
    reply = answer_scores(*((person.scores, person.kept_global) if told else (None, None)))
    if device is not None:
        device.keep(person, trainer.initial.base, provenance_of(task))
    return reply


def _limited(task: TrainTask, limits: NoiseLimits) -> TrainTask:
    """Return the task with the noise that the device's owner agrees to; raises where none is.

    What is not noised does not leave beside what is.
    """
    noise, setup = limits.agreed(task.order.noise), task.setup
    open_too = setup.share_metrics or setup.share_num_examples
    if noise is not None and (open_too or task.order.rule.correction is not None):
        raise FederationError(
            "message from the server: expected nothing beside an update with local noise, found an "
            "order for metrics, a count of examples or a control variate"
        )
    if noise == task.order.noise:
        return task
    return replace(task, order=replace(task.order, noise=noise))


def _rows(
    setup: ClientSetup, trainer: Trainer, state: RecordDict | None, device: DeviceState | None
) -> OwnRows | None:
    if device is not None:
        return device.rows(trainer.initial.base, setup.run)
    return None if state is None else ContextRows(state)


def _train_corrected(
    task: TrainTask, trainer: Trainer, rows: OwnRows | None, started: float
) -> RecordDict:
    """Train with control variates, keep the client's next one, and send how it has changed."""
    order, sent, form = task.order, task.broadcast, task.reply
    if rows is None or sent.control is None:
        raise FederationError("expected a place for this client's control variate, found none")
    own = read_own_control(form.buffer, rows, order.round)
    # Not an argument that every trainer has: see `Trainer.train`.
    corrected: Any = trainer
    result: TrainResult = corrected.train(
        sent, order.train, order.rule, order.round, order.seed, correction=sent.control - own
    )
    _require_kept(sent.trainable, result.adapter, order.rule)
    before, after = (pack(a, form.segments) for a in (sent.trainable, result.adapter))
    following, change = next_control(own, sent.control, before, after, result.steps, order.train)
    content = _answered(task, trainer, result, started, change)
    write_own_control(form.buffer, rows, order.round, following)
    return content


def _answered(
    task: TrainTask,
    trainer: Trainer,
    result: TrainResult,
    started: float,
    control: Array | None = None,
) -> RecordDict:
    # To the hundredth: enough to see where a round's time goes, and no more of the device.
    seconds = round(time.monotonic() - started, 2)
    return answer_task(
        task,
        pack(result.adapter, task.reply.segments),
        client_id=trainer.client_id,
        num_examples=result.num_examples,
        loss=result.loss,
        steps=result.steps,
        metrics={"seconds": seconds, **result.metrics},
        control=control,
    )


def _require_kept(sent: Adapter, trained: Adapter, rule: LocalRule) -> None:
    """Raise unless the trainer kept layout, base, scalings and every factor not to be trained.

    Only the factors travel; with another scaling they would mean something else on the server.
    """
    sent.require_same_layout(trained, "the trainer's result")
    if trained.base != sent.base:
        raise FederationError("the trainer's result: it is for another base than what was sent")
    for path, layer in sent.layers.items():
        mine = trained[path]
        if mine.scaling != layer.scaling:
            raise FederationError(
                f"the trainer's result, layer {path!r}: expected scaling {layer.scaling:g} as it "
                f"was sent, found {mine.scaling:g}"
            )
        for factor, before, after in (("A", layer.A, mine.A), ("B", layer.B, mine.B)):
            if factor not in rule.trained and not np.array_equal(before, after):
                raise FederationError(
                    f"the trainer's result, layer {path!r}: lora_{factor} is frozen in this round, "
                    "and it changed"
                )


def reply_with(message: Message, build: Callable[[], RecordDict]) -> Message:
    """Return the reply that `build` makes; of its error what may leave this client."""
    try:
        content = build()
    except Exception as error:
        return error_reply(message, error)
    return Message(content, reply_to=message)


def _reason(error: Exception) -> str:
    if isinstance(error, _PUBLIC_ERRORS):
        return one_line(f"{type(error).__name__}: {error}")
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown place"
    return f"{type(error).__name__} at {where}; see the client's log"
