"""A grid that polls quickly and ends a round with enough replies, over any other grid.

Flower's own grid sleeps for three seconds between two looks, waits for the last client, and brings
what a message of a former round was answered with as if it were new. `QuorumGrid` pushes and pulls
through the grid that it wraps and decides itself how long to go on:

    all        everyone has replied or failed
    quorum     ``ceil(share * cohort)`` valid replies, and `grace` seconds after them
    deadline   the round's time is over

What has arrived when a round ends is aggregated, be it more than the quorum. A client that fails
is no longer waited for, but only valid replies count towards the quorum: failures do not end a
round early. A reply that comes after its round is pulled, counted and dropped.

A grid that computes its replies when they are pulled has none that is late: all of one pull are
handed on before the clock is looked at. So in a simulation without faults a quorum changes
nothing. Replies are handed on one at a time, but messages are pushed before the first is read.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from flwr.app import Error, Message
from flwr.serverapp import Grid

from fedlora.conditions import QuorumConfig
from fedlora.federation._flower_private import (
    LINK_NODE_ID,
    MESSAGE_UNAVAILABLE,
    set_source_node,
)
from fedlora.federation.records import content_bytes
from fedlora.federation.wrapped_grid import WrappedGrid, is_of_round

__all__ = ["QuorumGrid", "Replies", "Wait"]

SHORTEST_PAUSE = 0.05  # seconds between two looks, growing to
LONGEST_PAUSE = 0.5
GROWTH = 1.5
# A device whose clock is ahead counts a message as expired so much earlier, so every message lives
# this much longer (seconds) than its reply is waited for.
CLOCKS_DIFFER = 60.0

Ended = Literal["open", "all", "quorum", "deadline"]


@dataclass(frozen=True, slots=True)
class Wait:
    """How long the replies to some messages are waited for."""

    enough: int | None = None  # replies that count, after which only `grace` is left; None: all
    grace: float = 0.0  # seconds
    grace_share: float = 0.0  # of the time that it took to have enough, if that is longer
    deadline: float = math.inf  # seconds from the sending


@dataclass(frozen=True, slots=True)
class _Asked:
    """A message that is out."""

    node: int
    message_type: str


class Replies(Iterator[Message]):
    """The replies to some messages as they come, and afterwards what can be said of them.

    `sent` messages went out, `arrived` replies came in time, errors included. `late` replies to
    older messages came since the exchange before, of `late_bytes`; they are not among these.
    `ended` says why there are no more.
    """

    def __init__(self) -> None:
        self.sent = self.arrived = self.late = self.late_bytes = 0
        self.ended: Ended = "open"
        self.waited = 0.0  # seconds from the sending until the end
        self._without_error = 0
        self._count: Callable[[], int] | None = None
        self._source: Iterator[Message] = iter(())

    def count_by(self, count: Callable[[], int]) -> None:
        """Let the reader say how many replies count towards the quorum.

        By itself every reply does that is no error. Whoever reads them knows better: a reply may
        be refused, or say politely that its device declines.
        """
        self._count = count

    @property
    def counted(self) -> int:
        """Replies so far that count towards the quorum."""
        return self._without_error if self._count is None else self._count()

    def __next__(self) -> Message:
        return next(self._source)


class QuorumGrid(WrappedGrid):
    """Send and receive through `grid`, waiting by `config` for a round's replies.

    config: None waits for everyone until the round's time is over. cohort: the clients of a round,
    of which `config.share` is; how many more are asked does not matter. at_once: messages that are
    pushed or pulled in one call; None: all, which a simulation needs to form its groups. `clock`
    and `sleep` are in seconds.

    Raises what the wrapped grid raises.
    """

    def __init__(
        self,
        grid: Grid,
        config: QuorumConfig | None,
        cohort: int,
        *,
        at_once: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(grid)
        self._config, self._cohort, self._at_once = config, cohort, at_once
        self.clock, self.sleep = clock, sleep
        self._out: dict[str, _Asked] = {}  # by message id: what nobody waits for any more
        self._answers: list[Message] = []  # to queries, after they were waited for
        self._late = self._late_bytes = 0  # replies that no exchange has counted yet

    def exchange(self, messages: Iterable[Message], wait: Wait) -> Replies:
        """Push `messages` and return their replies, which are pulled as they are read."""
        replies = Replies()
        started = self.clock()
        waiting: dict[str, _Asked] = {}
        failed: list[Message] = []
        for batch in _batches(messages, self._at_once):
            if math.isfinite(wait.deadline):
                for message in batch:
                    message.metadata.ttl = wait.deadline + CLOCKS_DIFFER
            replies.sent += len(batch)
            failed += self._push(batch, waiting)
        replies._source = self._waited(replies, waiting, failed, wait, started)
        return replies

    def post(self, messages: Iterable[Message], deadline: float) -> None:
        """Push `messages` and wait for nothing; see `late_answers`."""
        for batch in _batches(messages, self._at_once):
            for message in batch:
                message.metadata.ttl = deadline + CLOCKS_DIFFER
            self._answers += self._push(batch, self._out)

    def late_answers(self) -> list[Message]:
        """Return the answers and errors to queries that have come since nobody waits for them."""
        self._collect()
        found, self._answers = self._answers, []
        return found

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Replies:
        """Send a round's messages, and return the replies as they come.

        The quorum is for a round's messages, "train" and the phases "train.…" of a secure sum. All
        others are waited for until everyone has replied or `timeout` (seconds) is over.
        """
        source = iter(messages)
        first = next(source, None)
        deadline = math.inf if timeout is None else timeout
        wait = Wait(deadline=deadline)
        quorum = self._config
        if quorum is not None and first is not None and is_of_round(first):
            enough = math.ceil(quorum.share * self._cohort - 1e-9)  # 0.7 * 10 is a little over 7
            wait = Wait(enough, quorum.grace, deadline=min(deadline, quorum.deadline))
        return self.exchange(itertools.chain(() if first is None else (first,), source), wait)

    def _waited(
        self,
        replies: Replies,
        waiting: dict[str, _Asked],
        failed: Sequence[Message],
        wait: Wait,
        started: float,
    ) -> Iterator[Message]:
        """Yield the replies in time, and leave the rest to be dropped when they come."""
        end, enough, pause = started + wait.deadline, wait.enough, SHORTEST_PAUSE
        reason: Ended = "deadline"
        mine = set(waiting)
        try:
            for message in failed:
                replies.arrived += 1
                yield message
            while waiting:
                before = replies.arrived
                for message in self._pull(list(waiting)):
                    asked = waiting.pop(message.metadata.reply_to_message_id, None)
                    if asked is None and message.metadata.reply_to_message_id not in mine:
                        self._note_late(message)
                        continue
                    replies.arrived += 1
                    replies._without_error += not message.has_error()
                    yield message if asked is None else _attributed(message, asked.node)
                now = self.clock()
                if enough is not None and replies.counted >= enough:
                    grace = max(wait.grace, wait.grace_share * (now - started))
                    if now + grace < end:
                        end, reason = now + grace, "quorum"
                    enough = None
                if not waiting or now >= end:
                    break
                pause = SHORTEST_PAUSE if replies.arrived > before else pause
                self.sleep(min(pause, end - now))
                pause = min(pause * GROWTH, LONGEST_PAUSE)
            if replies.sent:
                self._collect()
                replies.late, replies.late_bytes = self._late, self._late_bytes
                self._late = self._late_bytes = 0
            replies.ended = reason if waiting else "all"
        finally:
            self._out.update(waiting)
            replies.waited = self.clock() - started

    def _push(self, batch: Sequence[Message], out: dict[str, _Asked]) -> list[Message]:
        """Push, and note in `out` what has gone. Return an error for each message that has not."""
        ids: list[str | None] = list(self._grid.push_messages(batch))
        if not ids and len(batch) > 1:  # what Flower says to messages that are too large together
            half = len(batch) // 2
            return self._push(batch[:half], out) + self._push(batch[half:], out)
        failed = []
        for message, message_id in itertools.zip_longest(batch, ids):
            if message_id:
                metadata = message.metadata
                out[message_id] = _Asked(metadata.dst_node_id, metadata.message_type)
            else:
                error = Error(MESSAGE_UNAVAILABLE, "the message could not be sent")
                failed.append(Message(error, reply_to=message))
        return failed

    def _pull(self, message_ids: Sequence[str]) -> Iterator[Message]:
        size = self._at_once or len(message_ids)
        for start in range(0, len(message_ids), size):
            yield from self._grid.pull_messages(message_ids[start : start + size])

    def _collect(self) -> None:
        """Pull what has come for messages that nobody waits for: once, without waiting."""
        if self._out:
            for message in self._pull(list(self._out)):
                self._note_late(message)

    def _note_late(self, message: Message) -> None:
        asked = self._out.pop(message.metadata.reply_to_message_id, None)
        if asked is not None and asked.message_type == "query":
            self._answers.append(_attributed(message, asked.node))
        elif not message.has_error():
            self._late += 1
            with contextlib.suppress(Exception):  # what a stranger sent cannot always be counted
                self._late_bytes += content_bytes(message.content)


def _batches(messages: Iterable[Message], size: int | None) -> Iterator[list[Message]]:
    """Yield lists: Flower's grid goes over what it pushes twice, and a generator is empty then."""
    source = iter(messages)
    while batch := list(itertools.islice(source, size)):
        yield batch


def _attributed(message: Message, node: int) -> Message:
    """Let an error that the SuperLink made up for a client come from that client.

    An expired message and a node that is gone are answered by the link itself, in its own name.
    """
    if message.has_error() and message.metadata.src_node_id == LINK_NODE_ID:
        set_source_node(message, node)
    return message
