"""`fedlora simulate`: run an experiment with virtual clients on this machine."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedlora.errors import ConfigError
from fedlora.experiment import app_root, parse_override

if TYPE_CHECKING:
    from fedlora.simulation import Progress, RunCallback

__all__ = ["simulate"]


def simulate(
    experiment: Annotated[
        str | None,
        typer.Argument(help="A bundled experiment (watch, keyboard, …) or a TOML file."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A new or empty folder for the run.", show_default="runs/NAME"),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder, also after kill -9.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the experiment."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="cohort (many clients in one pass, the default), sequential (one client a core) "
            "or flower (Flower's own simulation, Ray)."
        ),
    ] = None,
    cross: Annotated[
        int | None,
        typer.Option(min=0, help="Also evaluate that many clients' own adapters on each other."),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write OUT/tensorboard, for TensorBoard.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show no progress and no warnings.")
    ] = False,
) -> None:
    """Federate LoRA adapters over virtual clients, then show what each person gets.

    Prints the base, own, global and personal adapters' results; the run's folder holds everything.

    Examples:

        fedlora simulate watch

        fedlora simulate keyboard --out runs/mine --set federation.rounds=5 --cross 12

        fedlora simulate --resume runs/mine
    """
    if experiment is None and resume is None:
        bundled = sorted(path.stem for path in (app_root() / "simulations").glob("*.toml"))
        raise ConfigError(
            f"name an experiment ({', '.join(bundled)}, or a TOML file) or a folder with --resume"
        )
    from fedlora.simulation import simulate as run_experiment

    overrides = dict(parse_override(text) for text in override or [])
    if engine is not None:
        overrides["engine.kind"] = engine
    if cross is not None:
        overrides["personalization.cross"] = cross
    trackers: list[RunCallback] = []
    if tensorboard:
        from fedlora.simulation import TensorBoard

        trackers.append(TensorBoard())
    with _progress(quiet) as (progress, shown):
        run = run_experiment(
            experiment,
            overrides=overrides,
            out=out,
            resume=resume,
            progress=progress,
            callbacks=[*shown, *trackers],
        )
    if as_json:
        typer.echo(json.dumps(run.summary, indent=2))
    else:
        typer.echo(run.table())
        typer.echo(f"\n{run.summary['seconds']:.0f} s; everything is in {run.folder}/")


@contextmanager
def _progress(quiet: bool) -> Iterator[tuple[Progress | None, list[RunCallback]]]:
    """Yield what shows a run on stderr: a table and bars, or lines where it is no terminal."""
    if quiet:
        logger = logging.getLogger("fedlora")
        before = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield None, []
        finally:
            logger.setLevel(before)
        return
    if not sys.stderr.isatty():
        yield _plain_lines, []
        return
    from fedlora.cli.live import LiveTable

    with LiveTable() as table:
        yield table.progress, [table]


def _plain_lines(stage: str, done: int, total: int, words: str) -> None:
    """Print about ten lines a stage."""
    if total == 0 or done in (0, total) or done * 10 // total != (done - 1) * 10 // total:
        print(f"{stage}: {done}/{total} {words}".rstrip(), file=sys.stderr, flush=True)
