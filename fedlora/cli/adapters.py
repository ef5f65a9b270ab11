"""fedlora inspect, convert and combine: adapter files on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora.adapter import Adapter, stack
from fedlora.errors import UsageError
from fedlora.formats import AdapterFile, read_info, save_adapter

__all__ = ["combine", "convert", "inspect"]

Rank = Annotated[
    int | None, typer.Option("--rank", min=1, help="Cut every layer to at most this rank.")
]
CodecOption = Annotated[
    str, typer.Option("--codec", help="Of a packed file: fp32, fp16, int8 or int4.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an adapter that is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def inspect(
    path: Annotated[Path, typer.Argument(help="A PEFT folder or a packed file.")],
    as_json: AsJson = False,
) -> None:
    """Show what an adapter is: layers, ranks, size, norm, base and provenance.

    Examples:

        fedlora inspect alice/

        fedlora inspect global.safetensors --json
    """
    info = read_info(path)
    facts = _facts(info)
    if as_json:
        typer.echo(json.dumps({**facts, "layers": _layers(info.adapter)}, ensure_ascii=False))
        return
    console = Console(soft_wrap=True)
    summary = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
        summary.add_row(name.replace("_", " "), _plain(text))
    console.print(summary)
    table = Table("layer", "kind", "in", "out", "rank", "scaling", "norm", box=None)
    for path_of_layer, layer in _layers(info.adapter).items():
        sizes = "×".join(map(str, layer["in"]))
        norm = "" if layer["norm"] is None else f"{layer['norm']:.4g}"
        table.add_row(
            _plain(path_of_layer), layer["kind"], sizes, str(layer["out"]), str(layer["rank"]),
            f"{layer['scaling']:.6g}", norm,
        )  # fmt: skip
    console.print(table)


def convert(
    source: Annotated[Path, typer.Argument(help="A PEFT folder or a packed file.")],
    target: Annotated[
        str, typer.Argument(help="Without suffix: a PEFT folder; .safetensors: a packed file.")
    ],
    codec: CodecOption = "fp32",
    rank: Rank = None,
    force: Force = False,
) -> None:
    """Write an adapter in another format, number format or rank.

    Examples:

        fedlora convert alice/ alice.safetensors --codec int8

        fedlora convert alice.safetensors alice-r4/ --rank 4
    """
    _check_free(target, force)
    info = read_info(source)
    adapter = info.adapter if rank is None else info.adapter.truncated(rank)
    # A PEFT folder has no place for the tokenizer's digest.
    tokenizer = info.tokenizer if target.endswith(".safetensors") else None
    save_adapter(adapter, target, codec=codec, tokenizer=tokenizer, provenance=info.provenance)
    _say_written(target)


def combine(
    sources: Annotated[list[Path], typer.Argument(help="Adapters of one base; ranks may differ.")],
    out: Annotated[str, typer.Option("--out", help="Where to write; see fedlora convert.")],
    weights: Annotated[
        str | None, typer.Option("--weights", help="One number each, as 0.5,0.5. [default: 1 each]")
    ] = None,
    codec: CodecOption = "fp32",
    rank: Rank = None,
    force: Force = False,
) -> None:
    """Write the weighted sum of adapters: exact, by stacking; --rank cuts it.

    Examples:

        fedlora combine alice/ bob/ --weights 0.5,0.5 --out both.safetensors

        fedlora combine task-a/ task-b/ --out both/ --rank 8
    """
    _check_free(out, force)
    factors = _parse_weights(weights, len(sources))
    adapters = [read_info(source).adapter for source in sources]
    both = stack([a.scaled(factor) for a, factor in zip(adapters, factors, strict=True)])
    if rank is not None:
        both = both.truncated(rank)
    provenance = {
        "combined": [
            {"fingerprint": adapter.fingerprint(), "weight": factor}
            for adapter, factor in zip(adapters, factors, strict=True)
        ]
    }
    save_adapter(both, out, codec=codec, provenance=provenance)
    _say_written(out)


def _facts(info: AdapterFile) -> dict[str, Any]:
    adapter, config = info.adapter, info.adapter.config
    ranks = sorted(set(adapter.ranks))
    return {
        "format": info.format,
        "codec": info.codec,
        "variant": config.variant,
        "num_layers": len(adapter),
        "rank": ranks[0] if len(ranks) == 1 else f"{ranks[0]}..{ranks[-1]}",
        "target_modules": config.target_modules
        if isinstance(config.target_modules, str)
        else ", ".join(config.target_modules),
        "parameters": adapter.num_parameters,
        "bytes": info.num_bytes,
        "norm": None if config.uses_dora else round(adapter.norm(), 6),
        "fingerprint": adapter.fingerprint(),
        "base": adapter.base,
        "tokenizer": info.tokenizer,
        "provenance": dict(info.provenance),
    }


def _layers(adapter: Adapter) -> dict[str, Any]:
    return {
        path: {
            "kind": layer.kind,
            "in": list(layer.in_shape),
            "out": layer.out_features,
            "rank": layer.rank,
            "scaling": layer.scaling,
            "norm": None if layer.magnitude is not None else layer.norm(),
        }
        for path, layer in adapter.layers.items()
    }


def _plain(text: str) -> Text:
    """Keep what a file says from being read as rich's markup or as control characters."""
    return Text("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


def _parse_weights(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1.0] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights: expected numbers such as 0.5,0.5, found {text!r}") from None
    if len(weights) != count:
        raise UsageError(
            f"--weights: expected {count} numbers, one for each adapter, found {len(weights)}"
        )
    return weights


def _check_free(target: str, force: bool) -> None:
    if Path(target).exists() and not force:
        raise UsageError(f"{target}: there is something already; add --force to replace it")


def _say_written(target: str) -> None:
    info = read_info(target)
    typer.echo(f"{target}: {info.adapter!r}, {info.num_bytes:,} bytes")
