"""A LoRA federation over Flower: records, strategy, client handler and server.

The names below are imported when they are asked for: a client's process needs neither strategy nor
server, and each message to a device may cost the imports of a new process.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedlora.errors import MissingExtraError

try:
    import flwr.app  # noqa: F401
except ImportError:
    raise MissingExtraError("a federation", "sim") from None

if TYPE_CHECKING:
    from fedlora.federation.checkpoint import (
        Checkpoint,
        ClientRecord,
        Dropped,
        RoundRecord,
        has_checkpoint,
        read_checkpoint,
        read_rounds,
    )
    from fedlora.federation.client import (
        OpenTrainer,
        Trainer,
        handle_evaluate,
        handle_query,
        handle_train,
    )
    from fedlora.federation.phases import round_words
    from fedlora.federation.quorum import QuorumGrid
    from fedlora.federation.records import ClientSetup
    from fedlora.federation.sampling import draw_cohort, draw_held_out
    from fedlora.federation.server import run_federation
    from fedlora.federation.strategy import FederatedLora

__all__ = [
    "Checkpoint",
    "ClientRecord",
    "ClientSetup",
    "Dropped",
    "FederatedLora",
    "OpenTrainer",
    "QuorumGrid",
    "RoundRecord",
    "Trainer",
    "draw_cohort",
    "draw_held_out",
    "handle_evaluate",
    "handle_query",
    "handle_train",
    "has_checkpoint",
    "read_checkpoint",
    "read_rounds",
    "round_words",
    "run_federation",
]

_NAMES = {
    "checkpoint": (
        "Checkpoint", "ClientRecord", "Dropped", "RoundRecord", "has_checkpoint",
        "read_checkpoint", "read_rounds",
    ),
    "client": ("OpenTrainer", "Trainer", "handle_evaluate", "handle_query", "handle_train"),
    "phases": ("round_words",),
    "quorum": ("QuorumGrid",),
    "records": ("ClientSetup",),
    "sampling": ("draw_cohort", "draw_held_out"),
    "server": ("run_federation",),
    "strategy": ("FederatedLora",),
}  # fmt: skip
_WHERE = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
