"""One straggler among ten clients: a round by Flower's way of waiting, quick looks, and a quorum.

    python -m simulations.bench quorum [--scale 0.25] [--rounds 3] [--json FILE]

Clients are do-nothing trainers that reply after their seconds; nothing else is slow. The three
sides take turns round by round. All seconds but those between quick looks are multiplied by
`scale`, and the table shows them as measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlora.conditions import QuorumConfig
from fedlora.federation.quorum import QuorumGrid
from fedlora.simulation.grid import VirtualGrid

CLIENTS, STRAGGLER, OTHERS, FLOWERS_PAUSE = 10, 8.0, 0.5, 3.0


class Timed(VirtualGrid):
    """Replies that can be pulled so many seconds after their message was pushed."""

    def __init__(self, scale: float) -> None:
        super().__init__(CLIENTS)
        self._scale = scale
        self._due: dict[str, tuple[float, Message]] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages, and make their replies."""
        ids = []
        for message in map(self._number, messages):
            slow = self.number_of(message) == CLIENTS - 1
            due = time.monotonic() + self._scale * (STRAGGLER if slow else OTHERS)
            ids.append(message.metadata.message_id)
            self._due[ids[-1]] = due, Message(RecordDict(), reply_to=message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Yield the replies that are due."""
        for message_id in list(message_ids):
            if message_id in self._due and self._due[message_id][0] <= time.monotonic():
                yield self._due.pop(message_id)[1]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Wait for everyone, with as long a pause between two looks as Flower 1.41 makes."""
        waiting = set(self.push_messages(messages))
        while True:
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply
            if not waiting:
                return
            time.sleep(self._scale * FLOWERS_PAUSE)


def measure(scale: float, rounds: int) -> dict[str, dict[str, Any]]:
    """Return each side's seconds a round, CPU seconds a round, and replies a round."""
    quorum = QuorumConfig(share=0.8)
    sides: dict[str, Grid] = {
        "Flower's own waiting": Timed(scale),
        "quick looks": QuorumGrid(Timed(scale), None, CLIENTS),
        "quorum 0.8": QuorumGrid(Timed(scale), quorum, CLIENTS),
        "quorum 0.8 + 1 s": QuorumGrid(
            Timed(scale), QuorumConfig(share=0.8, grace=scale * 1.0), CLIENTS
        ),
    }
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, grid in sides.items():
            wall, cpu = time.monotonic(), time.process_time()
            messages = (Message(RecordDict(), node, "train") for node in grid.get_node_ids())
            count = sum(not reply.has_error() for reply in grid.send_and_receive(messages))
            found[name].append((time.monotonic() - wall, time.process_time() - cpu, count))
    return {
        name: {
            "seconds": round(statistics.median(row[0] for row in rows), 3),
            "spread": [round(min(row[0] for row in rows), 3), round(max(r[0] for r in rows), 3)],
            "cpu_seconds": round(statistics.median(row[1] for row in rows), 4),
            "replies": statistics.median(row[2] for row in rows),
        }
        for name, rows in found.items()
    }


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options.scale, options.rounds)
    print(
        f"| one of {CLIENTS} takes {STRAGGLER * options.scale:g} s | s a round | replies | CPU s |"
    )
    print("|---|---|---|---|")
    for name, row in found.items():
        low, high = row["spread"]
        shown = f"{row['seconds']:.2f} ({low:.2f}–{high:.2f})"
        print(f"| {name} | {shown} | {row['replies']:g} of {CLIENTS} | {row['cpu_seconds']:.3f} |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
