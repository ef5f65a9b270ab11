"""What is known of the round that is under way: who was asked, who answered, what it has cost."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedlora.experiment import FederationConfig
from fedlora.federation.checkpoint import Dropped
from fedlora.federation.client import one_line
from fedlora.federation.codecs import FP32
from fedlora.federation.phases import PhaseClock
from fedlora.federation.replies import ReplyForm
from fedlora.federation.secure.round import SecureRound

__all__ = ["CurrentRound", "Sent"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sent:
    """What was sent to one client, against which its reply is checked."""

    client_id: str
    form: ReplyForm  # one for all clients that were sent the same


@dataclass(slots=True)
class CurrentRound:
    """A round, from the drawing of its cohort to its line in rounds.jsonl."""

    number: int
    cohort: tuple[str, ...]
    awaited: dict[int, Sent] = field(default_factory=dict)  # by node id, until it answers
    answered: dict[int, str] = field(default_factory=dict)  # node id -> client id
    dropped: list[Dropped] = field(default_factory=list)
    declined: list[str] = field(default_factory=list)  # client ids
    failures: int = 0  # replies that were errors or wrong
    valid: dict[str, int] = field(default_factory=dict)  # client id -> steps
    loss_sum: float = 0.0
    loss_weight: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    clock: PhaseClock = field(default_factory=PhaseClock)
    client_seconds: list[float] = field(default_factory=list)
    late: int = 0  # replies to older rounds
    surplus_up: int = 0  # what would come on top of these in fp32
    surplus_down: int = 0
    secure: SecureRound | str | None = None  # the phases of a secure sum; or why there is none

    @property
    def is_declined(self) -> bool:
        """Whether nobody trained, and no fewer declined than failed."""
        return not self.valid and len(self.declined) >= max(1, self.failures)

    @property
    def loss(self) -> float | None:
        """The mean over the clients by their weight; None: nobody told one."""
        return self.loss_sum / self.loss_weight if self.loss_weight else None

    def fp32_bytes(self, config: FederationConfig) -> Mapping[str, int]:
        """Return what the round's bytes would have been in fp32; nothing where they are."""
        if config.upload_codec == config.download_codec == FP32:
            return {}
        return {
            "up": self.bytes_up + self.surplus_up,
            "down": self.bytes_down + self.surplus_down,
        }

    def drop(self, client: str, reason: str) -> None:
        """Note, and log, that a client's part does not count, and why."""
        dropped = Dropped(client, one_line(reason))
        self.dropped.append(dropped)
        _log.warning("round %d: dropped %s: %s", self.number, dropped.client, dropped.reason)

    def give_up(self, clients: Iterable[str], reason: str) -> None:
        """Drop the clients that are left in it."""
        for client in list(clients) or ["everyone"]:
            self.drop(client, reason)
        self.valid.clear()
