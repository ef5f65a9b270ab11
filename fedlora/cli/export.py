"""`fedlora export`: a base as a bundle of ONNX graphs that a device runs and trains."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import typer

from fedlora.adapter import LoraConfig
from fedlora.device.manifest import TrainPrecision
from fedlora.errors import UsageError
from fedlora.experiment import ExperimentConfig, find_experiment

__all__ = ["export"]


def export(
    base: Annotated[
        str | None,
        typer.Argument(help="A base as in fedlora models list, a folder or module:function."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The bundle's folder.")] = Path("bundle"),
    rank: Annotated[
        int | None, typer.Option(min=1, help="Of a new adapter; the graphs take any. [default: 8]")
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="Of a new adapter. [default: 16]")
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(help="all-linear, names as q_proj,v_proj, or a regular expression."),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            help="Training steps: ROWSxTOKENS for text, ROWS for other inputs, or none. "
            "[default: 8x32,8x64 or 16; none with --merge]"
        ),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="int8|int4", help="Keep the base in fewer bits.")
    ] = None,
    train_precision: Annotated[
        str,
        typer.Option(
            metavar="exact|int8-backward|int8",
            help="Approximate gradients in less time, by int8 products in the backward pass or in "
            "both.",
        ),
    ] = "exact",
    decode: Annotated[
        bool, typer.Option("--decode", help="Also a graph that writes text, with a cache.")
    ] = False,
    web: Annotated[
        bool, typer.Option("--web", help="For browsers: factors are required inputs.")
    ] = False,
    merge: Annotated[
        Path | None, typer.Option(help="Put this adapter (also DoRA) into the weights.")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=2, help="A new head for so many classes on a text model.")
    ] = None,
    input_shape: Annotated[
        str | None, typer.Option(help="Of one example that is no text, as 6,100.")
    ] = None,
    experiment: Annotated[
        str | None, typer.Option(help="Take base, LoRA and task from an experiment or TOML file.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Even if it is there already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Export a base as a device bundle: any adapter is served and trained on it, without torch.

    Every graph is compared with torch before the bundle is written.

    Examples:

        fedlora export tiny-chat --out bundle/ --decode

        fedlora export minilm --num-classes 4 --target-modules query,value,zero_head --train 8x32

        fedlora export --experiment watch --out watch-bundle/
    """
    config = None if experiment is None else ExperimentConfig.from_toml(find_experiment(experiment))
    if (base is None) == (config is None):
        raise UsageError("fedlora export: name a base, or an experiment with --experiment")
    if quantize not in (None, "int8", "int4"):
        raise UsageError(f"--quantize: expected int8 or int4, found {quantize!r}")
    if train_precision not in get_args(TrainPrecision):
        raise UsageError(
            f"--train-precision: expected exact, int8-backward or int8, found {train_precision!r}"
        )
    task = None
    if config is not None:
        base, num_classes = config.base.id, num_classes or config.base.num_classes
        task = config.data.task
        if task not in ("next-token", "classification"):
            raise UsageError(
                f"--experiment {experiment}: expected the task next-token or classification, found "
                f"{task!r}, whose loss has no graph"
            )
    lora = _lora(config, rank, lora_alpha, target_modules)
    shape = None if input_shape is None else _sizes(input_shape)

    from fedlora.export.bundle import export_bundle
    from fedlora.formats import load_adapter

    manifest = export_bundle(
        cast(str, base),
        out,
        lora=lora,
        train=_buckets(train),
        precision=cast(Literal["fp32", "int8", "int4"], quantize or "fp32"),
        train_precision=cast(TrainPrecision, train_precision),
        decode=decode,
        web=web,
        merge=None if merge is None else load_adapter(merge),
        task=cast(Literal["next-token", "classification", None], task),
        num_classes=num_classes,
        input_shape=shape,
        again=again,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    files = {name: info.num_bytes for name, info in manifest.files.items()}
    if as_json:
        result: dict[str, Any] = {
            "out": str(out),
            "base": manifest.base,
            "layers": len(manifest.layers),
            "precision": manifest.precision,
            "train_precision": manifest.train_precision,
            "bytes": sum(files.values()),
            "files": files,
            "graphs": {name: asdict(graph) for name, graph in manifest.graphs.items()},
        }
        typer.echo(json.dumps(result, indent=2))
        return
    typer.echo(f"{out}: {manifest.base_id}, {len(manifest.layers)} layers, {manifest.precisions}")
    for name, size in files.items():
        parity = ""
        if name in manifest.graphs:
            parity = f"  differs from torch by {manifest.graphs[name].difference:.0e}"
        typer.echo(f"  {name:<20} {size:>13,} bytes{parity}")


def _lora(
    config: ExperimentConfig | None, rank: int | None, alpha: float | None, targets: str | None
) -> LoraConfig:
    lora = LoraConfig() if config is None else config.lora
    changes: dict[str, Any] = {}
    if rank is not None:
        changes["rank"] = rank
    if alpha is not None:
        changes["lora_alpha"] = alpha
    if targets is not None:
        changes["target_modules"] = _targets(targets)
    return replace(lora, **changes)


def _targets(text: str) -> str | tuple[str, ...]:
    """Names, unless it has a character that no name of a module has."""
    names = text.split(",")
    is_regex = not all(name.replace(".", "_").isidentifier() or name.isdigit() for name in names)
    return text if text == "all-linear" or is_regex else tuple(names)


def _buckets(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return () if text == "none" else tuple(part.strip() for part in text.split(","))


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--input-shape: expected sizes such as 6,100, found {text!r}")
    return tuple(int(part) for part in parts)
