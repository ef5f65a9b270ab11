"""A report as one HTML file that asks no network for anything, and runs no script."""

from __future__ import annotations

import html
from collections.abc import Sequence
from urllib.parse import quote

from fedlora.report.blocks import Block, Cell, Code, Notes, Plot, Report, Section, Table, Words
from fedlora.report.drawing import svg_of
from fedlora.report.words import cell as shown

__all__ = ["html_page"]

MOST_ROWS = 200  # that a page shows of a table; the data behind it have all
SHORT = 24  # letters of a cell that stays on one line; a longer one gets room
# Nothing may be loaded from anywhere, should a text of a client ever look like an element.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

STYLE = """
:root { color-scheme: light dark;
  --sans: system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
  --page: #ffffff; --ink: #1b1f24; --muted: #59636e; --line: #d1d9e0; --soft: #f4f6f8;
  --bad: #c11f2e; --s0: #1d5fd0; --s1: #b35900; --s2: #0a7a55; --s3: #5f6b7a; --s4: #7a3fbf;
  --s5: #0b7a99; --s6: #a1358c; --s7: #6b6a00; }
@media (prefers-color-scheme: dark) { :root {
  --page: #12161b; --ink: #e8edf2; --muted: #9aa6b2; --line: #39424c; --soft: #1b2128;
  --bad: #ff7b7b; --s0: #6aa8ff; --s1: #f2a54a; --s2: #41cf97; --s3: #a3afbd; --s4: #c39bff;
  --s5: #4fc9e6; --s6: #f08ad6; --s7: #d0cd54; } }
@media print { :root { color-scheme: light;
  --page: #ffffff; --ink: #000000; --muted: #444444; --line: #bbbbbb; --soft: #ffffff;
  --bad: #b00020; --s0: #1d5fd0; --s1: #b35900; --s2: #0a7a55; --s3: #5f6b7a; --s4: #7a3fbf;
  --s5: #0b7a99; --s6: #a1358c; --s7: #6b6a00; } nav, .data { display: none; }
  .scroll { overflow: visible !important; } table { font-size: .75rem !important; }
  th, td { padding-right: .5rem !important; }
  figure, table, pre { break-inside: avoid; } section.long, table.long { break-inside: auto; }
  h2, h3, figcaption { break-after: avoid; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 74rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 var(--sans); overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .2rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; padding-bottom: .25rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .3rem; }
p, ul { max-width: 48rem; margin: .5rem 0; } li { margin: .2rem 0; }
.sub { color: var(--muted); margin: .8rem 0 0; font-size: .875rem; }
header .sub { margin: 0; font-size: 1rem; }
nav { margin: 1rem 0 0; } nav a { display: inline-block; margin: 0 1rem .3rem 0; }
a { color: var(--s0); } a:focus-visible, summary:focus-visible { outline: 2px solid var(--s0); }
.plots { display: grid; gap: 1.6rem 2rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 29rem), 1fr)); }
figure { margin: 0; min-width: 0; max-width: 35rem; }
figcaption { color: var(--muted); font-size: .875rem; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.data { font-size: .875rem; margin-top: .3rem; }
.scroll { overflow-x: auto; max-width: 100%; }
.data .scroll { max-height: 22rem; overflow-y: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums;
  margin: .5rem 0; overflow-wrap: normal; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
td.n, th.n { text-align: right; } td { max-width: 34rem; } td.w { white-space: nowrap; }
td.l { min-width: 15rem; overflow-wrap: anywhere; }
th { font-weight: 600; vertical-align: bottom; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 4px;
  padding: .6rem .8rem;
  overflow-x: auto; font: .8125rem/1.45 ui-monospace, Menlo, Consolas, monospace; margin: .4rem 0;
  white-space: pre-wrap; }
"""


def html_page(report: Report) -> str:
    """Return the page. Raises `MissingExtraError` without matplotlib."""
    names = iter(f"p{number}" for number in range(len(report.plots())))
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',  # else a browser asks the server for one
        f"<title>{_text(report.title)}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        f'<header><h1>{_text(report.title)}</h1><p class="sub">{_text(report.subtitle)}</p>',
        '<nav aria-label="Sections">',
        *(f'<a href="#{s.name}">{_text(s.title)}</a>' for s in report.sections),
        "</nav></header>",
        "<main>",
    ]
    for section in report.sections:
        parts += [f'<section id="{section.name}"><h2>{_text(section.title)}</h2>']
        parts += _blocks(section, names)
        parts.append("</section>")
    parts += ["</main>", "</body>", "</html>", ""]
    return "\n".join(parts)


def _blocks(section: Section, names: object) -> list[str]:
    """Return a section's blocks; plots that follow one another stand side by side."""
    found: list[str] = []
    beside = False
    for block in section.blocks:
        is_plot = isinstance(block, Plot)
        if is_plot and not beside:
            found.append('<div class="plots">')
        if beside and not is_plot:
            found.append("</div>")
        beside = is_plot
        found.append(_figure(block, next(names)) if isinstance(block, Plot) else _block(block))  # type: ignore[call-overload]
    if beside:
        found.append("</div>")
    return found


def _block(block: Block) -> str:
    if isinstance(block, Words):
        return f"<p>{_text(block.text)}</p>"
    if isinstance(block, Notes):
        return "<ul>" + "".join(f"<li>{_text(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Code):
        words = f"<p>{_text(block.caption)}</p>" if block.caption else ""
        return f"{words}<pre>{_text(block.text)}</pre>"
    assert isinstance(block, Table)
    return _table(block)


def _figure(plot: Plot, name: str) -> str:
    file = "".join(c if c.isalnum() else "-" for c in plot.title.lower()).strip("-")
    link = (
        f'<a download="{file}.csv" href="data:text/csv;charset=utf-8,{quote(plot.table.csv())}">'
        f"CSV<span hidden> of {_text(plot.title)}</span></a>"
    )
    return (
        f'<figure id="{name}"><h3 id="{name}-title">{_text(plot.title)}</h3>'
        f"{svg_of(plot, name)}"
        f'<figcaption id="{name}-words">{_text(plot.caption)}</figcaption>'
        f'<div class="data">{link}<details><summary>The numbers as a table</summary>'
        f"{_table(plot.table)}</details></div></figure>"
    )


def _table(table: Table) -> str:
    numeric = [_is_numeric(table.rows, i) for i in range(len(table.head))]
    marks = [' class="n"' if is_number else "" for is_number in numeric]
    head = "".join(
        f'<th scope="col"{mark}>{_text(name)}</th>'
        for name, mark in zip(table.head, marks, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(map(_td, row, marks)) + "</tr>" for row in table.rows[:MOST_ROWS]
    )
    words = table.caption
    if len(table.rows) > MOST_ROWS:
        words = f"{words} The first {MOST_ROWS} of {len(table.rows)} rows.".strip()
    # Beside the table and not its caption, which would scroll away with it on a narrow screen.
    caption = f'<p class="sub">{_text(words)}</p>' if words else ""
    return (
        f'{caption}<div class="scroll" role="region" tabindex="0" '
        f'aria-label="{_text(words or ", ".join(table.head))}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _td(cell: Cell, mark: str) -> str:
    text = shown(cell)
    if not mark:
        mark = ' class="w"' if len(text) <= SHORT else ' class="l"'
    return f"<td{mark}>{_text(text)}</td>"


def _is_numeric(rows: Sequence[Sequence[Cell]], column: int) -> bool:
    values = [row[column] for row in rows if row[column] is not None]
    return bool(values) and all(isinstance(value, int | float) for value in values)


def _text(text: str) -> str:
    return html.escape(text, quote=True)
