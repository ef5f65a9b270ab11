"""Federated on-device personalization: share low-rank adapters, never data or full models.

The names below are imported when they are asked for, so that a process pays for what it uses.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.adapter import Adapter, LoraConfig, LoraLayer, stack
    from fedlora.aggregation import Method, ServerState, Update, method, methods
    from fedlora.errors import FedloraError
    from fedlora.formats import load_adapter, save_adapter
    from fedlora.training import LocalRule, TrainConfig, TrainResult

__all__ = [
    "Adapter",
    "FedloraError",
    "LocalRule",
    "LoraConfig",
    "LoraLayer",
    "Method",
    "ServerState",
    "TrainConfig",
    "TrainResult",
    "Update",
    "load_adapter",
    "method",
    "methods",
    "save_adapter",
    "stack",
]

__version__ = "0.1.0"

_NAMES = {
    "adapter": ("Adapter", "LoraConfig", "LoraLayer", "stack"),
    "aggregation": ("Method", "ServerState", "Update", "method", "methods"),
    "errors": ("FedloraError",),
    "formats": ("load_adapter", "save_adapter"),
    "training": ("LocalRule", "TrainConfig", "TrainResult"),
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
