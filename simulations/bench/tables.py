"""The results as Markdown: what each side took, and how many times longer the baselines take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

__all__ = ["ratio_table", "scale_table", "spread", "table", "time_table"]

Result = dict[str, Any]
MEGABYTE = 1 << 20
NAMES = {
    "peft": "PEFT, one client after another",
    "flower": "Flower's Ray simulation with PEFT",
    "sequential": "fedlora, plain engine",
    "cohort": "fedlora, cohort engine through messages",
    "engine": "fedlora, cohort engine alone",
}
# (what it shows, the side that takes longer, ours, which time)
RATIOS = (
    ("Flower / cohort, wall", "flower", "cohort", "wall"),
    ("Flower / cohort, CPU", "flower", "cohort", "cpu"),
    ("Flower / engine alone, wall", "flower", "engine", "wall"),
    ("Flower / engine alone, CPU", "flower", "engine", "cpu"),
    ("PEFT / engine alone, wall", "peft", "engine", "wall"),
    ("PEFT / engine alone, CPU", "peft", "engine", "cpu"),
    ("plain / cohort, wall", "sequential", "cohort", "wall"),
    ("plain / cohort, CPU", "sequential", "cohort", "cpu"),
)


def time_table(results: Iterable[Result]) -> str:
    """Every side of every case: medians, lowest to highest in brackets.

    Beside other work a side gets a part of its cores only: then its share of the peak by CPU time
    is the one to read.
    """
    rows = []
    for result in results:
        for name, side in result["sides"].items():
            wall = median(side["wall"])
            gflops = result["work"]["products"] / wall / 1e9
            per_cpu = result["work"]["products"] / median(side["cpu"]) / 1e9
            peak = result["peak_gflops_one_thread"] * side["threads"]
            rows.append(
                (
                    result["case"],
                    NAMES[name],
                    str(side["threads"]),
                    spread(side["wall"]),
                    spread(side["cpu"]),
                    f"{result['client_steps'] / wall:,.0f}",
                    f"{result['client_steps'] / median(side['cpu']):,.0f}",
                    f"{gflops:.1f}",
                    f"{gflops / peak:.0%}",
                    f"{per_cpu / result['peak_gflops_one_thread']:.0%}",
                )
            )
    header = (
        "case", "side", "threads", "wall s", "CPU s", "client steps / s",
        "client steps / CPU s", "GFLOP/s", "of the threads' peak", "of the peak, by CPU time",
    )  # fmt: skip
    return table(header, rows)


def ratio_table(results: Iterable[Result]) -> str:
    """How many times as long a baseline takes, repetition by repetition; "–" without a side."""
    results = list(results)
    shown = [
        ratio
        for ratio in RATIOS
        if any(ratio[1] in r["sides"] and ratio[2] in r["sides"] for r in results)
    ]
    rows = []
    for result in results:
        cells = [result["case"]]
        for _, theirs, ours, kind in shown:
            sides = result["sides"]
            if theirs in sides and ours in sides:
                pairs = zip(sides[theirs][kind], sides[ours][kind], strict=True)
                cells.append(spread([a / b for a, b in pairs]))
            else:
                cells.append("–")
        differences = result["largest_difference_from_peft"].values()
        cells.append(f"{max(differences, default=0.0):.1e}")
        cells.append(f"{result['other_cores']:.1f}")
        rows.append(cells)
    header = ("case", *(name for name, *_ in shown), "largest difference", "cores of others")
    return table(header, rows)


def scale_table(results: Iterable[Result]) -> str:
    """What `simulations.bench.scale` measured, a row a size; the last round counts."""
    rows = []
    for result in results:
        clients, cpu, wall = result["clients"], result["cpu"][-1], result["wall"][-1]
        first = result["cpu"][0] - cpu if len(result["cpu"]) > 1 else 0.0
        rows.append(
            (
                result["side"],
                f"{clients:,}",
                f"{wall:.2f}",
                f"{cpu:.2f}",
                f"{cpu / clients * 1e6:.0f}",
                f"{clients / cpu:,.0f}",
                f"{first / clients * 1e6:.0f}",
                f"{result['rss_before'] / MEGABYTE:.0f}",
                f"{result['rss_peak'] / MEGABYTE:.0f}",
                f"{(result['rss_peak'] - result['rss_before']) / MEGABYTE:.0f}",
            )
        )
    header = (
        "side", "clients", "wall s", "CPU s", "CPU µs a client", "clients / CPU s",
        "first round's extra µs a client", "RSS before, MB", "peak RSS, MB", "more, MB",
    )  # fmt: skip
    return table(header, rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def spread(values: Sequence[float]) -> str:
    """Return the median with the lowest and the highest, three digits each.

    >>> spread([2.0, 4.0, 3.0])
    '3.00 (2.00–4.00)'
    """
    return f"{_digits(median(values))} ({_digits(min(values))}–{_digits(max(values))})"


def _digits(value: float) -> str:
    if value >= 10:
        return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"
