"""A SuperLink on a clock of its own: replies come when the script says so, and nobody sleeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Error, Message

from fedlora.federation._flower_private import LINK_NODE_ID, set_message_id, set_source_node
from fedlora.federation.quorum import QuorumGrid
from fedlora.simulation.grid import InProcessGrid
from tests.federation.fakes import FakeTrainer, fake_app

NEVER = float("inf")
FIRST = 1000  # the node of client c0

# What comes for a message: the seconds until then, and the replies.
Script = Callable[[int, Message], tuple[float, list[Message]]]


class Link(InProcessGrid):
    """`clients` nodes; `delays` are their seconds a training message, `script` says the rest.

    Replies are computed when a message is pushed, and lie here until they are pulled.
    """

    def __init__(
        self,
        clients: int = 10,
        delays: Mapping[int, float] | None = None,
        script: Script | None = None,
        trainers: Mapping[int, FakeTrainer] | None = None,
    ) -> None:
        super().__init__(fake_app(trainers), clients)
        self.now = 0.0
        self.pauses: list[float] = []
        self.pushed: list[Message] = []
        self.away: Callable[[int, float], bool] = lambda node, now: False
        self.at: list[tuple[float, Callable[[], None]]] = []  # what happens, and when
        self._delays, self._script = dict(delays or {}), script
        self._lying: list[tuple[float, str, Message]] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.pauses.append(seconds)
        self.now += seconds

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in super().get_node_ids() if not self.away(node, self.now)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self._number(message)
            self.pushed.append(message)
            message_id, node = message.metadata.message_id, message.metadata.dst_node_id
            ids.append(message_id)
            reply = self._number(self._call(message))
            training = message.metadata.message_type == "train"
            delay, replies = self._delays.get(node - FIRST, 1.0) if training else 0.0, [reply]
            if self._script is not None:
                found, replies = self._script(node - FIRST, reply)
                delay = found if found >= 0 else delay
            self._lying += [(self.now + delay, message_id, reply) for reply in replies]
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        here = [i for i in self._lying if i[0] <= self.now + 1e-9 and i[1] in wanted]
        self._lying = [item for item in self._lying if item not in here]
        return [reply for _, _, reply in here]

    def send_and_receive(self, messages: Any, *, timeout: Any = None) -> Any:
        raise AssertionError("whoever waits goes through push and pull")

    def through(self, quorum: Any, cohort: int = 10, **options: Any) -> QuorumGrid:
        """Return the grid under test over this one."""
        return QuorumGrid(self, quorum, cohort, clock=self.clock, sleep=self.sleep, **options)


def from_link(reply: Message, code: int, reason: str) -> Message:
    """The error that a SuperLink makes up in a client's place."""
    answer = Message(Error(code, reason), reply_to=reply)
    answer.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
    set_source_node(answer, LINK_NODE_ID)
    set_message_id(answer, "made up")
    return answer
