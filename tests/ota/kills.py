"""Kill a device that updates, at instants uniform over its update, from first request to commit.

    python -m tests.ota.kills FOLDER HITS

A real server runs in a process of its own, and FOLDER holds a repository and a device's state that
stays the same one over all trials. Each trial publishes another release, forks a child that fetches
and commits it, and sends that SIGKILL after a delay drawn from [0, window), the window being the
updates' own time, measured before and in between. A trial is a hit when the child was inside its
update as it died. After each one the state is opened anew: it must serve the release of before or
the new one, whole, never an older one; then the update is done once more, and must arrive.
Prints one JSON object.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import fedlora as fl
from fedlora.ota import DeviceUpdater, Keys, Publisher
from fedlora.store import Store
from tests.ota.world import big_adapter, big_bundle

COUNT = 3  # adapters that are released in turn: active and previous are never the next one
BEGUN, DONE = 1, 2  # where the child is; 0: not yet in the update
MEGABYTES = 0.25


def main(folder: Path, hits: int) -> dict[str, object]:
    """Return how many kills hit an update, where in it, and what was found."""
    publisher = Publisher.create(
        folder / "repository", Keys(folder / "keys"), thresholds={"root": (1, 1)}
    )
    store = Store.create(folder / "state", big_bundle(folder / "bundle"))
    for number in range(COUNT):
        fl.save_adapter(big_adapter(number, MEGABYTES), folder / f"{number}.safetensors")
        publisher.publish(folder / f"{number}.safetensors")
    first = [big_adapter(number, MEGABYTES).fingerprint() for number in range(COUNT)]
    root = (publisher.path / "metadata" / "1.root.json").read_bytes()
    command = "from fedlora.ota.serve import server; import sys; s = server(sys.argv[1], port=0); "
    command += "print(s.server_address[1], flush=True); s.serve_forever()"
    web = subprocess.Popen(
        [sys.executable, "-c", command, str(publisher.path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert web.stdout is not None
        url = f"http://127.0.0.1:{int(web.stdout.readline())}"
        return _trials(publisher, store, url, root, first, hits)
    finally:
        web.terminate()
        web.wait()


def _trials(
    publisher: Publisher, store: Store, url: str, root: bytes, first: list[str], hits: int
) -> dict[str, object]:
    draw = random.Random(0)
    shared = mmap.mmap(-1, 64)
    _update(store.path, url, root)
    times = _window(publisher, store, url, root, shared, 7 if hits > 10 else 3)
    kept = {"old": 0, "new": 0}
    deciles = [0] * 10
    trials = inside = 0
    most_files = 0
    window = 0.0
    while (inside < hits or min(kept.values()) < hits // 30) and trials < 20 * hits:
        if trials % 10 == 9:  # the machine's load changes meanwhile
            times = [*times, *_window(publisher, store, url, root, shared, 1)][-9:]
        window = sorted(times)[len(times) // 2]
        longest = window if inside < hits else 2 * window
        trials += 1
        before = _served(store.path, first)
        new = publisher.republish(before - COUNT + 1).version
        delay = draw.uniform(0, longest)
        state = _kill(store.path, url, root, shared, delay)
        found = _served(store.path, first)
        if found not in (before, new):
            raise AssertionError(f"trial {trials}: expected {before} or {new}, found {found}")
        if state == DONE and found != new:
            raise AssertionError(f"trial {trials}: a commit that had returned is gone")
        if state == BEGUN:
            inside += 1
            kept["new" if found == new else "old"] += 1
            deciles[min(9, int(10 * delay / window))] += 1
        if trials % 50 == 0:
            print(f"{trials} trials, {inside} hits, {kept}", file=sys.stderr, flush=True)
        most_files = max(most_files, len(_files(store.path)))
        _update(store.path, url, root)
        if _served(store.path, first) != new:
            raise AssertionError(f"trial {trials}: the device did not update after the kill")
    return {
        "trials": trials, "hits": inside, **kept, "deciles": deciles,
        "window_ms": round(1000 * window, 1), "most_files_after_a_kill": most_files,
        "files_at_the_end": len(_files(store.path)),
    }  # fmt: skip


def _update(path: Path, url: str, root: bytes) -> None:
    updater = DeviceUpdater(url, path, bootstrap=root)
    release = updater.fetch()
    if release is not None:
        updater.commit(release)


def _served(path: Path, first: list[str]) -> int:
    """Return the release that is served, whose bytes must be its own."""
    store = Store.open(path)
    active, adapter = store.status().installed, store.serving()
    assert active is not None
    assert active.release is not None
    assert adapter is not None
    if adapter.fingerprint() != first[(active.release - 1) % COUNT]:
        raise AssertionError(f"release {active.release} is served with another's factors")
    return active.release


def _files(path: Path) -> list[Path]:
    return [found for found in path.rglob("*") if found.is_file()]


def _child(path: Path, url: str, root: bytes, shared: mmap.mmap) -> None:
    start = time.perf_counter()
    struct.pack_into("d", shared, 8, start)
    shared[0] = BEGUN
    _update(path, url, root)
    shared[0] = DONE
    struct.pack_into("d", shared, 16, time.perf_counter() - start)


def _window(
    publisher: Publisher, store: Store, url: str, root: bytes, shared: mmap.mmap, count: int
) -> list[float]:
    """Return the times of some updates in children, in seconds."""
    times = []
    for _ in range(count):
        active = store.status().installed
        assert active is not None
        assert active.release is not None
        publisher.republish(active.release - COUNT + 1)
        shared[0] = 0
        child = os.fork()
        if child == 0:
            _child(store.path, url, root, shared)
            os._exit(0)
        os.waitpid(child, 0)
        times.append(struct.unpack_from("d", shared, 16)[0])
    return times


def _kill(path: Path, url: str, root: bytes, shared: mmap.mmap, delay: float) -> int:
    """Update in a child, kill it `delay` seconds after it began; where it then was."""
    shared[0] = 0
    child = os.fork()
    if child == 0:
        _child(path, url, root, shared)
        time.sleep(60)  # killed here when it was quicker than the kill
        os._exit(0)
    while shared[0] == 0:
        time.sleep(0.0002)
    end = struct.unpack_from("d", shared, 8)[0] + delay
    while (left := end - time.perf_counter()) > 0:
        time.sleep(min(left, 0.001))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return shared[0]


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
