"""Ray workers for the cohort engine: groups of virtual clients train in other processes.

Each worker is a process, here or on another machine of a Ray cluster, that opens the base and the
data once and then carries out one group after another (`fedlora.simulation.groups`). What travels
is the group's order and its rows of factors, so that results are those of a single process. A
worker that dies is replaced, and its group runs again.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Literal

from fedlora.errors import FederationError, MissingExtraError, RunError
from fedlora.simulation.groups import GroupOrder, Outcome, train_order

__all__ = ["RayWorkers", "ray_workers"]

MAX_DEATHS = 3  # of workers on one group, before the group is given up

_log = logging.getLogger(__name__)


class RayWorkers:
    """`count` workers; ``workers(order)`` trains a group on one of them, and waits for it.

    Call it from several threads to keep several workers busy.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free: SimpleQueue[Any] = SimpleQueue()
        for _ in range(count):
            self._free.put(_start())

    def __call__(self, order: GroupOrder) -> list[Outcome]:
        """Return the outcomes of a group. Raises what its training raises.

        Raises `FederationError` when `MAX_DEATHS` workers have died on it.
        """
        import ray

        worker = self._free.get()
        try:
            for death in range(1, MAX_DEATHS + 1):
                try:
                    outcomes: list[Outcome] = ray.get(worker.train.remote(order))
                    return outcomes
                except ray.exceptions.RayActorError as error:
                    _log.warning(
                        "a worker died while it trained %d clients (%d of %d): %s",
                        len(order.clients),
                        death,
                        MAX_DEATHS,
                        str(error).strip().splitlines()[0],
                    )
                    worker = _start()
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
            raise FederationError(
                f"round {order.order.round}: {MAX_DEATHS} workers died one after another on a "
                f"group of {len(order.clients)} clients; is there enough memory for each worker?"
            )
        finally:
            self._free.put(worker)

    def pids(self) -> list[int]:
        """Return the process ids of the workers that are free now."""
        import ray

        workers = [self._free.get() for _ in range(self._free.qsize())]
        for worker in workers:
            self._free.put(worker)
        return [int(ray.get(worker.pid.remote())) for worker in workers]


@contextmanager
def ray_workers(workers: int | Literal["cluster"]) -> Iterator[RayWorkers]:
    """Start Ray with `workers` local workers, or use all processors of the cluster that is there.

    The cluster is the one that ``ray start`` made, or the one named by RAY_ADDRESS; its machines
    have fedlora and the base installed. Ray is stopped, or left again, at the end.

    Raises `MissingExtraError` without Ray, and `RunError` when there is no cluster.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtraError("engine.workers", "ray") from None
    # Nothing is reported to anybody. Workers find what this process can import.
    paths = os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        "runtime_env": {"env_vars": environment},
    }
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if workers == "cluster":
            ray.init(address="auto", **options)
            count = int(ray.cluster_resources().get("CPU", 0))  # type: ignore[no-untyped-call]
        else:
            count = workers
            ray.init(address="local", num_cpus=count, include_dashboard=False, **options)
    except ConnectionError as error:
        raise RunError(
            "engine.workers = 'cluster': no Ray cluster found; start one with 'ray start --head', "
            f"or set engine.workers to a number ({str(error).splitlines()[0]})"
        ) from None
    try:
        yield RayWorkers(max(count, 1))
    finally:
        ray.shutdown()


class _Worker:
    """What runs in a worker's process."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)

    def train(self, order: GroupOrder) -> list[Outcome]:
        return train_order(order)

    def pid(self) -> int:
        return os.getpid()


def _start() -> Any:
    import ray

    return ray.remote(num_cpus=1, max_restarts=0)(_Worker).remote()
