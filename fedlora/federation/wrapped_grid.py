"""What every grid around another one passes on; see `quorum` and `faults` for what they change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

__all__ = ["WrappedGrid", "is_of_round"]


def is_of_round(message: Message) -> bool:
    """Whether a message or its reply is of a round: a training, or a phase of a secure sum."""
    return message.metadata.message_type.partition(".")[0] == "train"


class WrappedGrid(Grid):
    """Pass everything on to `grid`; a subclass changes how messages travel."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Any) -> None:
        """Set the run of the grid inside."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run that the ServerApp sees."""
        return self._grid.run

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are connected now."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Any:
        """Return what the grid inside knows of its nodes."""
        return self._grid.get_nodes()

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message, as the grid inside does."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push through the grid inside."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull from the grid inside."""
        return self._grid.pull_messages(message_ids)
