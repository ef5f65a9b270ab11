"""`fedlora privacy audit`: what attacks find in a run, beside what its ledger promises."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fedlora.errors import RunError
from fedlora.experiment import ExperimentConfig
from fedlora.privacy.threats import Facts, threats

__all__ = ["audit"]


def audit(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    inversion: Annotated[
        bool,
        typer.Option(
            "--inversion/--no-inversion",
            help="Also rebuild inputs from a single update; needs the run's base, data and torch.",
        ),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print audit.json.")] = False,
) -> None:
    """Attack a finished run: look for its canaries, and rebuild inputs from one client's update.

    The first needs [privacy] canaries = K in the run's experiment: K invented clients who take part
    like everyone, which costs utility. Its epsilon is an estimate, no bound. The second shows what
    a server sees without secure aggregation. The result is also in audit.json of the run's folder.

    Examples:

        fedlora simulate keyboard-private --set privacy.canaries=50 --out runs/audited

        fedlora privacy audit runs/audited
    """
    from fedlora.federation.audit import audit_canaries, save_audit
    from fedlora.federation.checkpoint import has_checkpoint, read_checkpoint
    from fedlora.federation.folder import EXPERIMENT
    from fedlora.privacy.ledger import Ledger

    if not (run / EXPERIMENT).is_file() or not has_checkpoint(run):
        raise RunError(f"{run}: expected the folder of a run that has begun, found none")
    config, checkpoint = ExperimentConfig.from_toml(run / EXPERIMENT), read_checkpoint(run)
    privacy = config.privacy
    found: dict[str, Any] = {"canaries": audit_canaries(run), "inversion": None}
    if inversion:
        from fedlora.simulation.inversion import audit_inversion

        found["inversion"] = audit_inversion(config, checkpoint)
    method = config.federation.build_method()
    rounds = range(1, max(2, config.federation.rounds) + 1)
    facts = Facts(
        uploaded=frozenset().union(*map(method.uploaded, rounds)),
        kept=frozenset().union(*map(method.kept, rounds)),
        mechanism=None if privacy is None else privacy.mechanism,
        epsilon=None
        if privacy is None
        else Ledger.read(run).spent(privacy.delta, privacy.accountant),
        delta=None if privacy is None else privacy.delta,
        secure_aggregation=config.secure_aggregation is not None,
        personalized=config.personalization.steps > 0,
    )
    found["threats"] = [asdict(threat) for threat in threats(facts)]
    save_audit(run, found)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    canaries = found["canaries"]
    typer.echo(
        "canaries: "
        + (
            canaries["words"]
            if canaries
            else "this run has none; run it again with [privacy] canaries = K"
        )
    )
    if found["inversion"] is not None:
        typer.echo(f"\ninversion: {found['inversion']['words']}")
        for line in _lines(found["inversion"]["rows"]):
            typer.echo(f"  {line}")
    for threat in threats(facts):
        typer.echo(f"\n{threat.who}")
        for sentence in threat.learns:
            typer.echo(f"  + {sentence}")
        for sentence in threat.does_not:
            typer.echo(f"  - {sentence}")
    typer.echo("\n+ could learn, - could not")


def _lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each stage, factors and batch: cosines as sent, noised, and by chance."""
    yield "best cosine with a true input; everything is in audit.json"
    places = dict.fromkeys((r["stage"], tuple(r["uploaded"]), r["examples"]) for r in rows)
    for stage, uploaded, examples in places:
        here = [
            row
            for row in rows
            if (row["stage"], tuple(row["uploaded"]), row["examples"])
            == (stage, uploaded, examples)
        ]
        cells = [
            f"{row['step']}{' noised' * row['noised']} {row['cosine']:.3f}"
            for row in sorted(here, key=lambda row: bool(row["noised"]))
        ]
        batch = f"{examples} example{'s' * (examples > 1)}"
        yield (
            f"{stage}, {'+'.join(uploaded)}, {batch}: {', '.join(cells)}, "
            f"by chance {here[0]['chance']:.3f}"
        )
