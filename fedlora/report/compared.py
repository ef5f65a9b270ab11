"""The report of a comparison: methods over seeds, and over a grid where there is one."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.report.blocks import Block, Cell, Code, Notes, Plot, Report, Section, Table, Words
from fedlora.report.drawing import INK, SERIES
from fedlora.report.folder import ComparisonFolder, Row
from fedlora.report.words import amount, count, measure_label, one_line, short

__all__ = ["comparison_report"]

ADAPTERS = ("base", "own", "global", "personal")
COMPARED = ("global", "personal")
LABEL = 30  # letters of a grid point beside a plot

# label, mean, low, high, color; low and high are None with one run
Bar = tuple[str, float, float | None, float | None, str]


def comparison_report(found: ComparisonFolder) -> Report:
    """Return results, paired tests and costs of a finished comparison."""
    numbers = found.numbers
    plan = numbers["plan"]
    points = _points(plan["points"])
    task = plan["experiment"].get("data", {}).get("task", "")
    label = measure_label(numbers["metric"], task)
    sections = [
        Section("summary", "In words", _summary(numbers, points)),
        Section("methods", "Methods compared", _results(numbers, points, label)),
        Section("against", f"Against {one_line(plan['against'])}", _tests(numbers, points, label)),
        Section("costs", "Bytes and time", (_costs(numbers, points),)),
        _again(found),
    ]
    if numbers["tuning"]:
        sections.insert(3, Section("tuning", "Learning rates", (_tuned(numbers, points),)))
    name = one_line(plan["experiment"].get("name", "comparison"))
    methods = ", ".join(map(one_line, plan["methods"]))
    return Report(f"{name}: methods compared", methods, tuple(s for s in sections if s.blocks))


def _points(points: Sequence[Row]) -> list[str]:
    """Return a short name for each grid point: its keys that differ, or its number."""
    if len(points) == 1:
        return [""]
    keys = dict.fromkeys(key for point in points for key in point)
    differ = [key for key in keys if len({str(point.get(key)) for point in points}) > 1]
    names = []
    for number, point in enumerate(points, start=1):
        words = ", ".join(f"{k.rpartition('.')[2]} {point[k]}" for k in differ if k in point)
        names.append(one_line(words) if 0 < len(words) <= LABEL else f"point {number}")
    return names


def _summary(numbers: Row, points: Sequence[str]) -> tuple[Block, ...]:
    plan = numbers["plan"]
    metric, higher = numbers["metric"], numbers["higher_is_better"]
    runs, done = len(numbers["runs"]), sum(r["status"] == "done" for r in numbers["runs"])
    text = (
        f"{count(len(plan['methods']), 'method')} over {count(len(plan['seeds']), 'seed')}"
        + (f" and {len(points)} points of a grid" if len(points) > 1 else "")
        + f": {done} of {count(runs, 'run')} came to their end. The measure is {metric}; "
        f"{'higher' if higher else 'lower'} is better. Intervals are 95 % over seeds."
    )
    verdicts = []
    for found in numbers["differences"]:
        pair = found["over_seeds"]
        if pair is None:
            continue
        where = f" at {points[found['point']]}" if points[found["point"]] else ""
        span = ""
        if pair["low"] is not None:
            span = f" [{pair['low']:+.4f}, {pair['high']:+.4f}]"
        verdicts.append(
            f"{one_line(found['method'])}, {found['adapter']}{where}: {found['verdict']} "
            f"({pair['mean']:+.4f}{span}, positive is better)"
        )
    blocks: list[Block] = [Words(text)]
    if len(points) > 1:
        rows = [
            (name, ", ".join(f"{key} = {value}" for key, value in point.items()))
            for name, point in zip(points, plan["points"], strict=True)
        ]
        blocks.append(Table(("point", "what is set"), tuple(rows), "The grid."))
    if 0 < len(verdicts) <= 12:
        blocks += [Words(f"Against {one_line(plan['against'])}:"), Notes(tuple(verdicts))]
    if failures := [one_line(line) for cell in numbers["cells"] for line in cell["failures"]]:
        blocks += [Words("Runs that are in no mean:"), Notes(tuple(failures[:20]))]
    return tuple(blocks)


def _results(numbers: Row, points: Sequence[str], label: str) -> tuple[Block, ...]:
    cells = numbers["cells"]
    names = [n for n in ADAPTERS if any(n in cell["adapters"] for cell in cells)]
    colors = _colors(numbers)
    head = ["point"] if len(points) > 1 else []
    head += ["method"]
    head += names
    rows: list[tuple[Cell, ...]] = []
    for cell in cells:
        row: list[Cell] = [points[cell["point"]]] if len(points) > 1 else []
        row.append(one_line(cell["method"]))
        for name in names:
            row.append(_mean(cell["adapters"].get(name)))
        rows.append((*row, f"{cell['done']} of {cell['runs']}"))
    words = (
        f"{label[:1].upper()}{label[1:]}: mean over clients, then over seeds, ± half of the 95 % "
        "interval over seeds."
    )
    table = Table((*head, "runs done"), tuple(rows), words)
    plots: list[Block] = [table]
    for name in (n for n in COMPARED if n in names):
        bars: list[Bar] = []
        for cell in cells:
            if name not in cell["adapters"]:
                continue
            found = cell["adapters"][name]["metric"]
            text = _where(points[cell["point"]], cell["method"])
            color = colors[cell["method"]]
            bars.append((text, found["mean"], found["low"], found["high"], color))
        if bars:
            caption = "Mean over clients, then over seeds, with its 95 % interval over seeds."
            plots.append(_bars(f"The {name} adapter", caption, bars, label, zero=False))
    return tuple(plots)


def _tests(numbers: Row, points: Sequence[str], label: str) -> tuple[Block, ...]:
    colors = _colors(numbers)
    blocks: list[Block] = []
    rows: list[tuple[Cell, ...]] = []
    for adapter in COMPARED:
        bars: list[Bar] = []
        for found in numbers["differences"]:
            pair = found["over_seeds"]
            if found["adapter"] != adapter or pair is None:
                continue
            text = _where(points[found["point"]], found["method"])
            bars.append((text, pair["mean"], pair["low"], pair["high"], colors[found["method"]]))
            rows.append(
                (text, adapter, pair["mean"], pair["low"], pair["high"], pair["effect_size"],
                 found["verdict"])
            )  # fmt: skip
        if bars:
            caption = (
                f"Paired differences of the {adapter} adapter over seeds, 95 % interval; right of "
                "0 is better than the reference. An interval across 0 is no evidence."
            )
            axis = f"gain in {label}"
            blocks.append(_bars(f"Paired, {adapter}", caption, bars, axis, zero=True))
    if rows:
        head = ("method", "adapter", "over seeds", "low", "high", "effect size", "verdict")
        words = (
            "Intervals are not adjusted for their number: were there no difference at all, "
            f"{len(rows) / 20:g} of {len(rows)} would leave out 0 by chance."
        )
        blocks.append(Table(head, tuple(rows), words))
    return tuple(blocks)


def _bars(title: str, caption: str, bars: Sequence[Bar], label: str, *, zero: bool) -> Plot:
    rows = [(text, mean, low, high) for text, mean, low, high, _ in bars]
    table = Table(("method", "mean", "low", "high"), tuple(rows))

    def draw(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        for place, (_, mean, low, high, color) in enumerate(bars):
            reach = None
            if low is not None and high is not None:
                reach = [[mean - low], [high - mean]]
            axes.errorbar([mean], [place], xerr=reach, fmt="o", color=color, capsize=3)
        axes.set_yticks(range(len(bars)), [short(bar[0], 34) for bar in bars], fontsize=9)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_xlabel(label)
        if zero:
            axes.axvline(0, color=INK, lw=0.9)

    return Plot(title, caption, table, draw, height=max(2.2, 1.0 + 0.24 * len(bars)))


def _costs(numbers: Row, points: Sequence[str]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for cell in numbers["cells"]:
        text = _where(points[cell["point"]], cell["method"])
        rows.append(
            (text, amount(cell["bytes_up"]), amount(cell["bytes_down"]), cell["seconds"],
             cell["dropped"], cell["left_out"])
        )  # fmt: skip
    head = (
        "method",
        "from clients",
        "to clients",
        "seconds",
        "dropped",
        "clients diverged",
    )
    return Table(head, tuple(rows), "Bytes and seconds of one run, mean over seeds.")


def _tuned(numbers: Row, points: Sequence[str]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for found in numbers["tuning"]:
        tried = ", ".join(
            f"{one['learning_rate']:g}: "
            + ("diverged" if one["score"] is None else f"{one['score']:.4f}")
            for one in found["tried"]
        )
        edge = "yes" if found["at_edge"] else "no"
        text = _where(points[found["point"]], found["method"])
        rows.append((text, f"{found['learning_rate']:g}", tried, edge))
    head = ("method", "chosen", f"tried: {numbers['metric']} on validation parts", "at the edge")
    return Table(head, tuple(rows))


def _again(found: ComparisonFolder) -> Section:
    plan = shlex.quote(str(found.path / "plan.json"))
    command = f"mkdir -p runs/again && cp {plan} runs/again/ && fedlora compare --resume runs/again"
    numbers = found.numbers
    rows: list[tuple[Cell, ...]] = [
        ("folder", one_line(found.path)),
        ("fedlora", one_line(numbers["fedlora_version"])),
        ("seeds", ", ".join(map(str, numbers["plan"]["seeds"]))),
    ]
    rows += [(one_line(key), one_line(value)) for key, value in numbers["plan"]["settings"].items()]
    blocks: list[Block] = [
        Table(("of this comparison", ""), tuple(rows)),
        Code(command, "The same plan in a new folder:"),
    ]
    for number, one in enumerate(numbers["experiments"][:1]):
        text = "\n".join(_flat(one["resolved"]))
        words = f"The resolved experiment of {one_line(one['method'])}, point {number + 1}:"
        blocks.append(Code(text, words))
    return Section("again", "Make it again", tuple(blocks))


def _flat(table: Mapping[str, Any], above: str = "") -> list[str]:
    lines = []
    for key, value in table.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{above}{key}.")
        else:
            lines.append(f"{above}{key} = {value!r}")
    return lines


def _where(point: str, method: str) -> str:
    return f"{one_line(method)} · {point}" if point else one_line(method)


def _mean(found: Row | None) -> str:
    if found is None:
        return "no run"
    mean, high = found["metric"]["mean"], found["metric"]["high"]
    return f"{mean:.4f}" if high is None else f"{mean:.4f} ± {high - mean:.4f}"


def _colors(numbers: Row) -> dict[str, str]:
    return {method: SERIES[i % len(SERIES)] for i, method in enumerate(numbers["plan"]["methods"])}
