"""`fedlora privacy`: what noise costs, how much of it a promise needs, and what a run has spent."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedlora.cli import privacy_audit
from fedlora.errors import ConfigError, RunError
from fedlora.experiment import ExperimentConfig
from fedlora.privacy import PrivacyConfig, PrivacyEvent
from fedlora.privacy.accounting import (
    accountant_used,
    calibrate,
    epsilon_of,
    neighboring_relation,
    rounded_up,
)
from fedlora.privacy.ledger import LEDGER, Ledger

__all__ = ["app"]

app = typer.Typer(help="Count what differential privacy costs: epsilon, noise, a run's ledger.")
app.command()(privacy_audit.audit)

UNIT = "user"  # all of a person's data counts as one
_NEIGHBORS = {
    "add-or-remove-one": "with or without any one person",
    "replace-one": "with any one person's data replaced, which moves a sum by two clipping norms",
}


class AccountantName(StrEnum):
    """The values of --accountant."""

    pld = "pld"
    rdp = "rdp"
    exact = "exact"


Probability = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="With which everyone is drawn in a round, alone (Poisson); 1: everyone takes part.",
    ),
]
Cohort = Annotated[
    int | None,
    typer.Option(min=1, help="People drawn in a round without replacement, with --population."),
]
Population = Annotated[int | None, typer.Option(min=1, help="Of whom --cohort is drawn.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds, each with one release.")]
Delta = Annotated[float, typer.Option(help="Well below one over the number of people.")]
AccountantOption = Annotated[
    AccountantName,
    typer.Option(help="pld: tight; rdp: a cross-check; exact: where everyone takes part."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def epsilon(
    noise_multiplier: Annotated[
        float, typer.Option(min=0.0, help="The noise on the sum over the clipping norm.")
    ],
    rounds: Rounds,
    delta: Delta,
    sampling_probability: Probability = None,
    cohort: Cohort = None,
    population: Population = None,
    accountant: AccountantOption = AccountantName.pld,
    as_json: AsJson = False,
) -> None:
    """Print the epsilon of a number of noisy rounds.

    A cohort of a fixed size protects the replacing of a person's data: the sum then moves by twice
    the clipping norm, which is counted here, and only rdp can account for it. In JSON an epsilon
    that is null has no bound.

    Examples:

        fedlora privacy epsilon --sampling-probability 0.01 --noise-multiplier 1 --rounds 1000 --delta 1e-5

        fedlora privacy epsilon --cohort 100 --population 1000 --noise-multiplier 2 --rounds 100 --delta 1e-5 --json
    """  # noqa: E501 - a command that can be copied
    one = _event(noise_multiplier, sampling_probability, cohort, population)
    events = [replace(one, count=rounds)]
    found = epsilon_of(events, delta, accountant.value)
    result = _guarantee(events, found, delta, accountant.value) | {
        "rounds": rounds,
        "noise_multiplier": noise_multiplier,
        **_sampling(one),
    }
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    typer.echo(f"{_words(result)}, after {rounds:,} rounds")
    _explain(result)


@app.command("calibrate")
def calibrate_(
    epsilon: Annotated[float, typer.Option(help="What all rounds together may cost.")],
    rounds: Rounds,
    delta: Delta,
    sampling_probability: Probability = None,
    cohort: Cohort = None,
    population: Population = None,
    accountant: AccountantOption = AccountantName.pld,
    as_json: AsJson = False,
) -> None:
    """Print the least noise multiplier that keeps epsilon; it never costs more.

    Examples:

        fedlora privacy calibrate --epsilon 8 --sampling-probability 0.01 --rounds 200 --delta 1e-5
    """

    def event(multiplier: float) -> PrivacyEvent:
        return _event(multiplier, sampling_probability, cohort, population)

    multiplier = calibrate(epsilon, delta, rounds, event, accountant.value)
    events = [replace(event(multiplier), count=rounds)]
    reached = epsilon_of(events, delta, accountant.value)
    result = {
        "noise_multiplier": multiplier,
        **_guarantee(events, reached, delta, accountant.value),
        "rounds": rounds,
        **_sampling(events[0]),
    }
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    # Rounded up: with less noise than was found the promise would not hold.
    typer.echo(f"noise multiplier {math.ceil(multiplier * 1e5) / 1e5:.5f}")
    typer.echo(f"{_words(result)}, after {rounds:,} rounds")
    _explain(result)


@app.command()
def ledger(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    delta: Annotated[
        float | None, typer.Option(help="Another delta than the run's own [privacy] has.")
    ] = None,
    accountant: Annotated[
        AccountantName | None, typer.Option(help="Another accountant than the run's own.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print what a run has released so far, and the epsilon of it.

    Examples:

        fedlora privacy ledger runs/keyboard-private
    """
    config = _settings(run)
    if delta is None:
        delta = config.delta if config else None
    if delta is None:
        raise ConfigError(f"--delta: {run} has no [privacy] to take it from; set it")
    name = accountant.value if accountant else config.accountant if config else "pld"
    found = Ledger.read(run)
    if not found.path.exists():
        raise RunError(
            f"{found.path}: expected the ledger of a run with [privacy], found none; a run without "
            "it gives no guarantee"
        )
    events = found.events()
    result = _guarantee(events, found.spent(delta, name), delta, name) | {
        "rounds": found.lines[-1].round if found.lines else 0,
        "releases": len(found.lines),
        "events": [asdict(event) for event in events],
        "mechanisms": sorted({line.mechanism for line in found.lines}),
        "clipping_norm": found.lines[-1].clipping_norm if found.lines else None,
        "notes": sorted({note for line in found.lines for note in line.notes}),
    }
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    table = Table(title=f"{run / LEDGER}: {len(found.lines):,} releases")
    for title in ("rounds", "sampling", "probability", "noise multiplier"):
        table.add_column(title, justify="right", no_wrap=True)
    for event in events:
        share = _sampling(event)["sampling_probability"]
        table.add_row(
            f"{event.count:,}", event.sampling, f"{share:.6g}", f"{event.noise_multiplier:.5g}"
        )
    Console().print(table)
    typer.echo(f"{_words(result)}, after round {result['rounds']:,}")
    _explain(result)
    for note in result["notes"]:
        typer.echo(f"note: {note}")


def _event(
    multiplier: float, probability: float | None, cohort: int | None, population: int | None
) -> PrivacyEvent:
    """Return the event of one round, or raise `ConfigError` for options that do not fit."""
    if (cohort is None) != (population is None):
        raise ConfigError(
            "--cohort: expected --population beside it, found only one of them; set both"
        )
    if (probability is None) == (cohort is None):
        found = "neither" if probability is None else "both"
        raise ConfigError(
            "--sampling-probability: expected either it, or --cohort and --population, found "
            f"{found}"
        )
    if cohort is not None and population is not None:
        if cohort > population:
            raise ConfigError(
                f"--cohort: expected at most the population of {population}, found {cohort}"
            )
        return PrivacyEvent(multiplier, "fixed", cohort / population, cohort, population)
    if probability == 1:
        return PrivacyEvent(multiplier, "all")
    return PrivacyEvent(multiplier, "poisson", probability or 0.0)


def _sampling(event: PrivacyEvent) -> dict[str, Any]:
    fields = asdict(event)
    del fields["noise_multiplier"], fields["count"]
    return fields


def _guarantee(
    events: Sequence[PrivacyEvent], found: float, delta: float, name: str
) -> dict[str, Any]:
    return {
        "epsilon": found if math.isfinite(found) else None,
        "delta": delta,
        "accountant": accountant_used(events, name),
        "neighboring_relation": neighboring_relation(events),
        "unit": UNIT,
    }


def _words(result: dict[str, Any]) -> str:
    if result["epsilon"] is None:
        return f"no bound on epsilon at delta {result['delta']:g}"
    return f"epsilon {rounded_up(result['epsilon'], 4):.4f} at delta {result['delta']:g}"


def _explain(result: dict[str, Any]) -> None:
    relation = result["neighboring_relation"]
    typer.echo(f"unit: {result['unit']}, {relation} ({_NEIGHBORS[relation]})")
    typer.echo(f"accountant: {result['accountant']}")


def _settings(run: Path) -> PrivacyConfig | None:
    """Return the run's own [privacy], None where there is no experiment or no such table."""
    path = run / "experiment.toml"
    return ExperimentConfig.from_toml(path).privacy if path.is_file() else None
