"""What a run promises about people's data, what audits found, and who could learn what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from fedlora.errors import FedloraError
from fedlora.experiment import ExperimentConfig
from fedlora.privacy.accounting import rounded_up
from fedlora.privacy.threats import Facts, threats
from fedlora.report.blocks import Block, Cell, Notes, Plot, Section, Table, Words
from fedlora.report.drawing import SERIES
from fedlora.report.folder import Row, RunFolder
from fedlora.report.rounds import curve
from fedlora.report.words import one_line

__all__ = ["ledger_plots", "privacy_section", "privacy_words"]

WEAK = 10.0  # an epsilon from which e^epsilon, 22,000 and more, is no limit to speak of


def privacy_section(run: RunFolder) -> Section:
    """Return the guarantee, its parts, the audit, and what three kinds of attacker could learn."""
    privacy = (run.summary or {}).get("privacy")
    blocks: list[Block] = [Words(privacy_words(run))]
    if privacy:
        rows: list[tuple[Cell, ...]] = [
            (one_line(key).replace("_", " "), _value(value))
            for key, value in privacy.items()
            if key != "notes" and value is not None  # as "stopped" is of a run that was not
        ]
        blocks.append(Table(("part of the guarantee", "value"), tuple(rows)))
        if notes := privacy.get("notes"):
            blocks.append(Notes(tuple(map(one_line, notes))))
    blocks += _audit(run.audit)
    blocks += [Words("Who could learn what:"), Notes(tuple(_threats(run)))]
    return Section("privacy", "Privacy", tuple(blocks))


def privacy_words(run: RunFolder) -> str:
    """Return the guarantee in a sentence or two."""
    table = run.experiment.get("privacy")
    summed = "secure_aggregation" in run.experiment
    sum_words = (
        " Updates are added up under masks (secure aggregation): the server learns a cohort's sum "
        "and no update."
        if summed
        else ""
    )
    privacy = (run.summary or {}).get("privacy")
    if privacy and privacy.get("epsilon") is not None:
        stopped = ""
        if privacy.get("stopped"):
            stopped = f" The run was ended early by {one_line(privacy['stopped'])}."
        epsilon = rounded_up(privacy["epsilon"], 3)
        relation = one_line(privacy.get("neighboring_relation", ""))
        apart = (
            "with other data of one of them"
            if "replace" in relation
            else ("with or without one of them")
        )
        weak = ""
        if epsilon > WEAK:
            weak = " An epsilon of this size rules out little: what holds is what audits find."
        return (
            f"The global adapter is ({epsilon:.6g}, {privacy['delta']:g})-"
            f"differentially private for each {one_line(privacy.get('unit', 'user'))} "
            f"({relation}; {one_line(privacy.get('mechanism', 'central'))} noise): {apart}, "
            f"no outcome is more than e^{epsilon:.6g} times as likely, but for a "
            f"chance of {privacy['delta']:g}.{weak}{stopped}{sum_words}"
        )
    if table is not None and run.summary is None:
        return f"The run is not done: its guarantee is known at the end.{sum_words}"
    return (
        "This run gives no guarantee of differential privacy: its experiment has no [privacy]."
        f"{sum_words} Data stay on the devices, and what leaves them, low-rank factors, was "
        "computed from the data and can tell of them."
    )


def ledger_plots(run: RunFolder) -> list[Plot]:
    """Return what differential privacy changes from round to round: epsilon, the clipping norm.

    epsilon is in the rounds' lines, as of when they were done; the norm is in the ledger's.
    """
    plots = []
    for key, lines, title, label, words in (
        (
            "epsilon",
            (*run.ledger, *run.rounds),
            "Epsilon",
            "epsilon, for each person",
            "Spent from the start to the end of each round, at the run's delta.",
        ),
        (
            "clipping_norm",
            run.ledger,
            "Clipping norm",
            "L2 norm of an update",
            "The most that one client's whole update may move.",
        ),
    ):
        found: dict[int, float | None] = {
            line["round"]: line[key] for line in lines if line.get(key) is not None
        }
        if found and (key == "epsilon" or len(set(found.values())) > 1):
            rows: Sequence[Row] = [{"round": number} for number in sorted(found)]
            values = [found[row["round"]] for row in rows]
            plots.append(
                curve(title, words, [(key, values, SERIES[4])], rows, label, from_zero=True)
            )
    return plots


def _audit(audit: Row | None) -> list[Block]:
    """Return what `fedlora privacy audit` found: its words first, then its numbers."""
    if audit is None:
        return [Words("No audit of this run is in its folder: leakage was not measured.")]
    blocks: list[Block] = [
        Words("What attacks on this very run found (audit.json): estimates, no bounds.")
    ]
    plain: list[tuple[Cell, ...]] = []
    for key, value in audit.items():
        if not isinstance(value, dict | list):
            plain.append((one_line(key).replace("_", " "), _value(value)))
        elif isinstance(value, dict) and "words" in value:
            blocks.append(Words(f"{one_line(key).capitalize()}: {one_line(value['words'])}"))
            if rows := value.get("rows"):
                head = tuple(one_line(name).replace("_", " ") for name in rows[0])
                cells = tuple(tuple(_value(row[name]) for name in rows[0]) for row in rows)
                blocks.append(Table(head, cells))
    return [*blocks, Table(("audit", "value"), tuple(plain))] if plain else blocks


def _threats(run: RunFolder) -> list[str]:
    """Say what an honest but curious server, another client, and a thief could learn."""
    if run.audit is not None and "threats" in run.audit:
        return [_threat(found) for found in run.audit["threats"]]
    try:
        facts = _facts(run)
    except FedloraError as error:
        return [f"Not known: the experiment is of another version ({one_line(error)})."]
    return [_threat(asdict(found)) for found in threats(facts)]


def _threat(found: Row) -> str:
    who = one_line(found["who"]).capitalize()
    learns, does_not = (" ".join(map(one_line, found[key])) for key in ("learns", "does_not"))
    return f"{who}. It could learn: {learns} It could not: {does_not}"


def _facts(run: RunFolder) -> Facts:
    """Return what of a run decides who learns what."""
    config = ExperimentConfig.from_table(run.experiment)
    method, rounds = config.federation.build_method(), range(1, config.federation.rounds + 1)
    uploaded: set[str] = set().union(*map(method.uploaded, rounds))
    kept: set[str] = set().union(*map(method.kept, rounds))
    privacy = (run.summary or {}).get("privacy") or {}
    return Facts(
        uploaded=uploaded,
        kept=kept,
        mechanism=None if config.privacy is None else config.privacy.mechanism,
        epsilon=privacy.get("epsilon"),
        delta=None if config.privacy is None else config.privacy.delta,
        secure_aggregation=config.secure_aggregation is not None,
        personalized=config.personalization.steps > 0,
    )


def _value(value: object) -> Cell:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    return one_line(value if isinstance(value, str) else json.dumps(value))[:400]
