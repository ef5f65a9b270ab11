"""`fedlora budget`: what an adapter costs, before it is trained."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedlora.adapter import LoraConfig
from fedlora.bases import load_card
from fedlora.targets import budget as count

__all__ = ["budget"]


def budget(
    base: Annotated[str, typer.Argument(help="A base of `fedlora models list`, or a folder.")],
    targets: Annotated[
        str,
        typer.Option(
            help="Names of modules with commas between, a regular expression, or all-linear."
        ),
    ] = "all-linear",
    rank: Annotated[int, typer.Option(min=1, help="Rank of every layer.")] = 8,
    layers: Annotated[
        str | None, typer.Option(help="last:N puts LoRA on the last N blocks only.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count an adapter's parameters and the bytes that one client sends in a round.

    Needs neither torch nor the weights. A folder or "module:function" must have been loaded once.

    Examples:

        fedlora budget tiny-chat --targets q_proj,v_proj --rank 8

        fedlora budget tiny-chat --layers last:1 --json
    """
    card = load_card(base)
    config = LoraConfig(rank=rank, target_modules=_targets(targets), layers=layers)
    found = count(card.layers, config, card.parameters)
    if as_json:
        result = {
            "base": card.id,
            "base_parameters": found.base_parameters,
            "rank": rank,
            "layers": found.layers,
            "parameters": found.parameters,
            "share": found.share,
            "bytes": found.bytes,
        }
        typer.echo(json.dumps(result, indent=2))
        return
    table = Table("", "adapter", title=f"rank {rank} on {found.layers} layers of {card.id}")
    table.add_row("parameters", f"{found.parameters:,}")
    table.add_row("share of the base", f"{found.share:.2%} of {found.base_parameters:,}")
    for codec, size in found.bytes.items():
        table.add_row(f"bytes as {codec}", f"{size:,}")
    Console().print(table)


def _targets(text: str) -> tuple[str, ...] | str:
    """A name or several are names; anything with other characters is a regular expression."""
    names = tuple(name.strip() for name in text.split(","))
    if text != "all-linear" and all(name.replace(".", "_").isidentifier() for name in names):
        return names
    return text
