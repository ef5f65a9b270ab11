"""A report as Markdown: its words and tables; a plot becomes its caption and its numbers."""

from __future__ import annotations

import re

from fedlora.report.blocks import Block, Code, Notes, Plot, Report, Table, Words
from fedlora.report.words import cell

__all__ = ["markdown"]

MOST_ROWS = 30  # of a plot's numbers; more are in the HTML report
# What Markdown would read as markup, or as HTML, in a text that is neither.
_SPECIAL = re.compile(r"([\\`*_\[\]<>|#])")


def markdown(report: Report) -> str:
    """Return the page."""
    lines = [f"# {_text(report.title)}", "", _text(report.subtitle), ""]
    for section in report.sections:
        lines += [f"## {_text(section.title)}", ""]
        for block in section.blocks:
            lines += [*_block(block), ""]
    return "\n".join(lines)


def _block(block: Block) -> list[str]:
    if isinstance(block, Words):
        return [_text(block.text)]
    if isinstance(block, Notes):
        return [f"- {_text(item)}" for item in block.items]
    if isinstance(block, Code):
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
        words = [_text(block.caption), ""] if block.caption else []
        return [*words, fence, block.text.rstrip("\n"), fence]
    if isinstance(block, Table):
        return _table(block)
    assert isinstance(block, Plot)
    lines = [f"### {_text(block.title)}", "", _text(block.caption), ""]
    if len(block.table.rows) > MOST_ROWS:
        return [*lines, f"{len(block.table.rows)} rows: see report.html."]
    return [*lines, *_table(block.table)]


def _table(table: Table) -> list[str]:
    lines = [_text(table.caption), ""] if table.caption else []
    lines.append("| " + " | ".join(map(_text, table.head)) + " |")
    lines.append("|" + "---|" * len(table.head))
    lines += ["| " + " | ".join(_text(cell(c)) for c in row) + " |" for row in table.rows]
    return lines


def _text(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
