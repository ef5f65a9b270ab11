"""What each person gets: the results, their distribution over clients, gains, the cross matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedlora.metrics import gain
from fedlora.report.blocks import Block, Cell, Notes, Plot, Section, Table, Words
from fedlora.report.drawing import ADAPTER_COLORS, BAD, INK, MUTED, PAGE, SERIES, boxes
from fedlora.report.folder import Row, RunFolder
from fedlora.report.words import (
    count,
    interval,
    measure_label,
    measure_words,
    one_line,
    short,
    signed,
)

__all__ = ["clients_section", "cross_section", "results_table", "scored_rows"]

ADAPTERS = ("base", "own", "global", "personal")
DOTS = 400  # clients, up to which each is drawn by itself
NUMBERED = 16  # clients of the cross matrix, up to which their ids and values are written
GAINS = (
    ("global", "base", "What the federation gives: global over base"),
    ("personal", "global", "What personalizing gives: personal over global"),
    ("personal", "own", "What federating adds to training alone: personal over own"),
)


def scored_rows(run: RunFolder) -> list[Row]:
    """Return the rows of clients that have scores."""
    return [row for row in run.clients if "scores" in row]


def results_table(summary: Row) -> Table:
    """Return base, own, global and personal, over clients that took part and over those held out.

    Held out clients were never sampled: their rows say what the global adapter is to a stranger.
    """
    extra = summary["extra"]
    groups = [("", summary, extra["measures"])]
    if summary["held_out"]:
        groups.append(("held out, ", summary["held_out"], extra["held_out_measures"]))
    others = [name for name in extra["measures"]["base"] if name != summary["metric"]]
    rows: list[tuple[Cell, ...]] = []
    for words, found, measures in groups:
        for name in ADAPTERS:
            values = [found[name][key] for key in ("mean", "median", "worst_tenth")]
            rows.append((f"{words}{name}", *values, *(measures[name][other] for other in others)))
    metric = summary["metric"]
    head = ("adapter", f"{metric} mean", "median", "worst tenth", *map(measure_words, others))
    who = count(summary["clients"], "client")
    if summary["held_out"]:
        who += f", {extra['held_out_clients']} held out"
    return Table(head, tuple(rows), f"Means over clients, each counting once ({who}).")


def clients_section(run: RunFolder, metric: str, higher_is_better: bool) -> Section | None:
    """Return distribution and gains over clients; None while no client has been evaluated."""
    rows = scored_rows(run)
    if not rows:
        return None
    label = measure_label(metric, run.experiment.get("data", {}).get("task", ""))
    names = [name for name in ADAPTERS if name in rows[0]["scores"]]
    blocks: list[Block] = [_distribution(rows, names, metric, label, higher_is_better)]
    for after, before, title in GAINS:
        if after in names and before in names:
            blocks += _gains(rows, after, before, title, metric, label, higher_is_better)
    if run.experiment.keys() & {"privacy", "secure_aggregation"}:
        blocks.append(
            Words("These are a simulation's own figures of single clients: devices tell none.")
        )
    if failed := [row for row in run.clients if "failed" in row]:
        blocks.append(Words(f"{count(len(failed), 'client')} without results, in no mean:"))
        blocks.append(Notes(tuple(one_line(row["failed"]) for row in failed[:20])))
    return Section("clients", "What each person gets", tuple(blocks))


def worst_tenth(values: Sequence[float], higher_is_better: bool) -> set[int]:
    """Return the places of the ⌈n/10⌉ worst values."""
    order = sorted(range(len(values)), key=values.__getitem__, reverse=not higher_is_better)
    return set(order[: math.ceil(len(values) / 10)])


def _distribution(
    rows: Sequence[Row], names: Sequence[str], metric: str, label: str, higher: bool
) -> Plot:
    found = {name: [row["scores"][name][metric] for row in rows] for name in names}
    held = [bool(row["held_out"]) for row in rows]
    table = Table(
        ("client", "held out", *names),
        tuple(
            (one_line(row["client"]), "yes" if row["held_out"] else "no", *values)
            for row, *values in zip(rows, *found.values(), strict=True)
        ),
    )

    def draw(axes: Any) -> None:
        for place, name in enumerate(names):
            y = len(names) - 1 - place
            for is_held in (False, True):
                values = sorted(v for v, h in zip(found[name], held, strict=True) if h == is_held)
                if not values:
                    continue
                middle = y + (0.0 if not any(held) else -0.22 if is_held else 0.16)
                (_box if len(rows) > DOTS else _strip)(
                    axes, values, middle, ADAPTER_COLORS[name], higher, hollow=is_held
                )
        axes.set_yticks(range(len(names)), list(reversed(names)))
        axes.set_ylim(-0.55, len(names) - 0.45)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(label)
        _explain(axes, any(held), boxed=len(rows) > DOTS)

    below = " Below each: the held-out clients, which were never sampled." if any(held) else ""
    caption = (
        f"Each dot is a client's {metric} on its own held-out examples; "
        f"{'right' if higher else 'left'} is better.{below}"
    )
    if len(rows) > DOTS:
        caption = (
            f"Clients' {metric} on their own held-out examples as boxes: the middle half, whiskers "
            "to the best and the worst, the worst tenth by its mean; "
            f"{'right' if higher else 'left'} is better.{below}"
        )
    return Plot("Clients by adapter", caption, table, draw, height=3.9)


def _box(
    axes: Any, values: Sequence[float], middle: float, color: str, higher: bool, *, hollow: bool
) -> None:
    """Draw many clients: the middle half, all between the whiskers, the worst tenth's mean."""
    edge = {"color": color, "linestyle": "--" if hollow else "-"}
    axes.boxplot(
        [values], positions=[middle], orientation="horizontal", widths=0.25, whis=(0, 100),
        manage_ticks=False, showfliers=False, boxprops=edge, whiskerprops=edge, capprops=edge,
        medianprops={"color": INK},
    )  # fmt: skip
    tail = [values[i] for i in worst_tenth(values, higher)]
    axes.plot([sum(values) / len(values)], [middle], marker="^", ms=6.5, mfc=INK, mec=PAGE, ls="")
    axes.plot([sum(tail) / len(tail)], [middle], marker="D", ms=5, mfc=BAD, mec=BAD, ls="")


def _strip(
    axes: Any, values: Sequence[float], middle: float, color: str, higher: bool, *, hollow: bool
) -> None:
    worst = worst_tenth(values, higher)
    # Dots that would lie on one another are spread by the base-2 van der Corput sequence.
    places = [middle + 0.2 * (_van_der_corput(i + 1) - 0.5) for i in range(len(values))]
    rest = [i for i in range(len(values)) if i not in worst]
    face = "none" if hollow else color
    for chosen, edge, marker in ((rest, color, "o"), (sorted(worst), BAD, "D")):
        axes.plot(
            [values[i] for i in chosen], [places[i] for i in chosen], marker, ls="none",
            mec=edge, mfc=face if edge == color else ("none" if hollow else BAD), mew=0.8, ms=3.6,
        )  # fmt: skip
    ordered, half = sorted(values), len(values) // 2
    median = ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2
    axes.plot([median, median], [middle - 0.17, middle + 0.17], color=INK, lw=1.4)
    mean = sum(values) / len(values)
    axes.plot([mean], [middle], marker="^", ms=6.5, mfc=INK, mec=PAGE, mew=0.8, ls="none")


def _explain(axes: Any, any_held: bool, *, boxed: bool) -> None:
    """Give the marks their words; they are drawn with no data."""
    axes.plot([], [], marker="^", ls="none", mfc=INK, mec=INK, label="mean")
    axes.plot([], [], color=INK, lw=1.4, label="median")
    axes.plot([], [], marker="D", ls="none", mfc=BAD, mec=BAD, label="worst tenth")
    if any_held and boxed:
        axes.plot([], [], color=INK, ls="--", lw=1, label="held out")
    elif any_held:
        axes.plot([], [], marker="o", ls="none", mfc="none", mec=INK, label="held out")


def _gains(
    rows: Sequence[Row],
    after: str,
    before: str,
    title: str,
    metric: str,
    label: str,
    higher: bool,
) -> list[Block]:
    sign = 1.0 if higher else -1.0
    found = sorted(
        (
            (
                sign * (row["scores"][after][metric] - row["scores"][before][metric]),
                one_line(row["client"]),
                bool(row["held_out"]),
            )
            for row in rows
        ),
        key=lambda item: (-item[0], item[1]),
    )
    table = Table(
        ("client", "held out", f"gain in {metric}"),
        tuple((client, "yes" if held else "no", value) for value, client, held in found),
    )
    mine = [row["scores"] for row in rows if not row["held_out"]]
    between = None
    if mine:
        columns = [[scores[name][metric] for scores in mine] for name in (before, after)]
        between = gain(*columns, higher_is_better=higher).as_dict()

    def draw(axes: Any) -> None:
        if len(found) > DOTS:
            values = [value for value, _, _ in found]
            axes.plot(range(1, len(values) + 1), values, color=ADAPTER_COLORS[after])
        else:
            for is_held, words in ((False, "took part"), (True, "held out")):
                chosen = [i for i, item in enumerate(found) if item[2] == is_held]
                if not chosen:
                    continue
                colors = [ADAPTER_COLORS[after] if found[i][0] >= 0 else BAD for i in chosen]
                corners = [(i + 0.6, 0.0, i + 1.4, found[i][0]) for i in chosen]
                boxes(axes, corners, colors, label=words, sample=MUTED, filled=not is_held)
        if between is not None and between["low"] is not None:
            axes.axhspan(between["low"], between["high"], color=MUTED, alpha=0.25, lw=0, zorder=0.6)
        if between is not None:
            axes.axhline(between["mean"], color=INK, lw=1, ls="--")
        axes.axhline(0, color=INK, lw=0.8)
        _whole_numbers(axes, len(found))
        axes.set_ylabel(f"gain in {label}", fontsize=10)

    better = sum(value > 0 for value, _, held in found if not held)
    caption = f"{better} of {count(len(mine), 'client')} that took part are better off."
    if between is not None:
        mean = signed(between["mean"] or 0.0)
        caption += f" Mean {mean} ({interval(between)}, paired; dashed line and band)."
    return [Plot(title, caption, table, draw)]


def _whole_numbers(axes: Any, clients: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("clients, sorted by gain")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.set_xlim(0.3, clients + 0.7)


def cross_section(run: RunFolder, metric: str, higher_is_better: bool) -> Section | None:
    """Return everyone's own adapter on everyone's data; None where the run has none."""
    cross = (run.summary or {}).get("extra", {}).get("cross")
    if not cross:
        return None
    clients = [one_line(client) for client in cross["clients"]]
    values: list[list[float]] = cross["values"]
    table = Table(
        ("adapter of", *(f"on data of {client}" for client in clients)),
        tuple((client, *row) for client, row in zip(clients, values, strict=True)),
    )
    shades = _by_column(values, higher_is_better)
    written = len(clients) <= NUMBERED

    def draw(axes: Any) -> None:
        n = len(clients)
        places = [(i, j) for i in range(n) for j in range(n)]
        corners = [(j, i, j + 1, i + 1) for i, j in places]
        strengths = [0.05 + 0.5 * shades[i][j] for i, j in places]
        boxes(axes, corners, [SERIES[0]] * len(places), alphas=strengths)
        own = [(i, i, i + 1, i + 1) for i in range(n)]
        boxes(axes, own, [INK] * n, filled=False)
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if written:
                    text = axes.text(
                        j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center",
                        fontsize=min(10, 90 / n), fontweight="bold" if i == j else "normal",
                    )  # fmt: skip
                    text.set_in_layout(False)
        axes.set_xlim(0, n)
        axes.set_ylim(n, 0)
        axes.grid(visible=False)
        if written:
            ticks, names = [i + 0.5 for i in range(n)], [short(c, 12) for c in clients]
            axes.set_xticks(ticks, names, rotation=90, fontsize=8)
            axes.set_yticks(ticks, names, fontsize=8)
        axes.set_xlabel("on whose data" + ("" if written else " (number of the client)"))
        axes.set_ylabel("whose own adapter")

    caption = (
        f"{metric.capitalize()} of everyone's own adapter (row) on everyone's data (column). "
        "The stronger the colour, the better within a column; the framed diagonal is a person's "
        "own. Where own adapters win, what was learned is the person; where all of a column is "
        "alike, it is the domain."
    )
    words = (
        f"A person's own adapter is better than the mean of the others' on "
        f"{cross['own_beats_others']} of {count(len(clients), 'client')}."
    )
    plot = Plot("Everyone's adapter on everyone's data", caption, table, draw, 5.6, 5.2)
    return Section("cross", "Personal, or of the domain?", (Words(words), plot))


def _by_column(values: Sequence[Sequence[float]], higher_is_better: bool) -> list[list[float]]:
    """Return how good each value is within its column, 0 to 1."""
    sign = 1 if higher_is_better else -1
    n = len(values)
    found = [[0.0] * n for _ in range(n)]
    for j in range(n):
        column = [sign * row[j] for row in values]
        low, span = min(column), max(column) - min(column)
        for i in range(n):
            found[i][j] = (column[i] - low) / span if span else 0.5
    return found


def _van_der_corput(number: int) -> float:
    value, weight = 0.0, 0.5
    while number:
        value += weight * (number & 1)
        number, weight = number >> 1, weight / 2
    return value
