"""`fedlora data`: the data sets that an experiment can name."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedlora.data import list_data

__all__ = ["app"]

app = typer.Typer(help="List data sets of many clients.")


@app.callback()
def _group() -> None:
    """Keep `list` a subcommand: with one command alone typer would drop its name."""


@app.command("list")
def list_sets(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the bundled data sets; "module:function" can be named as well.

    Examples:

        fedlora data list
    """
    found = list_data()
    if as_json:
        typer.echo(json.dumps([asdict(info) for info in found], indent=2, ensure_ascii=False))
        return
    table = Table()
    for title in ("data", "task", "clients", "examples", "licence"):
        table.add_column(title, no_wrap=True)
    for info in found:
        numbers = (str(info.clients), f"{info.examples:,}")
        table.add_row(info.id, info.task, *numbers, info.licence)
    Console().print(table)
    for info in found:
        typer.echo(f"{info.id}: {info.description}")
