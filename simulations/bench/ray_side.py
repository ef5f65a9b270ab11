"""The other end of `ray_app`: start it, ask it for rounds, stop it, each with a time limit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]

from simulations.bench.cases import Case
from simulations.bench.flat import Flat
from simulations.bench.ray_app import MARK
from simulations.bench.spent import Spent, family, tree_seconds

__all__ = ["RayRounds", "ray_rounds"]

FIRST_SECONDS = 300.0  # for the start and the first round, on a busy machine
ROUND_SECONDS = 600.0
STOP_SECONDS = 30.0  # for Flower to stop Ray by itself

_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray's own is 15: beside anything else that runs, its actors would get next to no time.
    "RAY_worker_niceness": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}


class RayRounds:
    """A Flower simulation that waits for the next round."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log
        self._lines: Queue[str] = Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def round(self, limit: float = ROUND_SECONDS) -> tuple[Spent, Flat | None]:
        """Run a round; return its time, CPU over all of Ray's processes, and the first's mean.

        Raises `RuntimeError` with the end of the log when it fails or takes longer than `limit`.
        """
        before = family(self._process.pid)
        cpu = tree_seconds(before)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: the answer that does not come says so
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        answer = self._answer(limit)
        # A process that began in this round had no time before it.
        cpu = tree_seconds(family(self._process.pid)) - cpu
        mean = answer["mean"]
        return Spent(answer["wall"], cpu), None if mean is None else np.array(mean, np.float32)

    def idle_cores(self, seconds: float = 1.0) -> float:
        """Return how many cores it uses while it waits, and so takes from the other sides."""
        before = tree_seconds(family(self._process.pid))
        threading.Event().wait(seconds)
        return (tree_seconds(family(self._process.pid)) - before) / seconds

    def _answer(self, limit: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=limit)
        except Empty:
            raise RuntimeError(f"Flower's simulation: no round within {limit:g} s") from None
        if not line:
            text = self._log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"Flower's simulation ended; its log: {text}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                self._lines.put(line.removeprefix(MARK))
        self._lines.put("")  # the end


@contextmanager
def ray_rounds(case: Case) -> Iterator[RayRounds]:
    """Start a simulation of `case`; it and all of its processes are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="flb"))  # short: sockets' paths may have 107 characters
    log = folder / "log"
    command = [
        sys.executable, "-m", "simulations.bench.ray_app", case.name, str(case.clients),
        str(folder / "ray"),
    ]  # fmt: skip
    environment = {**os.environ, **_QUIET, **case.shape.environment()}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    with open(log, "w") as stream:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=stream, text=True,
        )  # fmt: skip
    try:
        yield RayRounds(process, log)
    finally:
        _stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def _stop(process: subprocess.Popen[str]) -> None:
    """Let Flower end by itself: no more rounds. What is left after a while is killed, by its id."""
    below: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        below = family(process.pid)
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    _, left = psutil.wait_procs(below, timeout=2.0)
    for found in left:
        with suppress(psutil.NoSuchProcess):
            found.send_signal(signal.SIGKILL)
    process.wait()
