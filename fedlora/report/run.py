"""The report of one run: its sections in their order, and the summary in words."""

from __future__ import annotations

import shlex
from pathlib import Path

from fedlora.errors import RunError
from fedlora.metrics import gain
from fedlora.report.blocks import Block, Cell, Code, Notes, Report, Section, Table, Words
from fedlora.report.compared import comparison_report
from fedlora.report.costs import costs_section
from fedlora.report.folder import ComparisonFolder, RunFolder, read_run
from fedlora.report.guarantee import ledger_plots, privacy_section, privacy_words
from fedlora.report.losses import losses_section
from fedlora.report.people import clients_section, cross_section, results_table, scored_rows
from fedlora.report.rounds import rounds_section
from fedlora.report.words import amount, count, duration, interval, one_line, signed

__all__ = ["build_report"]


def build_report(folder: str | Path) -> Report:
    """Read a run's or a comparison's folder and return its report.

    Raises `RunError` for a folder that is neither, or whose files another program has written.
    """
    found = read_run(Path(folder))
    try:
        if isinstance(found, ComparisonFolder):
            return comparison_report(found)
        return _run_report(found)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RunError(
            f"{folder}: its files are not those of a run of this version: {error!r}"
        ) from None


def _run_report(run: RunFolder) -> Report:
    name = one_line(run.experiment["name"])
    method = run.experiment.get("federation", {}).get("method", "fedit")
    metric, higher = _metric(run)
    sections = [
        Section("summary", "In words", _summary(run)),
        clients_section(run, metric, higher),
        rounds_section(run, ledger_plots(run)),
        cross_section(run, metric, higher),
        costs_section(run),
        privacy_section(run),
        losses_section(run),
        _again(run),
    ]
    subtitle = f"{one_line(method)} on {one_line(run.experiment['data']['id'])}"
    return Report(f"{name}: report of a run", subtitle, tuple(s for s in sections if s is not None))


def _metric(run: RunFolder) -> tuple[str, bool]:
    if run.summary is not None:
        return run.summary["metric"], run.summary["higher_is_better"]
    scored = scored_rows(run)
    by_accuracy = bool(scored) and "accuracy" in scored[0]["scores"]["base"]
    return ("accuracy", True) if by_accuracy else ("loss", False)


def _summary(run: RunFolder) -> tuple[Block, ...]:
    federation, data = run.experiment.get("federation", {}), run.experiment["data"]
    done = len({record["round"] for record in run.rounds})
    trained = (
        f"{one_line(run.experiment['base']['id'])} stays frozen; "
        f"{count(done, 'round')} of {one_line(federation.get('method', 'fedit'))} trained one "
        f"global adapter of rank {run.experiment.get('lora', {}).get('rank', '?')} over "
        f"{one_line(data['id'])}, with cohorts of {federation.get('cohort', '?')}"
        + (" expected." if federation.get("sampling") == "poisson" else ".")
    )
    if run.summary is None:
        state = (
            f"This run is not done: {done} of {federation.get('rounds', '?')} rounds, "
            f"{len(run.clients)} clients evaluated. What follows is what its folder holds now."
        )
        return Words(state), Words(trained)
    found, extra = run.summary, run.summary["extra"]
    cost = (
        f"Clients sent {amount(found['bytes_up'])} and were sent {amount(found['bytes_down'])}; "
        f"the whole run took {duration(found['seconds'])}."
    )
    last: list[Block] = [Words(cost), Words(privacy_words(run))]
    if notes := extra.get("notes"):
        last += [Words("To be known beside it:"), Notes(tuple(map(one_line, notes)))]
    if found["global"] is None:
        nobody = "No client tells how well its adapters do: this run's messages hold no scores."
        return Words(trained), Words(nobody), *last
    metric = found["metric"]
    which = "higher" if found["higher_is_better"] else "lower"
    sentences = [
        f"{metric.capitalize()} ({which} is better), mean over {count(found['clients'], 'client')}:"
        f" base {found['base']['mean']:.4f}, trained alone {found['own']['mean']:.4f}, global "
        f"{found['global']['mean']:.4f}, personal {found['personal']['mean']:.4f}.",
        _gain_words("The global adapter", "the base", extra["gain_global_over_base"], metric),
        _gain_words(
            "The personal adapter", "the global one", extra["gain_personal_over_global"], metric
        )
        + f" It is the better one for {found['share_improved']:.1%} of the clients.",
    ]
    mine = [row["scores"] for row in scored_rows(run) if not row["held_out"]]
    if mine and {"own", "personal"} <= mine[0].keys():
        columns = [[scores[name][metric] for scores in mine] for name in ("own", "personal")]
        paired = gain(*columns, higher_is_better=found["higher_is_better"]).as_dict()
        sentences.append(
            _gain_words("The personal adapter", "what each has trained alone", paired, metric)
        )
    tail = ", ".join(
        f"{name} {found[name]['worst_tenth']:.4f}" for name in ("base", "own", "global", "personal")
    )
    sentences.append(f"The worst tenth of the clients: {tail}.")
    if held := found["held_out"]:
        sentences.append(
            f"{count(extra['held_out_clients'], 'client')} that never took part: base "
            f"{held['base']['mean']:.4f}, global {held['global']['mean']:.4f}, personal "
            f"{held['personal']['mean']:.4f}."
        )
    if (kept := extra.get("kept_global")) is not None:
        sentences.append(
            f"{kept} clients keep the global adapter, which did better on their validation part."
        )
    return Words(trained), Notes(tuple(sentences)), results_table(found), *last


def _gain_words(who: str, than: str, found: dict[str, float | None], metric: str) -> str:
    mean, low, high = found["mean"] or 0.0, found["low"], found["high"]
    if low is not None and high is not None and low <= 0 <= high:
        words = f"{who} and {than} cannot be told apart"
    else:
        words = f"{who} is {'better' if mean >= 0 else 'worse'} than {than}"
    return f"{words}: {signed(mean)} {metric} ({interval(found)})."


def _again(run: RunFolder) -> Section:
    experiment = shlex.quote(str(run.path / "experiment.toml"))
    command = f"fedlora simulate {experiment} --out runs/again"
    version = (run.summary or {}).get("fedlora_version", "not known before its end")
    rows: list[tuple[Cell, ...]] = [
        ("folder", one_line(run.path)),
        ("fedlora", one_line(version)),
        ("seed", one_line(run.experiment.get("seed", 0))),
        ("rounds", f"{len(round_numbers(run))} of {run.experiment['federation'].get('rounds')}"),
    ]
    words = (
        "As a simulation with the same seed; on devices, submit the same experiment to their "
        "federation."
    )
    if "privacy" in run.experiment:
        words += " Noise and private cohorts are never drawn from the seed: they will be others."
    blocks: list[Block] = [Table(("of this run", ""), tuple(rows)), Code(command, words)]
    if run.summary is None:
        blocks.append(Code(f"fedlora simulate --resume {shlex.quote(str(run.path))}", "Go on:"))
    blocks.append(Code(run.toml, "The resolved experiment (experiment.toml):"))
    return Section("again", "Make it again", tuple(blocks))


def round_numbers(run: RunFolder) -> set[int]:
    """Return the rounds that are done."""
    return {record["round"] for record in run.rounds if record.get("status") != "declined"}
