"""Where a round's time goes, and the line that says so.

prepare    draw the cohort, make the messages
send       hand them to the grid
wait       for replies; in a simulation the clients' training
aggregate  read and check the replies, aggregate
keys, shares, agree, unmask
           the phases of a secure sum before and after "wait", where there is one
save       write the checkpoint of the round before: a round's line is on the disk before its
           own checkpoint is, and this is what the round's start had to wait for
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import TypeVar

from fedlora.federation.checkpoint import RoundRecord
from fedlora.privacy.accounting import rounded_up

__all__ = ["PHASES", "PhaseClock", "round_words", "slowest_and_median"]

T = TypeVar("T")

PHASES = ("prepare", "send", "wait", "aggregate", "save")


class PhaseClock:
    """The seconds of a round by phase. It starts with the round, in "prepare"."""

    def __init__(self, save: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._mark = clock()
        self._phase = "prepare"
        self._seconds = dict.fromkeys(PHASES, 0.0) | {"save": save}

    def enter(self, phase: str) -> str:
        """End the phase that is under way and begin another; return the one that ended."""
        now = self._clock()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._mark
        self._mark, before, self._phase = now, self._phase, phase
        return before

    def within(self, phase: str, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`; the time to get each is the phase's, whatever phase asks for it.

        So messages that a grid reads one by one count as prepared, also in the middle of a wait.
        """
        source = iter(items)
        while True:
            before = self.enter(phase)
            try:
                item = next(source)
            except StopIteration:
                return
            finally:
                self.enter(before)
            yield item

    def seconds(self) -> dict[str, float]:
        """Return the seconds so far, by phase."""
        self.enter(self._phase)
        return {phase: round(seconds, 6) for phase, seconds in self._seconds.items()}


def slowest_and_median(seconds: list[float]) -> dict[str, float]:
    """Return what a round's record says of the clients' own times; nothing where none tells."""
    return {"slowest": max(seconds), "median": median(seconds)} if seconds else {}


def round_words(record: RoundRecord) -> str:
    """Return a round in one line: ``loss 0.4100 3.2 s (wait 2.6, clients 0.9)``.

    With privacy no client tells its loss or its time, and the line opens with the epsilon so far.
    wait: seconds for the replies. clients: the median of the clients' own seconds, where they tell.
    """
    words = [] if record.epsilon is None else [f"epsilon {rounded_up(record.epsilon, 2):.2f}"]
    words += [] if record.loss is None else [f"loss {record.loss:.4f}"]
    inside = [f"wait {record.phases['wait']:.1f}"] if "wait" in record.phases else []
    if "median" in record.clients:
        inside.append(f"clients {record.clients['median']:.1f}")
    took = f"{record.seconds:.1f} s"
    words.append(f"{took} ({', '.join(inside)})" if inside else took)
    if record.dropped:
        words.append(f"{len(record.dropped)} dropped")
    if record.late:
        words.append(f"{record.late} late")
    return " ".join(words)
