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
    table = Table("data", "task", "clients", "examples", "licence", "what it is")
    for info in found:
        table.add_row(
            info.id, info.task, str(info.clients), f"{info.examples:,}", info.licence,
            info.description,
        )  # fmt: skip
    Console().print(table)
