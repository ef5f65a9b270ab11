"""Starts a device's SuperNode, with the waits of Flower's message path shortened.

    python -m fedlora.federation.deploy.supernode <the flags of flower-supernode>

It is Flower's own SuperNode, with its flags, its log and its exit codes. As Flower starts it, a
message to a device waits at three places: up to 3 s until the SuperNode asks the server, up to 1 s
until the SuperExec beside it asks the SuperNode for work, and up to 0.5 s until the SuperNode looks
for the answer. And each message costs the start of a Python process, two seconds of a processor.
Here instead

- an idle SuperNode asks soon after its last message and then ever more rarely, down to once in 3 s
  (`Pace`), so that a device that waits for days asks no oftener than Flower's does;
- a message that is seen before all of it has arrived is asked for again after 0.05 s and not 1 s;
- it wakes the SuperExec through a pipe when a message has come, and looks for the answer 20 times a
  second while there is one to come;
- the SuperExec is ours (`fedlora.federation.deploy.superexec`): it forks the client's process from
  one that has its imports done. Still every message has a process of its own.

A Flower release that has moved the names which this needs gets a SuperNode as it is (with a
warning): it is slower, and nothing else differs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fedlora.federation import _flower_private as private

__all__ = ["WAKE_VARIABLE", "Pace", "SuperNodeWaits", "main", "supernode_command"]

WAKE_VARIABLE = "FEDLORA_SUPEREXEC_WAKE"  # number of the pipe's end that the SuperExec listens to
ANSWER_SECONDS = 0.05  # between two looks for the answer of a client process
SHORTEST_SECONDS = 0.2  # between two questions to the server, right after a message
SHARE = 0.1  # of the time since the last message that may pass before the next question

_log = logging.getLogger(__name__)


class Pace:
    """How long to wait before the next question: a share of the time in which nothing came.

    >>> clock = iter([0.0, 1.0, 10.0, 600.0]).__next__
    >>> pace = Pace(0.2, 3.0, clock)
    >>> pace.pause(), pace.pause(), pace.pause()
    (0.2, 1.0, 3.0)
    """

    def __init__(
        self, shortest: float, longest: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.shortest, self.longest, self._clock = shortest, longest, clock
        self._last = clock()

    def noticed(self) -> None:
        """Something came: the next pauses are short again."""
        self._last = self._clock()

    def pause(self) -> float:
        """Return the seconds to wait."""
        waited = SHARE * (self._clock() - self._last)
        return min(self.longest, max(self.shortest, waited))


class SuperNodeWaits:
    """What Flower's SuperNode sleeps with: see `_flower_private.with_sleep`.

    Its sleep of 3 s is the idle one. The sleeps of 0.5 s are of a SuperNode whose client is at
    work: so the first of them says that there is work to fetch, and `wake` is called.
    """

    def __init__(
        self,
        wake: Callable[[], None],
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wake, self._sleep = wake, sleep
        self._pace = Pace(SHORTEST_SECONDS, private.IDLE_SECONDS, clock)
        self._at_work = False

    def __call__(self, seconds: float) -> None:
        """Sleep in place of `time.sleep`, never longer than it would."""
        if seconds >= private.IDLE_SECONDS:
            self._at_work = False
            self._sleep(min(seconds, self._pace.pause()))
            return
        if not self._at_work:
            self._wake()
        self._at_work = True
        self._pace.noticed()
        self._sleep(min(seconds, ANSWER_SECONDS))


def supernode_command(python: Path | None = None) -> list[str]:
    """Return what stands in the place of ``flower-supernode`` in a command; its flags follow.

    python: of another environment, which has to have fedlora too (None: the one that runs this).
    The working directory is not searched (-P): a clone there would hide what is installed.
    """
    return [str(python or sys.executable), "-P", "-m", "fedlora.federation.deploy.supernode"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a SuperNode with Flower's own flags (None: of the command line) until it is stopped."""
    if arguments is not None:
        sys.argv = ["flower-supernode", *arguments]
    safe = ["-P"] if sys.flags.safe_path else []  # as this process: without the working directory
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def wake() -> None:
        # Full: it has enough to wake up for. Closed: it has ended, and Flower's log says so.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(writer, b"!")

    try:
        private.with_sleep_in_supernode(SuperNodeWaits(wake))
        private.with_quick_objects_in_supernode()
        private.with_superexec(
            [sys.executable, *safe, "-m", "fedlora.federation.deploy.superexec"],
            {WAKE_VARIABLE: str(reader)},
            (reader,),
        )
    except (ImportError, AttributeError) as error:
        _log.warning("this Flower's SuperNode is started as it is, and waits longer: %s", error)
    private.run_supernode()


if __name__ == "__main__":
    main()
