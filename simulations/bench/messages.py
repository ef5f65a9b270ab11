"""What a client costs a federation in one process, its training left out: CPU time and memory.

    python -m simulations.bench messages [--clients 1000 10000 100000] [--json FILE]

One round in which everyone takes part, through Flower's own ServerApp loop, `FederatedLora` and
messages. The clients are a grid that answers with prepared rows by the functions that an engine of
a simulation uses. The adapter has 4 layers of 64 x 64 at rank 8: 16 kB. Each size runs in a process
of its own. CPU time is that of the whole process, in ms per client, by part:

    query   message, reply, server: making the question, answering it, and reading the answer
    train   message, reply, server: the same for training; the server checks and adds up
    rest    the draw, the checkpoint before and after the round, and Flower's loop

`extra_mb` is the peak of the resident memory less what the process had before the run, `read` the
time to read the checkpoint back, and `flower` what Flower's own objects of one client take when
they are made with nothing around them, also in ms.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedlora.adapter import Adapter
from fedlora.experiment import ExperimentConfig
from fedlora.federation import read_checkpoint, run_federation
from fedlora.federation._flower_private import empty_run, identify_process, set_message_id
from fedlora.federation.tasks import answer_query, answer_task, read_query, read_task
from fedlora.targets import LayerSpec, initial_adapter
from simulations.bench.resident import peak_bytes

__all__ = ["PreparedGrid", "experiment", "main", "measure", "start_adapter"]

FIRST_NODE = 1000
SPECS = {f"block.{i}.fc": LayerSpec("linear", (64,), 64) for i in range(4)}
COLUMNS = (
    "clients", "ms", "query message", "query reply", "query server", "train message",
    "train reply", "train server", "rest", "flower", "read", "extra_mb", "seconds",
)  # fmt: skip


def experiment(clients: int, **federation: Any) -> ExperimentConfig:
    """Return one round with all of `clients`."""
    return ExperimentConfig.from_table(
        {
            "name": "messages",
            "base": {"id": "none"},
            "data": {"id": "none", "task": "classification"},
            "lora": {"rank": 8, "lora_alpha": 16, "target_modules": ["fc"]},
            "federation": {"rounds": 1, "cohort": clients, "local_steps": 1} | federation,
        }
    )


def start_adapter(config: ExperimentConfig) -> Adapter:
    """Return the adapter to begin with, 4096 numbers."""
    return initial_adapter(SPECS, config.lora, config.seed, "ba5e" * 16)


class PreparedGrid(Grid):
    """Clients whose training is done already: client i answers with row ``i % len(rows)``.

    rows: ``(n, numbers)`` float32. times: the CPU seconds of each part.
    """

    def __init__(self, clients: int, rows: np.ndarray) -> None:
        self.clients, self.rows = clients, rows
        self.times: dict[str, float] = {}
        identify_process()

    @property
    def run(self) -> Any:
        """An empty run."""
        return empty_run()

    def set_run(self, run: Any) -> None:
        """Do nothing."""

    def get_node_ids(self) -> Iterable[int]:
        """Return a node a client."""
        return range(FIRST_NODE, FIRST_NODE + self.clients)

    def create_message(self, *args: Any, **options: Any) -> Message:
        """Messages are made by their senders."""
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Only `send_and_receive` is used."""
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Only `send_and_receive` is used."""
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Answer each message when its reply is read."""
        clock, numbers, source = time.thread_time, itertools.count(1), iter(messages)
        while True:
            began = clock()
            message = next(source, None)
            if message is None:
                return
            made = clock()
            kind = message.metadata.message_type
            set_message_id(message, str(next(numbers)))
            answer = self.answer_query if kind == "query" else self.answer_train
            reply = Message(answer(message), reply_to=message)
            set_message_id(reply, str(next(numbers)))
            answered = clock()
            yield reply
            for part, seconds in (
                ("message", made - began),
                ("reply", answered - made),
                ("server", clock() - answered),
            ):
                name = f"{kind} {part}"
                self.times[name] = self.times.get(name, 0.0) + seconds

    def answer_query(self, message: Message) -> RecordDict:
        """Say who the client is: ``c17``, which has 10 to 59 examples."""
        number = message.metadata.dst_node_id - FIRST_NODE
        return answer_query(read_query(message.content), f"c{number}", None, 10 + number % 50)

    def answer_train(self, message: Message) -> RecordDict:
        """Answer with the client's row."""
        number = message.metadata.dst_node_id - FIRST_NODE
        row = self.rows[number % len(self.rows)]
        task = read_task(message.content)
        return answer_task(
            task, row, client_id=f"c{number}", num_examples=10 + number % 50, loss=1.0, steps=1
        )


def measure(clients: int) -> dict[str, float]:
    """Run one round with `clients` in this process, and return the figures of the docstring."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    config = experiment(clients)
    start = start_adapter(config)
    rows = np.random.default_rng(0).normal(size=(64, start.num_parameters)).astype(np.float32)
    grid = PreparedGrid(clients, rows)
    with tempfile.TemporaryDirectory() as folder:
        memory = _resident_bytes()
        began, wall = time.process_time(), time.monotonic()
        run_federation(grid, config, Path(folder), initial=start)
        total, seconds = time.process_time() - began, time.monotonic() - wall
        extra = peak_bytes() - memory
        began = time.process_time()
        read_checkpoint(Path(folder))
        read = time.process_time() - began
    parts = grid.times | {"rest": total - sum(grid.times.values()), "read": read, "ms": total}
    return {
        "clients": clients,
        **{name: 1e3 * value / clients for name, value in parts.items()},
        "flower": 1e3 * _flower_seconds(rows[0]),
        "extra_mb": extra / 1e6,
        "seconds": seconds,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure each size in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--here", action="store_true", help="in this process; print JSON only")
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps([measure(clients) for clients in options.clients]))
        return
    figures = []
    print(" | ".join(COLUMNS), flush=True)
    for clients in options.clients:
        command = [sys.executable, "-m", __spec__.name, "--here", "--clients", str(clients)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures += json.loads(done.stdout)
        print(" | ".join(_shown(figures[-1][column]) for column in COLUMNS), flush=True)
    if options.json:
        machine = {"python": platform.python_version(), "machine": platform.machine()}
        options.json.write_text(json.dumps({"machine": machine, "figures": figures}, indent=1))


def _flower_seconds(row: np.ndarray) -> float:
    """Return the CPU seconds of the Flower objects that one client's four messages are made of."""
    data, setup = bytes(row.data), ConfigRecord({str(number): 1 for number in range(30)})

    def objects() -> None:
        query = Message(RecordDict({"setup": setup.copy()}), 1, "query", group_id="0")
        answer = ConfigRecord({"client_id": "c1", "num_examples": 9})
        Message(RecordDict({"client": answer}), reply_to=query)
        factors = ArrayRecord()
        factors["factors"] = Array("float32", row.shape, "numpy.ndarray", data)
        down: dict[str, Any] = {"setup": setup.copy(), "train": setup.copy()}
        down |= {"factors": factors.copy(), "layout": setup.copy()}
        train = Message(RecordDict(down), 1, "train", group_id="1")
        layout = setup.copy()
        layout["digest"] = "0" * 64
        metrics = MetricRecord({"loss": 1.0, "steps": 1, "num-examples": 9})
        up: dict[str, Any] = {"factors": factors, "layout": layout, "metrics": metrics}
        Message(RecordDict(up), reply_to=train)

    return _median_seconds(objects)


def _median_seconds(work: Callable[[], None], runs: int = 9, number: int = 300) -> float:
    times = []
    for _ in range(runs):
        began = time.thread_time()
        for _ in range(number):
            work()
        times.append((time.thread_time() - began) / number)
    return sorted(times)[runs // 2]


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _shown(value: float) -> str:
    return (
        str(value) if isinstance(value, int) else f"{value:.3f}" if value < 10 else f"{value:.1f}"
    )


if __name__ == "__main__":
    main()
