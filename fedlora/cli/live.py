"""A run on a terminal while it goes: its last rounds as a table, and a bar for each stage."""

from __future__ import annotations

from collections.abc import Iterable
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
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from fedlora.federation.callbacks import RunCallback
from fedlora.privacy.accounting import rounded_up
from fedlora.report.words import amount

if TYPE_CHECKING:
    from fedlora.experiment import ExperimentConfig
    from fedlora.federation import RoundRecord

__all__ = ["LiveTable"]

SHOWN = 8  # rounds
WIDE = 72  # columns of the terminal that the whole table asks for
SMALL = 48  # those from which there is room for times, bars and reasons


class LiveTable(RunCallback):
    """A callback and a progress function in one; a context manager while it is on the screen."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._name, self._total, self._since = "", 0, "in all"
        self._bytes = [0, 0]
        # Replaced and never changed: the thread that draws may be reading it.
        self._rounds: tuple[RoundRecord, ...] = ()
        self._bars = Progress(*_bar_columns(self.console.width), console=self.console)
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
        rounds, width = self._rounds, self.console.width
        up, down = map(amount, self._bytes)
        table = Table(
            title=escape(self._name), title_justify="left", box=box.SIMPLE_HEAD,
            caption=f"{self._since}: {up} up, {down} down",
            caption_justify="left", pad_edge=width >= SMALL, collapse_padding=width < SMALL,
        )  # fmt: skip
        heads = _heads(rounds, width)
        rows = [_cells(record, self._total) for record in rounds]
        used = 3  # columns of the terminal: a border, and 3 beside the cells of each column
        for head in heads:
            table.add_column(head, justify="right", no_wrap=True)
            used += 3 + max(len(head), *(len(cells[head]) for cells in rows))
        # Where there is no room for its words, a round keeps to its line: the table stays in place.
        narrow = width < WIDE
        room = max(width - used, 1) if narrow else None
        table.add_column("", no_wrap=narrow, overflow="ellipsis", max_width=room)
        for record, cells in zip(rounds, rows, strict=True):
            table.add_row(*(cells[head] for head in heads), _words(record, width))
        return table


def _bar_columns(width: int) -> list[ProgressColumn]:
    """Return the parts of a stage's line that a terminal of so many columns has room for."""
    wide = width >= WIDE
    left = TextColumn("left"), TimeRemainingColumn()
    known = (TimeElapsedColumn(), *left) if wide else left
    room = width - (71 if wide else 40)  # what the parts before the last one take
    last = Column(no_wrap=True, overflow="ellipsis", max_width=max(room, 1))
    return [
        TextColumn("{task.description:<8}"),
        *([BarColumn(bar_width=30 if wide else 8)] if width >= SMALL else []),
        MofNCompleteColumn(),
        *known,
        TextColumn("{task.fields[words]}", table_column=last),
    ]


def _heads(rounds: Iterable[RoundRecord], width: int) -> list[str]:
    """Return the columns: without losses in a private run; bytes and times where there is room."""
    private = any(record.epsilon is not None for record in rounds)
    told = not private or any(record.loss is not None for record in rounds)
    heads = ["round", *(["loss"] if told else []), *(["epsilon"] if private else []), "clients"]
    return [
        *heads,
        *(["up", "down"] if width >= WIDE else []),
        *(["time"] if width >= SMALL else []),
    ]


def _cells(record: RoundRecord, total: int) -> dict[str, str]:
    counted = len(record.cohort) - len(record.dropped)
    return {
        "round": f"{record.round}/{total}",
        "loss": "" if record.loss is None else f"{record.loss:.4f}",
        "epsilon": "" if record.epsilon is None else f"{rounded_up(record.epsilon, 2):.2f}",
        "clients": f"{counted}/{len(record.cohort)}",
        "up": amount(record.bytes_up),
        "down": amount(record.bytes_down),
        "time": f"{record.seconds:.1f} s",
    }


def _words(record: RoundRecord, width: int) -> str:
    """Return how a round ended, and where there is room for it who was not in it."""
    lost = len(record.dropped) - len(record.declined)
    told = ((lost, "dropped"), (len(record.declined), "declined"), (record.late, "late"))
    words = [f"{number} {what}" for number, what in told if number and width >= SMALL]
    if record.status != "updated":
        words.insert(0, record.status)
    return ", ".join(words)
