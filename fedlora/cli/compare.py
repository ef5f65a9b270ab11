"""`fedlora compare`: methods over seeds and a grid, with intervals and paired tests."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.errors import ConfigError
from fedlora.experiment import parse_override

if TYPE_CHECKING:
    from fedlora.simulation import Comparison, Progress

__all__ = ["compare"]


def compare(
    experiment: Annotated[
        str | None,
        typer.Argument(help="A bundled experiment (watch, keyboard, …) or a TOML file."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,…",
            help="Names with commas between; NAME:OPTION=VALUE gives a method's own option, "
            "NAME+OPTIMIZER a server optimizer, NAME+KEY=VALUE any key of the experiment.",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="How many, from the experiment's own upwards.", show_default="5"),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V,V,…", help="Sweep one key of the experiment; several: all combinations."
        ),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key for all runs."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD", help="What the others are tested against.", show_default="the first"
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Find each method's learning rate on the validation parts."),
    ] = False,
    tune_on: Annotated[
        str | None,
        typer.Option(
            help="Whose metric decides: the global or the personal adapter's.",
            show_default="global",
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="global", help="Evaluate base and global alone; no own and personal adapters."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A new or empty folder, or this same comparison's, which goes on.",
            show_default="runs/NAME-comparison",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with the comparison in this folder, also after kill -9."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print comparison.json.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show no progress and no warnings.")
    ] = False,
) -> None:
    """Compare federated methods over seeds, and over a grid of any of the experiment's keys.

    Prints means with 95 % intervals over seeds, paired tests against the first method, bytes and
    time; the folder holds every run, the numbers, the tables and a plot. Exits with 1 when not one
    run came to its end.

    Examples:

        fedlora compare watch --methods fedit,ffa-lora

        fedlora compare watch --methods fedit,ffa-lora --tune --grid lora.rank=2,8,32 --only global

        fedlora compare --resume runs/watch-comparison
    """
    given = (experiment, methods, seeds, grid, override, against, tune_on, only, out)
    if resume is not None and (tune or any(value is not None for value in given)):
        raise ConfigError("--resume goes on with what its folder says: name nothing beside it")
    if resume is None and (experiment is None or methods is None):
        from fedlora.aggregation import methods as known

        raise ConfigError(
            f"name an experiment and --methods ({', '.join(known())}), or a folder with --resume"
        )
    if tune_on is not None and tune_on not in ("global", "personal"):
        raise ConfigError(f"--tune-on: expected 'global' or 'personal', found {tune_on!r}")
    if tune_on is not None and not tune:
        raise ConfigError("--tune-on belongs to --tune: add it")
    from fedlora.simulation import compare as run_comparison
    from fedlora.simulation.comparison import parse_grid

    swept: dict[str, list[Any]] = {}
    for text in grid or []:
        key, values = parse_grid(text)
        if key in swept:
            raise ConfigError(f"--grid {text}: {key} is swept twice; give all of its values once")
        swept[key] = values
    with _progress(quiet) as progress:
        comparison = run_comparison(
            experiment,
            methods,
            seeds=5 if seeds is None else seeds,
            grid=swept,
            overrides=dict(parse_override(text) for text in override or []),
            against=against,
            only=only,  # type: ignore[arg-type]  # checked there
            tune=(tune_on or "global") if tune else None,  # type: ignore[arg-type]
            out=out,
            resume=resume,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(comparison.summary(), indent=2))
    else:
        _print(comparison)
    if not comparison.any_done:
        raise typer.Exit(1)


def _print(comparison: Comparison) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # A file or a pipe has no width: a table takes what it needs.
    console = Console() if sys.stdout.isatty() else Console(width=400)
    for found in comparison.tables():
        table = Table(
            *map(escape, found.head), title=found.title, box=box.SIMPLE_HEAD, title_justify="left"
        )
        for row in found.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for note in found.notes:
            typer.echo(note)
        typer.echo("")
    for note in comparison.notes:
        typer.echo(note)
    typer.echo(f"everything is in {comparison.folder}/")


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress | None]:
    """Yield what shows progress on stderr: a bar for all runs, or a line a run."""
    logger = logging.getLogger("fedlora")
    before = logger.level
    logger.setLevel(logging.ERROR)  # a line for every dropped client: the tables count them
    try:
        if quiet:
            yield None
        elif sys.stderr.isatty():
            yield from _bars()
        else:
            yield _Lines()
    finally:
        logger.setLevel(before)


def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<7}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[words]}"),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}
        clock = _Clock()

        def show(stage: str, done: int, total: int, words: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, words="")
            shown = f"{clock.left(stage, done, total)}  {words}".strip()
            bars.update(tasks[stage], completed=done, total=total, words=shown)

        yield show


class _Clock:
    """How long a stage will take, by the runs that it has done in this process."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, int]] = {}

    def left(self, stage: str, done: int, total: int) -> str:
        now = time.monotonic()
        started, before = self._first.setdefault(stage, (now, done))
        if done in (before, total):
            return ""
        seconds = (now - started) / (done - before) * (total - done)
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{rest:02} left"


class _Lines:
    """A line for every run that is done."""

    def __init__(self) -> None:
        self._clock, self._done = _Clock(), {"": 0}

    def __call__(self, stage: str, done: int, total: int, words: str) -> None:
        left = self._clock.left(stage, done, total)
        if done == self._done.get(stage, 0):
            return
        self._done[stage] = done
        shown = ", ".join(filter(None, (words, left)))
        print(f"{stage}: {done}/{total} {shown}", file=sys.stderr, flush=True)
