"""A base with LoRA on it, a task and everyone's data: what local training needs, opened once."""

from __future__ import annotations

import copy
import functools
import threading
from dataclasses import dataclass, replace

from torch import nn

from fedlora.adapter import Adapter, LoraConfig
from fedlora.data import FederatedData, load_data
from fedlora.experiment import BaseConfig, DataConfig
from fedlora.nn import Task, extract_adapter, get_task, inject_lora, load_base

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


def open_world(base: BaseConfig, data: DataConfig, lora: LoraConfig, seed: int) -> World:
    """Load the base, put LoRA on it, and open the data.

    Raises what `load_base`, `load_data` and `inject_lora` raise.
    """
    loaded = load_base(base.id)
    population = load_data(
        data.id,
        task=data.task,
        tokenizer=loaded.tokenizer,
        clients=data.clients,
        seed=seed,
        test_share=data.test_share,
        validation_share=data.validation_share,
        max_length=data.max_length,
        partition=data.partition,
    )
    inject_lora(loaded.model, lora, seed, base=loaded.card.fingerprint)
    return World(loaded.model, get_task(data.task), population, extract_adapter(loaded.model))


# The last world of this process, for callers that take turns: nobody may rely on the factors that
# another has left in its model.
shared_world = functools.lru_cache(maxsize=1)(open_world)

_OPENING = threading.Lock()
_OF_THREAD = threading.local()


def thread_world(base: BaseConfig, data: DataConfig, lora: LoraConfig, seed: int) -> World:
    """Return `shared_world` for the main thread, and a copy of it for every other thread."""
    with _OPENING:
        world = shared_world(base, data, lora, seed)
    if threading.current_thread() is threading.main_thread():
        return world
    if getattr(_OF_THREAD, "original", None) is not world:
        _OF_THREAD.original, _OF_THREAD.copy = world, world.copy()
    copied: World = _OF_THREAD.copy
    return copied
