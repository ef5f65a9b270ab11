"""`fedlora federation up|status|down|submit`: run a real federation, from the host of its server.

The other steps of one on real hosts are `fedlora.cli.federation_hosts`.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedlora.errors import ConfigError, UsageError
from fedlora.experiment import ExperimentConfig, find_experiment, parse_override

if TYPE_CHECKING:
    from fedlora.federation import RoundRecord

__all__ = ["DEFAULT_DIR", "AsJson", "Dir", "app", "say"]

app = typer.Typer(
    help="Run a real federation: a SuperLink with TLS, SuperNodes with registered keys. `up` "
    "brings all of it up on this host; the other commands are its steps, for real hosts.",
    no_args_is_help=True,
)

Dir = Annotated[
    Path,
    typer.Option(
        "--dir",
        envvar="FEDLORA_FEDERATION_DIR",
        help="The federation's folder: certificates, keys, database, logs, run.",
    ),
]
DEFAULT_DIR = Path("federation")
Override = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the experiment."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def up(
    folder: Dir = DEFAULT_DIR,
    nodes: Annotated[int | None, typer.Option(min=1, help="How many. [default: 3]")] = None,
    trainer: Annotated[
        str | None,
        typer.Option(help="onnx or torch for all nodes, or one for each: onnx,onnx,torch."),
    ] = None,
    experiment: Annotated[
        str | None, typer.Option(help="A bundled experiment or a TOML file. [default: watch]")
    ] = None,
    override: Override = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="Of nodes that train in onnx. [default: one is exported, where torch is]"
        ),
    ] = None,
    python: Annotated[
        list[str] | None,
        typer.Option(metavar="TRAINER=VENV", help="Run that trainer's nodes in an environment."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what a stopped or killed `up` left.")
    ] = False,
    keep_up: Annotated[
        bool, typer.Option("--keep-up", help="Leave link and nodes running at the end.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring a whole federation up on the loopback of this host, run an experiment, stop it again.

    Certificates, node keys, a SuperLink with TLS, node authentication and a database, registered
    SuperNodes: everything is in the folder. Each node has one client's data.

    Examples:

        fedlora federation up --nodes 3 --experiment watch --set federation.rounds=3

        fedlora federation up --trainer onnx,onnx,torch --python onnx=device-venv/ --dir fed/

        fedlora federation up --resume --dir fed/
    """
    from fedlora.federation.deploy import local

    if resume:
        if any(
            value is not None for value in (nodes, trainer, experiment, override, bundle, python)
        ):
            raise UsageError("--resume goes on with what its folder says: name nothing beside it")
        federation, config = local.resumed(folder)
    else:
        count = 3 if nodes is None else nodes
        asked = _experiment(experiment or "watch", override)
        config = local.fitting_cohort(asked, count)
        kinds = trainer.split(",") if trainer else ()
        federation = local.plan(folder, count, kinds, bundle=bundle, pythons=_pythons(python))
        if config != asked:
            say(
                f"federation.cohort: {config.federation.cohort} in place of "
                f"{asked.federation.cohort}, since there are {count} nodes"
            )
    if any(node.trainer == "onnx" and node.bundle is None for node in federation.nodes):
        _require_exportable(config)
    if not resume:
        local.begin(federation, config)
    # So that a service manager's stop runs what stops link and nodes, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    result = local.up(
        federation,
        config,
        say=say,
        on_round=_show_round(config),
        keep_up=keep_up,
        export=lambda out: _export(config, out),
    )
    _print_result(result, as_json)


@app.command()
def status(folder: Dir = DEFAULT_DIR, as_json: AsJson = False) -> None:
    """Show what runs in a federation's folder, and how far its run is.

    Exits with 1 when something that was started is not running.

    Examples:

        fedlora federation status --dir fed/
    """
    from fedlora.federation.deploy import local

    found = local.status(folder)
    started = [row for row in [found["link"], *found["nodes"]] if row and row["pid"] is not None]
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        table = Table("", "pid", "state", "trainer", "", box=None)
        if link := found["link"]:
            table.add_row("link", *_process(link), "", link["address"])
        for row in found["nodes"]:
            table.add_row(row["name"], *_process(row), row["trainer"], row["link_says"] or "")
        Console(width=None if sys.stdout.isatty() else 120).print(table)
        if run := found["run"]:
            loss = "" if run["loss"] is None else f", loss {run['loss']:.4f}"
            typer.echo(f"run: round {run['round']} of {run['rounds']}{loss}; {run['out']}")
    if not all(row["running"] for row in started):
        raise typer.Exit(1)


@app.command()
def down(folder: Dir = DEFAULT_DIR, as_json: AsJson = False) -> None:
    """Stop the link and the nodes that were started in a folder, by their recorded processes.

    Examples:

        fedlora federation down --dir fed/
    """
    from fedlora.federation.deploy import local

    stopped = local.down(folder)
    if as_json:
        typer.echo(json.dumps({"stopped": stopped}))
    else:
        typer.echo(f"stopped: {', '.join(stopped)}" if stopped else "nothing was running")


@app.command()
def submit(
    experiment: Annotated[
        str | None, typer.Argument(help="A bundled experiment (watch, keyboard, …) or a TOML file.")
    ] = None,
    folder: Dir = DEFAULT_DIR,
    out: Annotated[
        Path | None, typer.Option(help="A new or empty folder for the run.", show_default="DIR/out")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder, from its checkpoint.")
    ] = None,
    override: Override = None,
    min_clients: Annotated[
        int | None,
        typer.Option(min=1, help="Begin once so many nodes are connected. [default: the cohort]"),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0, help="Hours for the whole run; it can be resumed after them.")
    ] = 168.0,
    as_json: AsJson = False,
) -> None:
    """Run an experiment on the federation whose SuperLink runs here; wait for its end.

    Exits with 1 and the reason when the run fails.

    Examples:

        fedlora federation submit watch --dir /var/lib/fedlora --min-clients 3

        fedlora federation submit --resume /var/lib/fedlora/out --dir /var/lib/fedlora
    """
    from fedlora.federation.deploy.folder import Federation
    from fedlora.federation.deploy.submit import Submission, claim_run, read_run
    from fedlora.federation.deploy.submit import submit as submit_run

    if (experiment is None) == (resume is None):
        raise UsageError("fedlora federation submit: name an experiment, or a folder to --resume")
    if resume is not None and out is not None:
        raise UsageError("--resume goes on in its folder: leave out --out")
    federation = Federation.read(folder)
    if resume is not None:
        run, config = resume, read_run(resume, _overrides(override))
    else:
        run, config = out or federation.out, _experiment(str(experiment), override)
        claim_run(run, config)
    count = min_clients or config.federation.cohort
    result = submit_run(
        federation,
        Submission(config, run.absolute(), count, timeout * 3600),
        on_round=_show_round(config),
        say=say,
    )
    _print_result(result, as_json)


def _experiment(name: str, override: Sequence[str] | None) -> ExperimentConfig:
    return ExperimentConfig.from_toml(find_experiment(name), _overrides(override))


def _overrides(override: Sequence[str] | None) -> dict[str, Any]:
    return dict(parse_override(text) for text in override or ())


def _pythons(texts: Sequence[str] | None) -> dict[str, Path]:
    found = {}
    for text in texts or ():
        kind, equals, path = text.partition("=")
        if not equals or not path or kind not in ("onnx", "torch"):
            raise UsageError(f"--python {text}: expected onnx=VENV or torch=VENV")
        found[kind] = Path(path)
    return found


def _require_exportable(config: ExperimentConfig) -> None:
    """Raise where no bundle of an experiment can be made, before anything is started."""
    if config.data.task not in ("next-token", "classification"):
        raise ConfigError(
            f"--bundle: expected one, since {config.data.task!r} has no training graph"
        )
    missing = [name for name in ("torch", "onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            "--bundle: expected the folder of a device bundle for nodes that train in onnx; it can "
            f"be exported only where {', '.join(missing)} is installed: run fedlora export there, "
            "or pip install 'fedlora[export]'"
        )


def _export(config: ExperimentConfig, out: Path) -> None:
    """Export the bundle of an experiment, for nodes that train in ONNX Runtime."""
    from fedlora.export.bundle import export_bundle

    export_bundle(
        config.base.id,
        out,
        lora=config.lora,
        task=config.data.task,  # type: ignore[arg-type]  # checked above
        num_classes=config.base.num_classes,
        report=say,
    )


def _show_round(config: ExperimentConfig) -> Any:
    from fedlora.federation.deploy.submit import round_line

    rounds = config.federation.rounds

    def show(record: RoundRecord) -> None:
        say(round_line(record, rounds))

    return show


def _process(row: dict[str, Any]) -> tuple[str, str]:
    if row["pid"] is None:
        return "", "not started"
    return str(row["pid"]), "running" if row["running"] else "ended"


def _print_result(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    from fedlora.federation.results import table

    loss = "" if result["loss"] is None else f", loss {result['loss']:.4f}"
    typer.echo(
        f"completed: {result['rounds']} rounds with {result['clients']} clients{loss}; "
        f"{result['seconds']:.0f} s; {result['bytes_up']:,} bytes up, "
        f"{result['bytes_down']:,} down"
    )
    if result["dropped"]:
        typer.echo(f"{result['dropped']} replies did not count; see rounds.jsonl")
    if result["summary"]:
        typer.echo(f"\n{table(result['summary'])}\n")
    typer.echo(f"global adapter: {result['adapter']}")
    typer.echo(f"everything is in {result['out']}/")


def say(line: str) -> None:
    """Print a line of what goes on, which is no result, on stderr."""
    print(line, file=sys.stderr, flush=True)
