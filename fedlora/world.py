"""A base with LoRA on it, a task and everyone's data: what local training needs, opened once."""

from __future__ import annotations

import copy
import functools
import threading
from dataclasses import dataclass, replace

from torch import nn

from fedlora.adapter import Adapter, LoraConfig
from fedlora.data import FederatedData
from fedlora.errors import ConfigError
from fedlora.experiment import BaseConfig, DataConfig, open_data
from fedlora.nn import Base, Task, extract_adapter, get_task, inject_lora, load_base
from fedlora.nn.checkpointing import checkpoint_blocks
from fedlora.nn.classifier import NEW_HEAD
from fedlora.nn.quantize import quantize_base, require

__all__ = ["World", "open_world", "shared_world", "thread_world"]


@dataclass(frozen=True, slots=True)
class World:
    """Everything that one process trains and evaluates with."""

    model: nn.Module  # frozen, with LoRA injected
    task: Task
    data: FederatedData
    initial: Adapter  # A₀ and zero B: the base's own behaviour

    def copy(self) -> World:
        """Return a world for another thread: its own factors on the same frozen weights."""
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        shared = {id(tensor): tensor for tensor in (*frozen, *self.model.buffers())}
        return replace(self, model=copy.deepcopy(self.model, shared))


def open_world(
    base: BaseConfig,
    data: DataConfig,
    lora: LoraConfig,
    seed: int,
    checkpointing: bool = False,
) -> World:
    """Load the base, put LoRA on it, and open the data.

    checkpointing: trade time for memory, see `checkpoint_blocks`; no result depends on it. Raises
    what `load_base`, `load_data`, `inject_lora`, `quantize_base` and `checkpoint_blocks` raise.
    """
    if base.quantize is not None:
        require(base.quantize)  # before minutes of loading
    loaded = load_base(base.id, num_classes=base.num_classes)
    population = open_data(data, loaded.tokenizer, seed)
    _require_head(loaded, base, data, population)
    inject_lora(loaded.model, lora, seed, base=loaded.card.fingerprint)
    initial = extract_adapter(loaded.model)
    if base.num_classes is not None and NEW_HEAD not in initial:
        raise ConfigError(
            f"lora: expected the new head {NEW_HEAD!r} among the adapted layers, found it left "
            "out: nothing would be learned; name it in lora.target_modules, and blocks there by a "
            "regular expression, since lora.layers keeps nothing but blocks"
        )
    for path, layer in initial.layers.items():
        if path == NEW_HEAD and layer.rank < layer.out_features:
            raise ConfigError(
                f"lora: expected a rank of at least {layer.out_features}, the number of classes, "
                f"for the new head {path!r}, found {layer.rank}; set lora.rank_pattern.{path}"
            )
    if base.quantize is not None:
        quantize_base(loaded.model, base.quantize)
    if checkpointing:
        checkpoint_blocks(loaded.model)
    return World(loaded.model, get_task(data.task), population, initial)


def _require_head(loaded: Base, base: BaseConfig, data: DataConfig, people: FederatedData) -> None:
    """Raise unless the base has a head for the classes of the data, or for tokens."""
    classes = len(people.labels or ())
    if data.task == "next-token" and loaded.card.task == "embedding":
        raise ConfigError(
            f"base {base.id!r} is an encoder and cannot predict tokens; use a language model, such "
            "as tiny-chat"
        )
    if data.task != "classification" or not classes:
        return
    if loaded.card.task in ("next-token", "embedding"):
        does = "predicts tokens" if loaded.card.task == "next-token" else "has no head"
        raise ConfigError(
            f"base {base.id!r} {does}, and {data.id!r} has {classes} classes; "
            f"set base.num_classes = {classes} to put a new head on it"
        )
    if base.num_classes is None and loaded.card.labels and len(loaded.card.labels) != classes:
        raise ConfigError(
            f"base {base.id!r} tells {len(loaded.card.labels)} classes apart, and {data.id!r} has "
            f"{classes}; use another base for this data"
        )
    if base.num_classes not in (None, classes):
        raise ConfigError(
            f"base.num_classes: expected {classes}, the classes of {data.id!r}, found "
            f"{base.num_classes}"
        )


def shared_world(
    base: BaseConfig, data: DataConfig, lora: LoraConfig, seed: int, checkpointing: bool = False
) -> World:
    """Return the last world of this process, or open another in its place.

    For callers that take turns: nobody may rely on the factors that another has left in its model.
    """
    return _last_world(base, data, lora, seed, checkpointing)  # always five: they are the key


_last_world = functools.lru_cache(maxsize=1)(open_world)
_OPENING = threading.Lock()
_OF_THREAD = threading.local()


def thread_world(
    base: BaseConfig,
    data: DataConfig,
    lora: LoraConfig,
    seed: int,
    checkpointing: bool = False,
) -> World:
    """Return `shared_world` for the main thread, and a copy of it for every other thread."""
    with _OPENING:
        world = shared_world(base, data, lora, seed, checkpointing)
    if threading.current_thread() is threading.main_thread():
        return world
    if getattr(_OF_THREAD, "original", None) is not world:
        _OF_THREAD.original, _OF_THREAD.copy = world, world.copy()
    copied: World = _OF_THREAD.copy
    return copied
