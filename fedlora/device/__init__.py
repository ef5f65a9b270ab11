"""On the device: a bundle served and trained with ONNX Runtime alone, without torch.

`Session` serves it, `Trainer` trains on it. The names below are imported when they are asked for,
so that what is here and needs no ONNX Runtime, the manifest, can be imported without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.device.runtime import OpenBundle, open_bundle
    from fedlora.device.session import Prediction, Session
    from fedlora.device.suggest import Suggestion
    from fedlora.device.trainer import Trainer

__all__ = ["OpenBundle", "Prediction", "Session", "Suggestion", "Trainer", "open_bundle"]

_WHERE = {
    "OpenBundle": "runtime",
    "Prediction": "session",
    "Session": "session",
    "Suggestion": "suggest",
    "Trainer": "trainer",
    "open_bundle": "runtime",
}


def __getattr__(name: str) -> Any:
    """Import a public name. Raises `MissingExtraError` without ONNX Runtime."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
