"""The ClientApp of `simulations.bench.federation`: fedlora's own, with a clock around each part.

Each message's process adds one line to the file that FEDLORA_BENCH_TIMES names, as it ends: the
wall clock and the CPU time of the process at each mark. The app is the unchanged one.
"""

import time

entered = time.time(), time.process_time()

import atexit  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from flwr.app import Context, Message  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402

import clients.app  # noqa: E402

imported = time.time(), time.process_time()


def process_start() -> float:
    """Return when this process began (or was forked), seconds since 1970; Linux only."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + since_boot


class TimedApp(ClientApp):
    """Calls fedlora's app between two marks."""

    marks: dict[str, Any]

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one message."""
        self.marks = {
            "round": message.metadata.group_id,
            "kind": message.metadata.message_type,
            "node": context.node_config.get("partition-id"),
            "sent": (message.metadata.created_at, 0.0),
            "start": (process_start(), 0.0),
            "entered": entered,
            "imported": imported,
            "called": now(),
        }
        atexit.register(self.write)
        self.watch()
        reply = clients.app.app(message, context)
        self.marks["answered"] = now()
        return reply

    def watch(self) -> None:
        """Mark when the trainer is open, which includes the imports that only it needs."""
        from clients import onnx_app

        plain = onnx_app.open_trainer

        def open_trainer(*arguments: Any) -> Any:
            trainer = plain(*arguments)
            self.marks["opened"] = now()
            return trainer

        onnx_app.open_trainer = open_trainer

    def write(self) -> None:
        """Add the line, at the very end of the process."""
        self.marks["ended"] = now()
        with open(os.environ["FEDLORA_BENCH_TIMES"], "a", encoding="utf-8") as file:
            file.write(json.dumps(self.marks) + "\n")


def now() -> tuple[float, float]:
    """Return the wall clock and this process's CPU time, in seconds."""
    return time.time(), time.process_time()


app = TimedApp()
