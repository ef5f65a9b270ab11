"""`fedlora models`: the bases that are here, and those that can be fetched."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedlora.bases import list_bases

__all__ = ["app"]

app = typer.Typer(help="List frozen bases, and fetch those that are not bundled.")


@app.command("list")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the bases that an experiment can name.

    A local Hugging Face folder and "module:function" can be named as well.

    Examples:

        fedlora models list
    """
    found = list_bases()
    if as_json:
        typer.echo(json.dumps([asdict(info) for info in found], indent=2))
        return
    table = Table()
    for title in ("base", "parameters", "task", "licence", "here"):
        table.add_column(title, no_wrap=True)
    for info in found:
        parameters = "" if info.parameters is None else f"{info.parameters:,}"
        here = "yes" if info.ready else "no"
        table.add_row(info.id, parameters, info.task, info.licence, here)
    Console().print(table)
    for info in found:
        command = "" if info.ready else f" (get it: fedlora models fetch {info.id})"
        typer.echo(f"{info.id}: {info.description}{command}")


@app.command()
def fetch(
    id: Annotated[str, typer.Argument(help="The base to fetch, such as smollm2-135m.")],
    again: Annotated[bool, typer.Option("--again", help="Fetch it even if it is here.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Download a base into the cache ($FEDLORA_HOME or ~/.cache/fedlora) and convert it once.

    Afterwards no network is needed.

    Examples:

        fedlora models fetch smollm2-135m
    """
    from fedlora.bases import base_path
    from fedlora.nn.fetch import fetch_base

    card = fetch_base(id, lambda line: print(line, file=sys.stderr, flush=True), again=again)
    if as_json:
        result = {"id": card.id, "path": str(base_path(id)), "fingerprint": card.fingerprint}
        typer.echo(json.dumps(result, indent=2))
    else:
        typer.echo(base_path(id))
