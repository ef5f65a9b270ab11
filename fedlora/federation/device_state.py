"""The state folder that a device's owner gives to its client: node config ``state=DIR``.

Without one nothing outlives a run. The folder is a `fedlora.store.Store`, made when it is first
used: for the bundle of a client that trains in ONNX Runtime, and without one for torch. Only the
owner's word names it. What a server sends is written into files, and is never part of a path.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora.adapter import Array
from fedlora.errors import FederationError, StoreError
from fedlora.federation.person import Person
from fedlora.flat import Segment
from fedlora.privacy.ledger import Ledger, LedgerLine
from fedlora.privacy.local import LocalNoise, local_event
from fedlora.store import RunRows, Store

__all__ = ["DeviceState", "WaitingRows", "owners_state", "waiting_lock"]

LOCK_SECONDS = 30.0  # to wait for another process, such as a personalization by hand


@dataclass(frozen=True, slots=True)
class DeviceState:
    """Where a client keeps what is its own; nothing is read or made before `open`."""

    folder: Path
    bundle: Path | None = None  # of a client that trains in ONNX Runtime

    def open(self, base: str | None) -> Store:
        """Open the state of a client whose base has this fingerprint; make it if there is none.

        Raises `FederationError` when the state is of another base, and what `Store` raises.
        """
        if base is None:
            raise FederationError("this client's base has no fingerprint: it can keep no state")
        if (self.folder / "state.json").is_file():
            store = Store.open(self.folder)
        elif self.bundle is not None:
            store = Store.create(self.folder, self.bundle, in_place=True)
        else:
            store = Store.create_without_bundle(self.folder, base)
        found = store.status().bundle.base
        if found != base:
            raise FederationError(
                f"this client's state is of the base {found[:12]}, its trainer's is {base[:12]}; "
                "name another folder in the node config's state"
            )
        return store

    def rows(self, base: str | None, run: str | None) -> WaitingRows:
        """Return the rows that the client keeps of one run. Raises as `open` does."""
        if run is None:
            raise FederationError(
                "message from the server, setup: expected the run's name beside what this client "
                "keeps of it, found none"
            )
        return WaitingRows(self.open(base), run)

    def note_release(self, base: str | None, round: int, noise: LocalNoise) -> None:
        """Write down that a noised update of this device leaves it now, for its owner to add up.

        A line of ``privacy.jsonl``, the same as those of a server; over all runs of this device.
        Raises as `open` does, and `StoreError` when another process holds the state for long.
        """
        store = self.open(base)
        event, norm = local_event(noise.noise_multiplier), noise.clipping_norm
        std = noise.noise_multiplier * norm
        with waiting_lock(store):  # every message has a process of its own
            # The rounds of several runs are in it, so lines are numbered one after another.
            ledger = Ledger.read(self.folder)
            number = ledger.lines[-1].round + 1 if ledger.lines else 1
            ledger.append(LedgerLine(number, event, norm, std, "local", (f"round {round}",)))

    def keep(self, person: Person, base: str | None, provenance: Mapping[str, object]) -> None:
        """Keep the global adapter and the personal one in one commit.

        A person for whom the global adapter does better keeps no personal one. Raises as `open`
        does, and `StoreError` when another process holds the state for long.
        """
        store = self.open(base)
        personal = None if person.kept_global else person.personal
        with waiting_lock(store):
            store.install_both(
                person.shared, personal, provenance=provenance, metrics=person.metrics()
            )


class WaitingRows(RunRows):
    """`RunRows` whose writing waits for another process."""

    def write(self, kind: str, segments: Sequence[Segment], round: int, row: Array) -> None:
        """See `RunRows`."""
        with waiting_lock(self.store):
            super().write(kind, segments, round, row)


@contextlib.contextmanager
def waiting_lock(store: Store, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the lock of a state; wait for another process that has it.

    Raises its `StoreError` after `seconds`.
    """
    end = time.monotonic() + seconds
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(store.lock())
                break
            except StoreError:
                if time.monotonic() >= end:
                    raise
                time.sleep(0.1)
        yield


def owners_state(node_config: Mapping[str, object]) -> DeviceState | None:
    """Return the state folder that the node config names; None if it names none.

    No environment variable does: a simulation's clients would all write to their user's own.
    """
    folder, bundle = node_config.get("state"), node_config.get("bundle")
    if not folder:
        return None
    return DeviceState(Path(str(folder)).absolute(), Path(str(bundle)) if bundle else None)
