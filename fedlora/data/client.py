"""One client's split data, and a federation of clients that is read lazily."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fedlora.data.examples import Examples
from fedlora.errors import unknown_name

__all__ = ["ClientData", "FederatedData"]


@dataclass(frozen=True, slots=True)
class ClientData:
    """One client's examples. No example, and no stretch of a recording, is in two parts."""

    client_id: str
    train: Examples
    validation: Examples  # may be empty
    test: Examples


KEPT = 4096  # clients whose data stays in memory; there may be a hundred thousand


@dataclass(frozen=True, eq=False)
class FederatedData:
    """Clients and their data, each client read when it is asked for; the last `KEPT` are kept.

    `client_ids` are sorted. An id such as ``"u7#2"`` is a second copy of client u7, made when more
    clients are asked for than there are; `notes` then says so.
    """

    id: str
    task: str
    client_ids: tuple[str, ...]
    read: Callable[[str], ClientData] = field(repr=False)  # by the id of an original client
    labels: tuple[str, ...] | None = None  # names of the classes; classification only
    notes: tuple[str, ...] = ()  # what a report must say about this data
    _kept: dict[str, ClientData] = field(default_factory=dict, init=False, repr=False)
    _known: frozenset[str] = field(init=False, repr=False)
    _keeping: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_known", frozenset(self.client_ids))

    def __len__(self) -> int:
        return len(self.client_ids)

    def client(self, client_id: str) -> ClientData:
        """Return one client's data. Raises `UnknownNameError`, `DataError`."""
        if client_id not in self._known:
            raise unknown_name(f"client of {self.id}", client_id, self.client_ids)
        original = client_id.partition("#")[0]
        found = self._kept.get(original)
        if found is None:
            found = self.read(original)
            with self._keeping:
                if len(self._kept) >= KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[original] = found
        return ClientData(client_id, found.train, found.validation, found.test)

    def clients(self) -> Iterator[ClientData]:
        """Yield every client's data, in the order of `client_ids`."""
        return map(self.client, self.client_ids)
