"""Several virtual clients at a time: one torch thread each, as many clients as there are cores.

The products of a small model are too small to share among threads: two clients side by side are
faster than one client on two threads. And a client's result then does not depend on the number of
cores, so that a run can be resumed elsewhere, bit for bit.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

from fedlora.experiment import ExperimentConfig

__all__ = ["in_order", "one_torch_thread", "worker_count"]

T = TypeVar("T")
S = TypeVar("S")


def worker_count(config: ExperimentConfig) -> int:
    """Return how many clients may train at once.

    One with dropout, which torch draws from a single generator for the whole process.
    """
    return 1 if config.lora.lora_dropout else _usable_cores()


def in_order(work: Callable[[S], T], items: Iterable[S], workers: int) -> Iterator[T]:
    """Yield ``work(item)`` in the order of `items`, computed by `workers` threads.

    `items` are read, and results held, only a few ahead of the caller.
    """
    if workers == 1:
        yield from map(work, items)
        return
    source = iter(items)
    pool = _pool(workers)
    ahead = [pool.submit(work, item) for item in islice(source, 2 * workers)]
    try:
        while ahead:
            yield ahead.pop(0).result()
            ahead += [pool.submit(work, item) for item in islice(source, 1)]
    finally:
        for future in ahead:
            future.cancel()
        wait(ahead)


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Return threads that stay: each keeps its copy of the model from round to round."""
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))


def _usable_cores() -> int:
    """Return the cores that this process may run on: a container or taskset may allow only some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch use one thread for each operation of this thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
