"""`fedlora ota collect|advance`: what devices report, and the rollout that follows from it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli.ota import (
    AsJson,
    KeysFolder,
    Passphrase,
    Repository,
    _print_json,
    _publisher,
    app,
)
from fedlora.errors import ConfigError

__all__: list[str] = []

Reports = Annotated[
    Path, typer.Option("--reports", help="The file of reports, one a line.", show_default=False)
]


@app.command()
def collect(
    reports: Reports,
    host: Annotated[str, typer.Option(help="0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8078,
) -> None:
    """Take in what devices report and append it to a file, until interrupted.

    Kept are version, healthy or not, and one of seven words; no address, no time. Put a reverse
    proxy with TLS before it.

    Examples:

        fedlora ota collect --reports reports.jsonl
    """
    from fedlora.ota.reports import collector

    found = collector(reports, host, port)
    with found:
        typer.echo(f"http://{host}:{found.server_address[1]}/reports")
        found.serve_forever()


@app.command()
def advance(
    repository: Repository,
    keys: KeysFolder,
    reports: Reports,
    channel: Annotated[str, typer.Option(help="Whose newest release.")] = "stable",
    steps: Annotated[str, typer.Option(help="Percent of the devices, rising.")] = "1,10,100",
    max_failures: Annotated[
        float, typer.Option(help="Share of the reports; more halt the release.")
    ] = 0.02,
    min_reports: Annotated[
        int, typer.Option(min=1, help="That the first step needs; later ones in proportion.")
    ] = 50,
    passphrase: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """Raise the newest release's rollout if enough devices are well, halt it if too many are not.

    To be run every few minutes by a timer, with the online keys. After a halt the release before is
    published again for everyone, which needs the targets key. Exit code 1 after a halt.

    Examples:

        fedlora ota advance --reports reports.jsonl --repository releases/ --keys keys/
    """
    from fedlora.ota.reports import read_counts
    from fedlora.ota.stages import Plan
    from fedlora.ota.stages import advance as step

    plan = Plan(_percentages(steps), max_failures, min_reports)
    done = step(_publisher(repository, keys, passphrase), channel, read_counts(reports), plan)
    if as_json:
        _print_json(asdict(done))
    else:
        decision = done.decision
        words = {
            "wait": f"stays at {decision.percent:g} %",
            "raise": f"is raised to {decision.percent:g} %",
            "halt": "is halted",
            "done": f"is at {decision.percent:g} %, its last step",
        }
        typer.echo(f"release {done.version} {words[decision.action]}: {decision.reason}")
        if done.republished is not None:
            again = done.republished
            typer.echo(f"release {again.version} brings everyone back: {again.notes}")
        elif done.note:
            typer.echo(done.note)
    if done.decision.action == "halt":
        raise typer.Exit(1)


def _percentages(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--steps: expected numbers such as 1,10,100, found {text!r}") from None
