"""Federated on-device personalization: share low-rank adapters, never data or full models."""

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
