"""Flower `Grid`s in this process: the unchanged ServerApp and ClientApp, some clients at a time.

Flower's own simulation starts Ray and takes about 20 s and 1 GB before the first round. This grid
calls the ClientApp directly, and keeps what matters of a real link: every client gets records of
its own, an exception becomes an error reply, and a client keeps its `Context.state`. Replies are
made shortly before the server reads them, so neither they nor the messages pile up.

`VirtualGrid` is what such a grid shares with `fedlora.simulation.cohort_grid`, which calls no
ClientApp.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedlora.errors import FederationError
from fedlora.federation._flower_private import (
    CLIENT_ERROR,
    empty_run,
    identify_process,
    set_message_id,
)
from fedlora.simulation.threads import in_order

__all__ = ["InProcessGrid", "VirtualGrid"]

_FIRST_NODE = 1000  # node ids are made up here, and have no meaning beyond one run


class VirtualGrid(Grid):
    """`num_clients` virtual clients of this process; a subclass says how they reply."""

    def __init__(self, num_clients: int) -> None:
        if num_clients < 1:
            raise FederationError(f"expected at least one virtual client, found {num_clients}")
        self.num_clients = num_clients
        self._run = empty_run()
        self._pushed: dict[str, Message] = {}
        self._numbers = itertools.count(1)
        identify_process(self._run.run_id)

    def replies(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield a reply to each message, in an order that only depends on the messages."""
        raise NotImplementedError

    def set_run(self, run: Any) -> None:
        """Set the run; nothing here depends on it."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run that the ServerApp sees."""
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids of all virtual clients."""
        return range(_FIRST_NODE, _FIRST_NODE + self.num_clients)

    def number_of(self, message: Message) -> int:
        """Return the place in the data of the client that a message is for.

        Raises `FederationError` for a node that is not of this simulation.
        """
        number = message.metadata.dst_node_id - _FIRST_NODE
        if not 0 <= number < self.num_clients:
            raise FederationError(f"no node {message.metadata.dst_node_id} in this simulation")
        return number

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message; the same as ``Message(...)``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep messages until their replies are pulled."""
        ids = []
        for message in messages:
            self._number(message)
            self._pushed[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the clients of pushed messages, and yield their replies."""
        found = (self._pushed.pop(message_id, None) for message_id in message_ids)
        yield from map(self._number, self.replies(m for m in found if m is not None))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Yield the replies; `timeout` has no meaning in one process."""
        return map(self._number, self.replies(map(self._number, messages)))

    def _number(self, message: Message) -> Message:
        set_message_id(message, str(next(self._numbers)))
        return message


class InProcessGrid(VirtualGrid):
    """Call `client_app` for each of `num_clients` virtual clients, in this process.

    A client's `node_config` is what Flower's simulation gives it (``partition-id`` and
    ``num-partitions``), and `node_config`: the settings of this device's owner, who here is the
    caller. Contexts are made when a client is called; one is kept only while it holds state.
    `workers` clients run at a time, each in a thread; replies come in the order of the messages.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_clients: int,
        node_config: Mapping[str, str | int | float | bool] | None = None,
        workers: int = 1,
    ) -> None:
        super().__init__(num_clients)
        self._app = client_app
        self._node_config = dict(node_config or {})
        self._states: dict[int, RecordDict] = {}
        self._workers = workers

    def replies(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield the replies in the order of `messages`."""
        return in_order(self._call, messages, self._workers)

    def _call(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        message.content = _copied(message.content)
        try:
            partition = self.number_of(message)
            context = self._context(node, partition)
            reply = self._app(message, context)
            self._keep_state(node, context)
        except Exception as error:
            # The text is Flower's own, so that both simulations report the same.
            reason = f"{type(error)}:<'{error}'>"
            reply = Message(Error(CLIENT_ERROR, reason), reply_to=message)
        return reply

    def _context(self, node: int, partition: int) -> Context:
        config = {"partition-id": partition, "num-partitions": self.num_clients}
        return Context(
            run_id=self._run.run_id,
            node_id=node,
            node_config={**self._node_config, **config},
            state=self._states.get(node) or RecordDict(),
            run_config={},
        )

    def _keep_state(self, node: int, context: Context) -> None:
        if len(context.state):
            self._states[node] = context.state
        else:
            self._states.pop(node, None)


def _copied(content: RecordDict) -> RecordDict:
    """Copy the records and their lists; arrays are immutable bytes and are shared."""
    copies = RecordDict()
    for name, record in content.items():
        copy: Any = record.copy()
        for key, value in record.items():
            if isinstance(value, list):
                copy[key] = list(value)
        copies[name] = copy
    return copies
