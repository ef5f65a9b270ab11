"""`fedlora report`: a run's or a comparison's folder as one page, or as Markdown."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from fedlora.errors import RunError
from fedlora.files import write_atomic

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run or of a comparison.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write.", show_default="RUN/report.html")
    ] = None,
    markdown: Annotated[
        bool,
        typer.Option("--markdown", help="Print it as Markdown; with --out, write it there."),
    ] = False,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Write what a run's folder holds as one HTML file that needs no network, and print its name.

    A run that is under way has a report too, of what is there so far. Nothing else in the folder
    is changed.

    Examples:

        fedlora report runs/watch --open

        fedlora report runs/watch --markdown > watch.md

        fedlora report runs/watch-comparison --out comparison.html
    """
    from fedlora.report import markdown_report, write_report

    if out is not None and not out.absolute().parent.is_dir():
        raise RunError(f"{out}: expected a folder that is there, found none; make it first")
    if markdown:
        text = markdown_report(run)
        if out is None:
            typer.echo(text, nl=False)
            return
        write_atomic(out, text.encode())
        path = out
    else:
        path = write_report(run, out)
    typer.echo(path)
    if open_it:
        webbrowser.open(path.absolute().as_uri())
