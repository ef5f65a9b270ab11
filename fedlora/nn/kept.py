"""What is derived from a frozen network and kept: activations, weights in bfloat16, and sums.

Copies of a model, in several threads, share what is kept here. It is not pickled with the model.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import Adapter

__all__ = ["LIMIT", "MERGED_WEIGHTS", "HalfWeights", "KeptActivations", "SummedWeights"]

# Above, weights with an adapter added are no longer small beside everything else of a process.
MERGED_WEIGHTS = 1 << 24  # float32 values: 64 MB

# Bytes. MiniLM keeps 49 KB for an example of 32 tokens: 21,000 examples.
LIMIT = 1 << 30
_log = logging.getLogger(__name__)


class KeptActivations:
    """Tensors by key, at most `limit` bytes of them; the one that was used longest ago goes first.

    A group of clients visits its own examples step after step, and then another group does: so
    those of the group that trains are always here, and those of earlier rounds as far as they fit.
    What is dropped is computed again to the same bits, so that no result depends on the limit.

    Copies of a model share one, from several threads. It is not pickled with the model.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.enabled = True  # False: every pass is a plain one
        self.bytes = 0
        self.served = 0  # calls of the model that started from kept activations
        self.verdicts: dict[Hashable, bool] = {}  # whether it was tried, and works
        self._values: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._full = False

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> Tensor | None:
        """Return a kept tensor, and mark it as just used."""
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def put(self, key: Hashable, value: Tensor) -> None:
        """Keep a tensor that owns its memory; the oldest ones make room."""
        with self._lock:
            if key in self._values:  # another thread was first, with the same bits
                return
            self._values[key] = value
            self.bytes += _size(value)
            while self.bytes > self.limit and self._values:
                _, oldest = self._values.popitem(last=False)
                self.bytes -= _size(oldest)
                if not self._full:
                    self._full = True
                    _log.info(
                        "%d examples' activations fill %d MB: the oldest are computed again",
                        len(self._values), self.limit >> 20,
                    )  # fmt: skip

    def clear(self) -> None:
        """Forget every tensor, but not whether keeping them works."""
        with self._lock:
            self._values.clear()
            self.bytes = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptActivations, (self.limit,)


class HalfWeights:
    """The bfloat16 twins of frozen tensors, made once each: two bytes a value.

    Copies of a model, which share the frozen tensors, share their twins. A twin goes with the
    tensor that it was made of. Not pickled with the model.
    """

    def __init__(self) -> None:
        self._twins: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._twins)

    def of(self, tensor: Tensor) -> Tensor:
        """Return the twin of a frozen tensor, of its own class, without a gradient."""
        with self._lock:
            known = self._twins.get(id(tensor))
            if known is None or known[0]() is not tensor:
                with torch.no_grad():
                    half = tensor.detach().to(torch.bfloat16)
                if isinstance(tensor, torch.nn.Parameter):
                    half = torch.nn.Parameter(half, requires_grad=False)
                key, twins = id(tensor), self._twins
                # Called before the memory is given to another tensor, which may get the same id.
                gone = weakref.ref(tensor, lambda _: twins.pop(key, None))
                known = self._twins[key] = (gone, half)
            return known[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return HalfWeights, ()


class SummedWeights:
    """Frozen weights to which a frozen adapter was added, of the adapters that were used last.

    All clients of a round train beside the same frozen adapter, group by group and thread by
    thread: the sums are made once. At most `limit` values are kept, the newest in any case.
    """

    def __init__(self, limit: int = MERGED_WEIGHTS) -> None:
        self.limit = limit
        self.made = 0  # sums that were computed
        self._sums: OrderedDict[tuple[str, str], tuple[Tensor, Tensor]] = OrderedDict()
        self._values = 0
        self._named: tuple[Adapter, str] | None = None
        self._lock = threading.Lock()

    def name_of(self, adapter: Adapter) -> str:
        """Return the adapter's fingerprint, which is computed once for the same object in a row."""
        named = self._named
        if named is None or named[0] is not adapter:
            named = self._named = (adapter, adapter.fingerprint())
        return named[1]

    def of(self, name: str, path: str, weight: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """Return the sum for a layer: of `weight` and the adapter called `name`, or ``make()``."""
        with self._lock:
            found = self._sums.get((name, path))
            if found is not None and found[0] is weight:
                self._sums.move_to_end((name, path))
                return found[1]
            if found is not None:  # of another base, under the same path
                self._values -= found[1].numel()
            summed = make()
            self.made += 1
            self._sums[name, path] = (weight, summed)
            self._sums.move_to_end((name, path))
            self._values += summed.numel()
            while self._values > self.limit and len(self._sums) > 1:
                _, (_, oldest) = self._sums.popitem(last=False)
                self._values -= oldest.numel()
            return summed

    def __reduce__(self) -> tuple[Any, ...]:
        return SummedWeights, (self.limit,)


def _size(value: Tensor) -> int:
    return value.numel() * value.element_size()
