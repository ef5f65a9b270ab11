"""What goes wrong between a server and its clients, on purpose: a grid around any Flower `Grid`.

A federation has to live with messages that are lost, replies that are late, doubled or damaged, and
clients that end in the middle. `FaultyGrid` brings these about with the chances that ``[faults]``
names, so that what a run makes of them can be seen and tested.

**The same faults again.** Whether something happens to a message is drawn from (faults.seed, client
id, round) and from nothing else. Flower's node ids are random in every run, but the answers to the
query at the start pass through this grid, and tell it which client a node is. So a run, a resumed
run and another engine meet the same faults; raising one chance changes no other kind's. A node that
has not told its id is known by its node id, which is the same in every in-process run and in no
other.

**What is hit.** Training messages and their replies, in a secure sum those of each phase, drawn
anew; there ``corrupt`` has nothing to damage, and does nothing. The query is not hit: a client that
it does not reach would be missing from all of the run.

**Time.** In one process nothing sleeps: a delayed or slow client's message is handed to the grid
after all others, so that its reply comes last and replies need not be kept; one that would come
after the deadline is handed on in the next round, where its reply is a late one. Over a real link
(`push_messages` and `pull_messages`, or ``real_time=True``) a reply that has come is held back for
that many seconds, and a message that was dropped is waited for, as it would be.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedlora.conditions import FaultsConfig
from fedlora.federation._flower_private import CLIENT_ERROR, set_message_id
from fedlora.federation.corruption import corrupt, corruptions_of
from fedlora.federation.wrapped_grid import WrappedGrid, is_of_round
from fedlora.randomness import rng

__all__ = ["CRASHED", "Fault", "FaultyGrid", "describe_faults", "draw_fault", "with_faults"]

CRASHED = "the client ended in the middle of the round (an injected fault)"
POLL_SECONDS = 0.5
# The order of the draws: it stays, so that a seed goes on to mean the same faults.
_KINDS = ("drop", "crash", "delay", "slow", "duplicate", "corrupt")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one message and its reply."""

    drop: bool
    crash: bool
    delay: bool
    slow: bool
    duplicate: bool
    corrupt: bool
    generator: np.random.Generator  # for the kind and place of a corruption


def draw_fault(faults: FaultsConfig, client: str, round: str, kind: str = "train") -> Fault | None:
    """Return what happens to a client's message in a round; None: nothing.

    kind: the message type, "train" or a phase "train.…" of a secure sum.
    """
    phase = () if kind == "train" else (kind,)
    generator = rng(faults.seed, "faults", client, round, *phase)
    drawn = zip(_KINDS, generator.random(len(_KINDS)), strict=True)
    hit = {kind: bool(x < getattr(faults, kind)) for kind, x in drawn}
    return Fault(**hit, generator=generator) if any(hit.values()) else None


def describe_faults(faults: FaultsConfig | None) -> str | None:
    """Return the note for a run's summary: which faults were injected; None: none."""
    found = [kind for kind in _KINDS if faults is not None and getattr(faults, kind)]
    if faults is None or not found:
        return None
    told = ", ".join(f"{kind} {getattr(faults, kind):g}" for kind in found)
    seconds = f", {faults.seconds:g} s" if faults.delay or faults.slow else ""
    return f"faults were injected: {told} (chance a message{seconds}, faults.seed {faults.seed})"


def with_faults(grid: Grid, faults: FaultsConfig | None, *, real_time: bool = False) -> Grid:
    """Return `grid`, inside a `FaultyGrid` if there are faults to inject."""
    if describe_faults(faults) is None or faults is None:
        return grid
    return FaultyGrid(grid, faults, real_time=real_time)


class FaultyGrid(WrappedGrid):
    """Pass messages to `grid` and replies back, with `faults`.

    real_time: whether `send_and_receive` waits by the clock, as over a real link. clock and sleep
    are in seconds.
    """

    def __init__(
        self,
        grid: Grid,
        faults: FaultsConfig,
        *,
        real_time: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(grid)
        self._faults = faults
        self._real_time, self._clock, self._sleep = real_time, clock, sleep
        self._clients: dict[int, str] = {}  # by node id, as they told
        # By node, round and message type, until the reply comes.
        self._open: dict[tuple[int, str, str], Fault] = {}
        self._late: list[Message] = []  # to be handed on in a later round
        self._dropped: set[str] = set()  # ids of messages that were pushed to nobody
        self._held: dict[
            str, tuple[float, list[Message]]
        ] = {}  # replies with the time they are due
        self._numbers = itertools.count(1)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Yield the replies as they come; `timeout` in seconds is the deadline of this round."""
        if self._real_time:
            return self._polled(messages, timeout)
        return self._streamed(messages, timeout)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push the messages that are not hit on the way; return an id for every one."""
        ids: list[str | None] = []
        passed: list[Message] = []
        for message in messages:
            fault = self._drawn(message)
            if fault is not None and (fault.drop or fault.crash):
                own = f"fault-{next(self._numbers)}"
                ids.append(own)
                set_message_id(message, own)
                if fault.drop:
                    self._dropped.add(own)
                else:
                    self._held[own] = self._clock(), [self._crashed(message)]
            else:
                ids.append(None)
                passed.append(message)
        pushed = iter(list(self._grid.push_messages(passed)))
        # A grid that could not push one of them says so by an empty id, or by a shorter list.
        return [next(pushed, "") if own is None else own for own in ids]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield the replies that are there, and not held back any longer."""
        asked = []
        for message_id in message_ids:
            if message_id in self._held:
                due, replies = self._held[message_id]
                if due <= self._clock():
                    del self._held[message_id]
                    yield from replies
            elif message_id and message_id not in self._dropped:
                asked.append(message_id)
        for reply in self._grid.pull_messages(asked) if asked else ():
            fault = self._fault_of(reply)
            replies = self._replies(reply, fault)
            wait = self._seconds(fault)
            if wait:
                self._held[reply.metadata.reply_to_message_id] = self._clock() + wait, replies
            else:
                yield from replies

    def _streamed(self, messages: Iterable[Message], timeout: float | None) -> Iterator[Message]:
        """Yield replies without waiting; only messages that are delayed are kept."""
        ready: deque[Message] = deque()  # replies of clients that crashed
        passed = self._passed(messages, math.inf if timeout is None else timeout, ready)
        for reply in self._grid.send_and_receive(passed, timeout=timeout):
            while ready:
                yield ready.popleft()
            yield from self._replies(reply, self._fault_of(reply))
        yield from ready

    def _passed(
        self, messages: Iterable[Message], limit: float, ready: deque[Message]
    ) -> Iterator[Message]:
        delayed: list[Message] = []
        for message in messages:
            if self._late and is_of_round(message):
                # First, as they would come: a client that is asked again has done the old task.
                now = _exchange_of(message)
                yield from [late for late in self._late if _exchange_of(late) != now]
                self._late = [late for late in self._late if _exchange_of(late) == now]
            fault = self._drawn(message)
            if fault is not None and fault.drop:
                continue
            if fault is not None and fault.crash:
                ready.append(self._crashed(message))
                continue
            wait = self._seconds(fault)
            if wait > limit:
                self._late.append(message)
            elif wait:
                delayed.append(message)
            else:
                yield message
        yield from delayed

    def _polled(self, messages: Iterable[Message], timeout: float | None) -> Iterator[Message]:
        end = math.inf if timeout is None else self._clock() + timeout
        waiting = dict.fromkeys(filter(None, self.push_messages(messages)))
        while waiting:
            for reply in self.pull_messages(list(waiting)):
                waiting.pop(reply.metadata.reply_to_message_id, None)
                yield reply
            left = end - self._clock()
            if not waiting or left <= 0:
                return
            self._sleep(min(POLL_SECONDS, left))

    def _drawn(self, message: Message) -> Fault | None:
        """Draw a message's fault, and keep it for the reply if it concerns that."""
        told = message.metadata
        if not is_of_round(message):
            return None
        client = self._clients.get(told.dst_node_id, f"node {told.dst_node_id}")
        fault = draw_fault(self._faults, client, told.group_id, told.message_type)
        if fault is not None and not (fault.drop or fault.crash):
            self._open[told.dst_node_id, told.group_id, told.message_type] = fault
        return fault

    def _fault_of(self, reply: Message) -> Fault | None:
        told = reply.metadata
        if told.message_type == "query":
            self._meet(reply)
            return None
        return self._open.pop((told.src_node_id, told.group_id, told.message_type), None)

    def _meet(self, reply: Message) -> None:
        record = reply.content.get("client") if reply.has_content() else None
        name = record.get("client_id") if isinstance(record, ConfigRecord) else None
        if isinstance(name, str):
            self._clients[reply.metadata.src_node_id] = name

    def _replies(self, reply: Message, fault: Fault | None) -> list[Message]:
        """Return what arrives for a reply: itself, changed or not, once or twice."""
        if fault is None:
            return [reply]
        if reply.has_content():
            if fault.slow:
                reply.content = _slower(reply.content, self._faults.seconds)
            if fault.corrupt:
                reply.content = _spoiled(reply.content, fault.generator)
        return [reply, reply] if fault.duplicate else [reply]

    def _seconds(self, fault: Fault | None) -> float:
        return 0.0 if fault is None else self._faults.seconds * (fault.delay + fault.slow)

    def _crashed(self, message: Message) -> Message:
        reply = Message(Error(CLIENT_ERROR, CRASHED), reply_to=message)
        set_message_id(reply, f"fault-{next(self._numbers)}")
        return reply


def _exchange_of(message: Message) -> tuple[str, str]:
    """Return the round and the phase of it that a message is of."""
    return message.metadata.group_id, message.metadata.message_type


def _slower(content: RecordDict, seconds: float) -> RecordDict:
    """Return a reply whose client says that it took longer, where it says how long it took."""
    metrics = content.get("metrics")
    if not isinstance(metrics, MetricRecord) or type(metrics.get("seconds")) is not float:
        return content
    changed: Any = metrics.copy()
    changed["seconds"] += seconds
    return RecordDict({**content, "metrics": changed})


def _spoiled(content: RecordDict, generator: np.random.Generator) -> RecordDict:
    names = corruptions_of(content)
    if not names:  # no answer to a round: a device that declines, say
        return content
    name = names[generator.integers(len(names))]
    try:
        return corrupt(content, name, generator)
    except Exception as error:  # a stranger's reply may be wrong enough as it is
        _log.info("a reply that could not be corrupted (%s): %s", name, type(error).__name__)
        return content
