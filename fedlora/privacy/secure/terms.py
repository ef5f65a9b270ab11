"""What all clients of a round agree to before anyone sends anything."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Self

from fedlora.errors import SecureTermsError
from fedlora.privacy.secure.graph import ring_neighbors, share_threshold
from fedlora.privacy.secure.quantize import Quantizer

__all__ = ["MAX_CLIENTS", "MAX_SIZE", "Terms"]

MAX_CLIENTS = 10_000
MAX_SIZE = 1 << 31
_MAX_NAME = 1_000


@dataclass(frozen=True)
class Terms:
    """Public, the same for all of a round, sent by the server; clients are 0 to ``clients - 1``.

    Every key and every share is bound to their `digest`, so that a message made under other terms
    (another round, a lower threshold) is refused.

    Raises `SecureTermsError` for terms under which the server could learn more than the sum.
    """

    run: str
    round: int
    size: int  # numbers in a vector; the ring vector has one more, which counts
    clients: int
    threshold: int  # with fewer clients left nothing is revealed; more than half of all
    neighbors: int | None  # of each client, an even number; None, or all others: everyone
    bits: int  # of the ring: 32 or 64
    clipping_range: float  # numbers are clipped to [-range, range] before they are quantized

    def __post_init__(self) -> None:
        whole = ("round", "size", "clients", "threshold", "bits")
        for name in whole if self.neighbors is None else (*whole, "neighbors"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise SecureTermsError(f"{name}: expected a whole number >= 0, found {value!r}")
        if not isinstance(self.run, str) or len(self.run) > _MAX_NAME:
            raise SecureTermsError(f"run: expected a name of {_MAX_NAME} characters at most")
        if not 1 <= self.size <= MAX_SIZE:
            raise SecureTermsError(f"size: expected 1 to {MAX_SIZE} numbers, found {self.size}")
        if not 2 <= self.clients <= MAX_CLIENTS:
            raise SecureTermsError(
                f"clients: expected 2 to {MAX_CLIENTS}, found {self.clients}; the sum of one "
                "client is its vector"
            )
        if not self.clients < 2 * self.threshold <= 2 * self.clients:
            raise SecureTermsError(
                f"threshold: expected more than half of {self.clients} clients and no more than "
                f"all, found {self.threshold}; with half a server could unmask a client twice"
            )
        if self.bits not in (32, 64):
            raise SecureTermsError(f"bits: expected 32 or 64, found {self.bits}")
        if (
            not isinstance(self.clipping_range, int | float)
            or not 0 < self.clipping_range < math.inf
        ):
            raise SecureTermsError(
                f"clipping_range: expected a finite number > 0, found {self.clipping_range!r}"
            )
        if self.neighbors is not None and not self.complete:
            if self.neighbors < 2 or self.neighbors % 2:
                raise SecureTermsError(
                    f"neighbors: expected an even number >= 2, found {self.neighbors}; a client "
                    "has as many on each side of the ring"
                )
            share_threshold(self.clients, self.neighbors)

    @property
    def complete(self) -> bool:
        """Whether everyone is everyone's neighbor."""
        return self.neighbors is None or self.neighbors >= self.clients - 1

    @cached_property
    def share_threshold(self) -> int:
        """How many holders of a client's shares open one of its secrets."""
        if self.neighbors is None or self.complete:
            return self.threshold
        return share_threshold(self.clients, self.neighbors)

    @cached_property
    def quantizer(self) -> Quantizer:
        """How numbers become ring numbers, and the error of a sum."""
        return Quantizer(self.bits, self.clipping_range, self.clients)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all terms (32 bytes)."""
        text = json.dumps(self.to_plain(), sort_keys=True)
        return hashlib.sha256(b"fedlora secure aggregation terms 1\n" + text.encode()).digest()

    def neighbors_of(self, index: int) -> tuple[int, ...]:
        """Return the clients that one shares masks and secrets with, sorted, without itself."""
        self.require_index(index)
        if self.neighbors is None or self.complete:
            return tuple(other for other in range(self.clients) if other != index)
        return tuple(ring_neighbors(self.run, self.round, self.clients, self.neighbors, index))

    def holders_of(self, index: int) -> tuple[int, ...]:
        """Return the clients that hold a share of one's secrets: its neighbors and itself."""
        return tuple(sorted((*self.neighbors_of(index), index)))

    def require_index(self, index: int) -> None:
        """Raise `SecureTermsError` unless `index` is a client's."""
        if type(index) is not int or not 0 <= index < self.clients:
            raise SecureTermsError(
                f"index: expected a client's place, 0 to {self.clients - 1}, found {index!r}"
            )

    def to_plain(self) -> dict[str, str | int | float | None]:
        """Return the fields by name, as JSON or a Flower record takes them."""
        plain = asdict(self)
        return plain | {"clipping_range": float(self.clipping_range)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Read `to_plain`'s fields; raises `SecureTermsError` for too many, too few, or wrong."""
        names = {field.name for field in fields(cls)}
        if set(plain) != names:
            raise SecureTermsError(
                f"terms: expected {', '.join(sorted(names))}, found {', '.join(sorted(plain))}"
            )
        return cls(**plain)
