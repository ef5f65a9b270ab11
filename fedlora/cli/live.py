"""A run on a terminal while it goes: its last rounds as a table, and a bar for each stage."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fedlora.federation.callbacks import RunCallback
from fedlora.privacy.accounting import rounded_up
from fedlora.report.words import amount

if TYPE_CHECKING:
    from fedlora.experiment import ExperimentConfig
    from fedlora.federation import RoundRecord

__all__ = ["LiveTable"]

SHOWN = 8  # rounds


class LiveTable(RunCallback):
    """A callback and a progress function in one; a context manager while it is on the screen."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._name, self._total = "", 0
        self._bytes = [0, 0]
        self._rounds: deque[RoundRecord] = deque(maxlen=SHOWN)
        self._bars = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[words]}"),
            console=self.console,
        )
        self._tasks: dict[str, Any] = {}
        self._live = Live(get_renderable=self.picture, console=self.console, refresh_per_second=4)

    def __enter__(self) -> LiveTable:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def on_start(self, folder: Path, config: ExperimentConfig, rounds_done: int) -> None:
        """Put a name above the table."""
        self._name = f"{config.name}, {config.federation.method}, in {folder}"
        self._total = config.federation.rounds

    def on_round(self, record: RoundRecord) -> None:
        """Add a line."""
        self._rounds.append(record)
        self._bytes[0] += record.bytes_up
        self._bytes[1] += record.bytes_down

    def progress(self, stage: str, done: int, total: int, words: str) -> None:
        """Move a stage's bar. words: of a round, those that its line has; of others, who."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, completed=done, words="")
        shown = "" if stage == "rounds" else escape(words)
        self._bars.update(self._tasks[stage], completed=done, total=total, words=shown)

    def picture(self) -> RenderableType:
        """Return what the screen shows now."""
        return Group(self._table(), self._bars) if self._rounds else self._bars

    def _table(self) -> Table:
        private = any(_epsilon(record) is not None for record in self._rounds)
        up, down = map(amount, self._bytes)
        table = Table(
            title=escape(self._name), title_justify="left", box=box.SIMPLE_HEAD,
            caption=f"in all: {up} up, {down} down",
            caption_justify="left",
        )  # fmt: skip
        epsilon = ["epsilon"] if private else []
        for head in ("round", "loss", *epsilon, "clients", "up", "down", "time"):
            table.add_column(head, justify="right")
        table.add_column("")
        for record in self._rounds:
            table.add_row(*_cells(record, self._total, private))
        return table


def _cells(record: RoundRecord, total: int, private: bool) -> list[str]:
    epsilon = _epsilon(record)
    counted = len(record.cohort) - len(record.dropped)
    lost = len(record.dropped) - len(record.declined)
    told = ((lost, "dropped"), (len(record.declined), "declined"), (record.late, "late"))
    words = [f"{number} {what}" for number, what in told if number]
    if record.status != "updated":
        words.insert(0, record.status)
    return [
        f"{record.round}/{total}",
        "" if record.loss is None else f"{record.loss:.4f}",
        *([("" if epsilon is None else f"{rounded_up(epsilon, 2):.2f}")] if private else []),
        f"{counted}/{len(record.cohort)}",
        amount(record.bytes_up),
        amount(record.bytes_down),
        f"{record.seconds:.1f} s",
        ", ".join(words),
    ]


def _epsilon(record: RoundRecord) -> float | None:
    """Return what a private run has spent until then."""
    found: float | None = getattr(record, "epsilon", None)
    return found
