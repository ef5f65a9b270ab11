"""What happened round by round, as curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedlora.report.blocks import Block, Plot, Section, Table, Words
from fedlora.report.drawing import BAD, SERIES, boxes
from fedlora.report.folder import Row, RunFolder
from fedlora.report.words import count, measure_label

__all__ = ["bytes_plot", "phases_plot", "round_rows", "rounds_section"]

MARKED = 60  # rounds, up to which each has a marker
BARS = 60  # rounds, up to which phases are stacked bars

Series = tuple[str, Sequence[float | None], str]  # label, a value a round, color


def round_rows(run: RunFolder) -> list[dict[str, Any]]:
    """Return one row a round; what devices declined is added to the round that came of it.

    asked, counted, dropped, declined and late are numbers of clients or replies.
    """
    rows: dict[int, dict[str, Any]] = {}
    for record in run.rounds:
        lost, declined = record.get("dropped", ()), record.get("declined", ())
        row = rows.setdefault(
            record["round"],
            {"round": record["round"], "seconds": 0.0, "bytes_up": 0, "bytes_down": 0}
            | dict.fromkeys(("asked", "dropped", "declined", "late"), 0),
        )
        for key in ("seconds", "bytes_up", "bytes_down"):
            row[key] += record[key]
        row["asked"] += len(record["cohort"])
        row["dropped"] += len(lost) - len(declined)
        row["declined"] += len(declined)
        row["late"] += record.get("late", 0)
        row["counted"] = row["asked"] - row["dropped"] - row["declined"]
        row |= {key: record.get(key) for key in ("status", "loss")}
        row["noted"] = record.get("noted") or {}
        row["phases"] = _added(row.get("phases", {}), record.get("phases") or {})
        row["clients"] = record.get("clients") or {}
    return [rows[number] for number in sorted(rows)]


def rounds_section(run: RunFolder, ledger: Sequence[Plot]) -> Section:
    """Return the curves: loss, clients, seconds, bytes, and what the method notes; then `ledger`.

    ledger: what differential privacy cost so far, where there is any.
    """
    rows = round_rows(run)
    if not rows:
        return Section("rounds", "Rounds", (Words("No round is done yet."),))
    task = run.experiment.get("data", {}).get("task", "")
    blocks: list[Block] = []
    if any(row["loss"] is not None for row in rows):
        losses = [row["loss"] for row in rows]
        blocks.append(
            curve(
                "Training loss",
                "Mean over the clients of a round, by their weight, of the loss while they train; "
                "cohorts differ, so it goes up and down.",
                [("loss", losses, SERIES[0])],
                rows,
                measure_label("loss", task),
            )
        )
    else:
        private = run.experiment.keys() & {"privacy", "secure_aggregation"}
        why = "what is promised to people is that none leaves a device" if private else "none came"
        blocks.append(Words(f"No round has a training loss: {why}."))
    blocks += [_clients(rows), _seconds(rows), bytes_plot(rows), *ledger]
    for name in sorted({name for row in rows for name in row["noted"]}):
        values = [row["noted"].get(name) for row in rows]
        words = "What the method notes of each round, the largest over the layers."
        blocks.append(curve(f"Noted: {name}", words, [(name, values, SERIES[4])], rows, name))
    failed = [row["round"] for row in rows if row["status"] == "failed"]
    if failed:
        shown = ", ".join(map(str, failed[:20])) + (", …" if len(failed) > 20 else "")
        blocks.append(Words(f"{count(len(failed), 'round')} brought no update: {shown}."))
    return Section("rounds", "Rounds", tuple(blocks))


def curve(
    title: str,
    caption: str,
    series: Sequence[Series],
    rows: Sequence[Row],
    label: str,
    *,
    from_zero: bool = False,
    whole: bool = False,
) -> Plot:
    """Return a plot of values by round; None leaves a gap. whole: there are no parts of a value."""
    numbers = [row["round"] for row in rows]
    table = Table(
        ("round", *(name for name, _, _ in series)),
        tuple(zip(numbers, *(values for _, values, _ in series), strict=True)),
    )

    def draw(axes: Any) -> None:
        marker = "o" if len(numbers) <= MARKED else ""
        widths = [1.6] if len(series) == 1 else [3.4] + [1.4] * (len(series) - 1)
        for (name, values, color), width in zip(series, widths, strict=True):
            shown = [float("nan") if value is None else value for value in values]
            # The first is the widest: where all are equal, it is still seen.
            axes.plot(numbers, shown, marker=marker, color=color, label=name, lw=width)
        by_round(axes, numbers, whole=whole)
        axes.set_ylabel(label)
        if from_zero:
            every = (v for _, values, _ in series for v in values)
            # An epsilon without a bound is infinite, which no axis reaches.
            top = max((v for v in every if v is not None and math.isfinite(v)), default=0)
            axes.set_ylim(0, 1.08 * top or 1)

    return Plot(title, caption, table, draw)


def by_round(axes: Any, numbers: Sequence[int], *, whole: bool = False) -> None:
    """Make the horizontal axis that of whole rounds."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=whole))
    axes.set_xlim(numbers[0] - 0.6, numbers[-1] + 0.6)


def bytes_plot(rows: Sequence[Row]) -> Plot:
    """Return what all clients of a round sent and were sent, in MB."""
    series: list[Series] = [
        ("from clients", [row["bytes_up"] / 1e6 for row in rows], SERIES[0]),
        ("to clients", [row["bytes_down"] / 1e6 for row in rows], SERIES[1]),
    ]
    caption = "All messages of the round's training, both ways, layouts and settings included."
    return curve("Bytes", caption, series, rows, "MB (10⁶ bytes)", from_zero=True)


def phases_plot(rows: Sequence[Row]) -> Plot | None:
    """Return where the rounds' time went; None where a run of an older version does not say."""
    names = list(dict.fromkeys(name for row in rows for name in row["phases"]))
    if not names:
        return None
    numbers = [row["round"] for row in rows]
    values = [[row["phases"].get(name, 0.0) for row in rows] for name in names]
    table = Table(("round", *names), tuple(zip(numbers, *values, strict=True)))

    def draw(axes: Any) -> None:
        colors = [SERIES[i % len(SERIES)] for i in range(len(names))]
        if len(numbers) > BARS:
            axes.stackplot(numbers, *values, labels=names, colors=colors)
        else:
            below = [0.0] * len(numbers)
            for name, mine, color in zip(names, values, colors, strict=True):
                tops = [a + b for a, b in zip(below, mine, strict=True)]
                corners = [
                    (number - 0.4, low, number + 0.4, high)
                    for number, low, high in zip(numbers, below, tops, strict=True)
                ]
                boxes(axes, corners, [color] * len(numbers), label=name)
                below = tops
            axes.set_ylim(0, 1.08 * max(below) or 1)
        by_round(axes, numbers)
        axes.set_ylabel("time (s)")

    caption = (
        "Seconds by phase. wait is for replies, in a simulation the clients' training; save is the "
        "checkpoint of the round before."
    )
    return Plot("Where a round's time goes", caption, table, draw)


def _clients(rows: Sequence[Row]) -> Plot:
    series: list[Series] = [
        ("asked", [row["asked"] for row in rows], SERIES[3]),
        ("counted", [row["counted"] for row in rows], SERIES[0]),
    ]
    for name, color in (("dropped", BAD), ("declined", SERIES[1]), ("late", SERIES[4])):
        if any(row[name] for row in rows):
            series.append((name, [row[name] for row in rows], color))
    caption = (
        "Clients that were asked, and those whose reply counted; dropped: failed, late or refused; "
        "declined: their owners' conditions did not allow it."
    )
    return curve("Clients", caption, series, rows, "number of clients", from_zero=True, whole=True)


def _seconds(rows: Sequence[Row]) -> Plot:
    series: list[Series] = [("round", [row["seconds"] for row in rows], SERIES[0])]
    for name, color in (("slowest", SERIES[1]), ("median", SERIES[2])):
        if any(name in row["clients"] for row in rows):
            values = [row["clients"].get(name) for row in rows]
            series.append((f"{name} client", values, color))
    caption = "Wall time of each round, and the clients' own where they tell it."
    return curve("Seconds", caption, series, rows, "time (s)", from_zero=True)


def _added(first: Row, second: Row) -> dict[str, float]:
    return {key: first.get(key, 0.0) + second.get(key, 0.0) for key in {**first, **second}}
