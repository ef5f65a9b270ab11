"""Kill a process that commits, at instants uniform over the time that a commit takes.

    python -m tests.store.kills STATE HITS

Each trial forks a child that commits once, and sends it SIGKILL after a delay that is drawn from
[0, window), the window being the commits' own measured time, from its first write until it returns.
A trial counts as a hit when the child was inside a commit as it died. Where too few of HITS found
the new adapter, since commits took longer than when they were measured, later kills follow until a
thirtieth of HITS is on either side of the commit point. After each one a store is
opened anew and must serve what was there before the commit, or what was committed. Prints one JSON
object. It runs in a process of its own, for it forks.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

import fedlora as fl
from fedlora.store import Store
from tests.store.states import adapter

COUNT = 6  # adapters that are committed in turn
BEGUN, DONE = 1, 2  # where the child is; 0: not yet in the commit


def main(path: Path, hits: int) -> dict[str, object]:
    """Return how many kills hit a commit, where in it, and what was found."""
    adapters = [adapter(seed) for seed in range(COUNT)]
    places = {found.fingerprint(): number for number, found in enumerate(adapters)}
    draw = random.Random(0)
    store = Store.open(path)
    store.install_global(adapters[0])
    store.commit_personal(adapters[1], {"trial": -1})
    shared = mmap.mmap(-1, 64)
    window = _window(path, adapters, shared)
    kept = {"old": 0, "new": 0}
    deciles = [0] * 10
    trials = inside = 0
    while (inside < hits or min(kept.values()) < hits // 30) and trials < 20 * hits:
        longest = window if inside < hits else 3 * window
        trials += 1
        before = _served(path, places)
        which = draw.randrange(2)
        choice = draw.choice([n for n in range(COUNT) if n != before[which]])
        after = (choice, before[1]) if which == 0 else (before[0], choice)
        delay = draw.uniform(0, longest)
        state = _kill(path, which, adapters[choice], trials, shared, delay)
        found = _served(path, places)
        if found not in (before, after):
            raise AssertionError(f"trial {trials}: expected {before} or {after}, found {found}")
        if state == DONE and found != after:
            raise AssertionError(f"trial {trials}: a commit that had returned is gone")
        if state == BEGUN:
            inside += 1
            kept["new" if found == after else "old"] += 1
            deciles[min(9, int(10 * delay / window))] += 1
    return {
        "trials": trials, "hits": inside, **kept, "deciles": deciles,
        "window_ms": round(1000 * window, 3),
    }  # fmt: skip


def _served(path: Path, places: dict[str, int]) -> tuple[int, int]:
    store = Store.open(path)
    both = (store.global_adapter(), store.personal_adapter())
    first, second = (places[found.fingerprint()] for found in both if found is not None)
    return first, second


def _commit(path: Path, which: int, new: fl.Adapter, trial: int, shared: mmap.mmap) -> None:
    """Run in the child: one commit, and what it is at."""
    store = Store.open(path)
    with store.lock():
        start = time.perf_counter()
        struct.pack_into("d", shared, 8, start)
        shared[0] = BEGUN
        if which == 0:
            store.install_global(new, {"trial": trial})
        else:
            store.commit_personal(new, {"trial": trial})
        shared[0] = DONE
        struct.pack_into("d", shared, 16, time.perf_counter() - start)


def _window(path: Path, adapters: list[fl.Adapter], shared: mmap.mmap) -> float:
    """Return the median time of 31 commits in children, in seconds."""
    times = []
    for trial in range(31):
        shared[0] = 0
        child = os.fork()
        if child == 0:
            _commit(path, trial % 2, adapters[trial % COUNT], trial, shared)
            os._exit(0)
        os.waitpid(child, 0)
        times.append(struct.unpack_from("d", shared, 16)[0])
    return sorted(times)[len(times) // 2]


def _kill(
    path: Path, which: int, new: fl.Adapter, trial: int, shared: mmap.mmap, delay: float
) -> int:
    """Commit in a child, kill it `delay` seconds after the commit began; where it then was."""
    shared[0] = 0
    child = os.fork()
    if child == 0:
        _commit(path, which, new, trial, shared)
        time.sleep(60)  # killed here when it was quicker than the kill
        os._exit(0)
    while shared[0] == 0:
        pass
    end = struct.unpack_from("d", shared, 8)[0] + delay
    while time.perf_counter() < end:
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return shared[0]


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
