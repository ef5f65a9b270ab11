"""One phase of a secure sum at the server: whom it has asked, and what came of it.

Replies are read one at a time. A client that fails, declines, is silent, or whose reply is wrong is
out of the round with its reason, which opens with the phase's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict

from fedlora.errors import FedloraError
from fedlora.federation.checkpoint import Dropped
from fedlora.federation.client import one_line
from fedlora.federation.limits import DECLINED, read_declined
from fedlora.federation.phases import PhaseClock
from fedlora.federation.quorum import Replies
from fedlora.federation.records import content_bytes

__all__ = ["Member", "Phase"]


@dataclass(frozen=True, slots=True)
class Member:
    """One client of a round's cohort."""

    client_id: str
    node: int
    place: int  # in the cohort


@dataclass(slots=True)
class Phase:
    """One phase of a round: who was asked, and what came of it."""

    kind: str  # the message type
    round: int
    names: Mapping[int, str] = field(default_factory=dict)  # client ids of the cohort, by node
    patient: bool = False  # whether everyone is waited for, whatever the quorum
    awaited: dict[int, Member] = field(default_factory=dict)  # by node, until it answers
    answered: dict[int, Member] = field(default_factory=dict)  # by node
    right: list[Member] = field(default_factory=list)  # whose answer counts
    dropped: list[Dropped] = field(default_factory=list)
    declined: list[str] = field(default_factory=list)
    failures: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    late: int = 0  # replies to older messages, which the grid has thrown away

    @property
    def name(self) -> str:
        """The phase's own word: "keys"."""
        return self.kind.partition(".")[2]

    def messages(self, contents: Iterable[tuple[Member, RecordDict]]) -> Iterator[Message]:
        """Yield the phase's messages."""
        for member, content in contents:
            self.awaited[member.node] = member
            self.bytes_down += content_bytes(content)
            yield Message(content, member.node, self.kind, group_id=str(self.round))

    def read(
        self,
        replies: Iterable[Message],
        take: Callable[[Member, RecordDict], None],
        clock: PhaseClock | None = None,
    ) -> None:
        """Read the replies as they come; `take` gets each content, and raises for a wrong one.

        clock: what it takes to get them is "wait" there; None: it is in a phase of its own.
        """
        if isinstance(replies, Replies):
            replies.count_by(lambda: 0 if self.patient else len(self.right))
        for message in replies if clock is None else clock.within("wait", replies):
            told = message.metadata
            if (told.group_id, told.message_type) != (str(self.round), self.kind):
                # Before it is looked up: a late reply must not take the place of the right one.
                what = f"{told.message_type[:20]} of round {told.group_id[:20]}"
                client = self.names.get(told.src_node_id, f"node {told.src_node_id}")
                self.drop(client, f"a reply to {what}, too late to count")
                continue
            member = self.awaited.pop(told.src_node_id, None)
            if member is None and told.src_node_id in self.answered:
                client = self.answered[told.src_node_id].client_id
                self.drop(client, "a second reply; the first counts")
            elif member is None:
                self.drop(f"node {told.src_node_id}", "was not asked")
            else:
                self.answered[member.node] = member
                self._read(member, message, take)
        silent = "no reply in time"
        if isinstance(replies, Replies):
            self.late += replies.late
            self.bytes_up += replies.late_bytes
            if replies.ended == "quorum":
                silent = "not waited for: the phase had its quorum"
        for member in self.awaited.values():
            self.drop(member.client_id, silent)

    def _read(
        self, member: Member, message: Message, take: Callable[[Member, RecordDict], None]
    ) -> None:
        if message.has_error():
            self._fail(member, message.error.reason or "failed, no reason")
            return
        try:
            self.bytes_up += content_bytes(message.content)
            if word := read_declined(message.content):
                self.declined.append(member.client_id)
                # Without the phase: it is no fault of the device's, and others look for the word.
                self.dropped.append(Dropped(member.client_id, f"{DECLINED}{word}"))
                return
            take(member, message.content)
        except FedloraError as error:
            self._fail(member, str(error))
        except Exception as error:  # what a stranger sent must not end everyone's run
            self._fail(member, f"a reply that cannot be read ({type(error).__name__})")
        else:
            self.right.append(member)

    def _fail(self, member: Member, reason: str) -> None:
        self.failures += 1
        self.drop(member.client_id, reason)

    def drop(self, client: str, reason: str) -> None:
        """Note that something of a client does not count."""
        self.dropped.append(Dropped(client, one_line(f"{self.name}: {reason}")))
