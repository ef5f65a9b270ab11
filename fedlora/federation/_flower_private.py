"""The names of Flower that are not public, in one place; `tests/federation` pins them.

Flower only exposes `flwr.app`, `flwr.clientapp` and `flwr.serverapp`. What a grid of our own needs
beyond that is here, so that a Flower release which moves it breaks one module and one test.
"""

from __future__ import annotations

from typing import Any

from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "CLIENT_ERROR",
    "LINK_NODE_ID",
    "MESSAGE_UNAVAILABLE",
    "Run",
    "empty_run",
    "identify_process",
    "set_message_id",
    "set_source_node",
]

CLIENT_ERROR: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
MESSAGE_UNAVAILABLE: int = ErrorCode.MESSAGE_UNAVAILABLE  # it expired, or was never there
LINK_NODE_ID: int = SUPERLINK_NODE_ID


def empty_run(run_id: int = 1) -> Any:
    """Return the `Run` that a grid shows to a ServerApp."""
    run = Run.create_empty(run_id=run_id)
    run.primary_task_id = 1
    return run


def identify_process(run_id: int = 1) -> None:
    """Say whose messages this process creates; without it `Message(...)` raises."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = LINK_NODE_ID
    TaskIdentity.task_id = 1


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id that a SuperLink would give it."""
    message.metadata.__dict__["_message_id"] = message_id


def set_source_node(message: Message, node_id: int) -> None:
    """Say that a message comes from a node, where a SuperLink has answered in its place."""
    message.metadata.__dict__["_src_node_id"] = node_id
