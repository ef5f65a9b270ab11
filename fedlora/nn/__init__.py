"""Adapters in torch: put LoRA on a model, train it, take it out."""

from fedlora.errors import MissingExtraError

try:
    import torch as _torch  # noqa: F401
except ImportError:  # pragma: no cover - the tests have torch
    raise MissingExtraError("fedlora.nn", "train") from None

from fedlora.nn.beside import beside
from fedlora.nn.inject import (
    base_fingerprint,
    extract_adapter,
    inject_lora,
    layer_specs,
    load_adapter_into,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from fedlora.nn.load import Base, load_base
from fedlora.nn.local import train_local
from fedlora.nn.rows import Batch
from fedlora.nn.tasks import Task, get_task

__all__ = [
    "Base",
    "Batch",
    "Task",
    "base_fingerprint",
    "beside",
    "extract_adapter",
    "get_task",
    "inject_lora",
    "layer_specs",
    "load_adapter_into",
    "load_base",
    "merge_lora",
    "remove_lora",
    "train_local",
    "unmerge_lora",
]
