"""What a report consists of, whatever it is written as.

A report is sections of blocks: words, lists, tables, code, and plots. A plot is drawn when a page
needs it; its table is what it shows, the same in every form of the report.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Block", "Cell", "Code", "Notes", "Plot", "Report", "Section", "Table", "Words"]

Cell = str | float | int | None


@dataclass(frozen=True, slots=True)
class Words:
    """A paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class Notes:
    """A list of sentences."""

    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Code:
    """Lines to be copied as they are."""

    text: str
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under a head; numbers are kept whole, and shortened where they are shown."""

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""

    def csv(self) -> str:
        """Return head and rows as CSV; floats have all their digits.

        A text that a spreadsheet would take for a formula gets an apostrophe in front.
        """
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(map(_plain, self.head))
        for row in self.rows:
            writer.writerow([_plain(cell) for cell in row])
        return file.getvalue()


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture, the sentence that says what is in it, and the numbers behind it."""

    title: str
    caption: str
    table: Table
    draw: Callable[[Any], None]  # on a matplotlib Axes
    width: float = 5.2  # inches
    height: float = 3.3


Block = Words | Notes | Code | Table | Plot


@dataclass(frozen=True, slots=True)
class Section:
    """Blocks under a heading; `name` is its anchor."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """A whole report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]

    def plots(self) -> Sequence[Plot]:
        """Return all plots in their order."""
        return [b for section in self.sections for b in section.blocks if isinstance(b, Plot)]


def _plain(cell: Cell) -> str:
    if isinstance(cell, str):
        return f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell
    return "" if cell is None else repr(cell)
