"""What is derived from a frozen network and kept: activations, and weights in bfloat16."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

__all__ = ["LIMIT", "HalfWeights", "KeptActivations"]

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

    Copies of a model, which share the frozen tensors, share their twins. Not pickled with it.
    """

    def __init__(self) -> None:
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}
        self._lock = threading.Lock()

    def of(self, tensor: Tensor) -> Tensor:
        """Return the twin of a frozen tensor, of its own class, without a gradient."""
        with self._lock:
            known = self._twins.get(id(tensor))
            if known is None or known[0] is not tensor:
                with torch.no_grad():
                    half = tensor.detach().to(torch.bfloat16)
                if isinstance(tensor, torch.nn.Parameter):
                    half = torch.nn.Parameter(half, requires_grad=False)
                known = self._twins[id(tensor)] = (tensor, half)
            return known[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return HalfWeights, ()


def _size(value: Tensor) -> int:
    return value.numel() * value.element_size()
