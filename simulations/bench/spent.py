"""Wall and CPU time of this process and of the processes below another, and who else was busy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

__all__ = ["Spent", "family", "machine_seconds", "spent", "tree_seconds"]


@dataclass(slots=True)
class Spent:
    """Seconds that something took; filled in at the end of a ``with spent()`` block."""

    wall: float = 0.0
    cpu: float = 0.0  # user and system, all threads and processes that take part


@contextmanager
def spent() -> Iterator[Spent]:
    """Measure a block that starts no processes: CPU time is this process's, all threads."""
    result = Spent()
    wall, cpu = time.perf_counter(), time.process_time()
    yield result
    result.wall, result.cpu = time.perf_counter() - wall, time.process_time() - cpu


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all below it."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def tree_seconds(processes: list[psutil.Process]) -> float:
    """Return user and system time of some processes so far, in steps of 10 ms each."""
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def machine_seconds() -> float:
    """Return the CPU time of everything on this machine since its start."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Linux counts a guest's time in user and nice too.
    guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return float(sum(times) - idle - guest)
