"""A run on a terminal while it goes: its last rounds as a table, and a bar for each stage."""

from __future__ import annotations

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
from fedlora.report.words import amount

if TYPE_CHECKING:
    from fedlora.experiment import ExperimentConfig
    from fedlora.federation import RoundRecord

__all__ = ["LiveTable"]

SHOWN = 8  # rounds
WIDE = 72  # columns of a terminal, from which there is room for bars, bytes, times and reasons


class LiveTable(RunCallback):
    """A callback and a progress function in one; a context manager while it is on the screen."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._wide = self.console.width >= WIDE
        self._name, self._total, self._since = "", 0, "in all"
        self._bytes = [0, 0]
        # Replaced and never changed: the thread that draws may be reading it.
        self._rounds: tuple[RoundRecord, ...] = ()
        self._bars = Progress(
            TextColumn("{task.description:<8}"),
            *([BarColumn(bar_width=30)] if self._wide else []),
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
        if rounds_done:
            self._since = f"since round {rounds_done + 1}"

    def on_round(self, record: RoundRecord) -> None:
        """Add a line."""
        self._rounds = (*self._rounds, record)[-SHOWN:]
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
        rounds = self._rounds
        private = any(record.epsilon is not None for record in rounds)
        up, down = map(amount, self._bytes)
        table = Table(
            title=escape(self._name), title_justify="left", box=box.SIMPLE_HEAD,
            caption=f"{self._since}: {up} up, {down} down",
            caption_justify="left", pad_edge=self._wide, collapse_padding=not self._wide,
        )  # fmt: skip
        cells = [_cells(record, self._total, private, self._wide) for record in rounds]
        for head in cells[0]:
            table.add_column(head, justify="right" if head else "left", no_wrap=bool(head))
        for row in cells:
            table.add_row(*row.values())
        return table


def _cells(record: RoundRecord, total: int, private: bool, wide: bool) -> dict[str, str]:
    """Return a round's line by the heads of its columns; the last one, of words, has none."""
    counted = len(record.cohort) - len(record.dropped)
    lost = len(record.dropped) - len(record.declined)
    told = ((lost, "dropped"), (len(record.declined), "declined"), (record.late, "late"))
    words = [f"{number} {what}" for number, what in told if number and wide]
    if record.status != "updated":
        words.insert(0, record.status)
    found = {
        "round": f"{record.round}/{total}",
        "loss": "" if record.loss is None else f"{record.loss:.4f}",
    }
    if private:
        found["epsilon"] = "" if record.epsilon is None else f"{record.epsilon:.2f}"
    found["clients"] = f"{counted}/{len(record.cohort)}"
    if wide:
        found |= {
            "up": amount(record.bytes_up),
            "down": amount(record.bytes_down),
            "time": f"{record.seconds:.1f} s",
        }
    return found | {"": ", ".join(words)}
