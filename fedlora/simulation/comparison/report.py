"""A comparison as tables of text, for the terminal and for comparison.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedlora.metrics import Interval
from fedlora.report.words import amount
from fedlora.simulation.comparison.plan import Plan, show_overrides
from fedlora.simulation.comparison.statistics import ADAPTERS, Cell, Difference, Paired
from fedlora.simulation.comparison.tuning import Tuned

__all__ = ["Table", "markdown", "tables"]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under a head; `notes` are lines below it."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def tables(
    plan: Plan,
    cells: Sequence[Cell],
    differences: Sequence[Difference],
    tuned: Sequence[Tuned],
    metric: str,
) -> list[Table]:
    """Return the results, costs, paired tests, and learning rates where they were tuned."""
    found = [_results(plan, cells, tuned, metric), _costs(plan, cells)]
    if differences:
        found.append(_tests(plan, differences, metric))
    if tuned:
        found.append(_rates(plan, tuned, metric))
    return found


def markdown(plan: Plan, found: Iterable[Table]) -> str:
    """Return the tables as a Markdown page."""
    lines = [f"# {plan.experiment.get('name', 'comparison')}: {', '.join(plan.methods)}", ""]
    if plan.settings:
        lines += [f"Changed for all runs: {show_overrides(plan.settings)}.", ""]
    for table in found:
        lines += [f"## {table.title}", ""]
        lines.append("| " + " | ".join(map(_escaped, table.head)) + " |")
        lines.append("|" + "---|" * len(table.head))
        lines += ["| " + " | ".join(map(_escaped, row)) + " |" for row in table.rows]
        lines += ["", *(f"- {note}" for note in table.notes), ""]
    return "\n".join(lines)


def _results(plan: Plan, cells: Sequence[Cell], tuned: Sequence[Tuned], metric: str) -> Table:
    names = [name for name in ADAPTERS if any(name in cell.adapters for cell in cells)]
    rates = {(found.point, found.method): f"{found.learning_rate:g}" for found in tuned}
    rows = []
    for cell in cells:
        row = [*_where(plan, cell.point), cell.method]
        row += [rates[cell.point, cell.method]] if tuned else []
        for name in names:
            known = name in cell.adapters
            row.append(_shown(cell.adapters[name].metric) if known else _status(cell))
        rows.append((*row, f"{cell.done} of {cell.runs}"))
    rate = ["learning rate"] if tuned else []
    head = (*_grid_head(plan), "method", *rate, *names, "runs done")
    notes = (
        f"{metric}, mean over clients, then over {len(plan.seeds)} seeds ± the half width of the "
        "95 % Student interval over seeds",
        *(_problem(plan, cell) for cell in cells if cell.failures or cell.left_out or cell.dropped),
    )
    return Table("Results", head, tuple(rows), notes)


def _costs(plan: Plan, cells: Sequence[Cell]) -> Table:
    names = [name for name in ADAPTERS if any(name in cell.adapters for cell in cells)]
    rows = []
    for cell in cells:
        row = [*_where(plan, cell.point), cell.method]
        for name in names:
            known = name in cell.adapters
            row.append(f"{cell.adapters[name].loss.mean:.4f}" if known else "")
        row += [amount(cell.bytes_up), amount(cell.bytes_down)]
        rows.append((*row, "" if cell.seconds is None else f"{cell.seconds:.1f}"))
    head = (*_grid_head(plan), "method", *(f"{name} loss" for name in names), "up", "down", "s")
    notes = ("losses: mean over clients, then over seeds; bytes and seconds: of one run, mean",)
    return Table("Losses and costs", head, tuple(rows), notes)


def _status(cell: Cell) -> str:
    """Return what stands in the place of a mean over no run."""
    return "diverged" if any(" diverged: " in line for line in cell.failures) else "failed"


def _problem(plan: Plan, cell: Cell) -> str:
    """Say which runs and clients the means do not hold."""
    parts = list(cell.failures)
    if cell.left_out:
        parts.append(f"{cell.left_out} clients diverged after the rounds and are in no mean")
    if cell.dropped:
        parts.append(f"{cell.dropped} replies in the rounds did not count")
    return f"{_name(plan, cell.method, cell.point)}: {'; '.join(parts)}"


def _tests(plan: Plan, differences: Sequence[Difference], metric: str) -> Table:
    head = [
        *_grid_head(plan), "method", "adapter", "over seeds", "effect", "over clients", "effect",
        "verdict",
    ]  # fmt: skip
    rows = [
        (
            *_where(plan, found.point),
            found.method,
            found.adapter,
            *_pair(found.over_seeds),
            *_pair(found.over_clients),
            found.verdict,
        )
        for found in differences
    ]
    notes = (
        f"{metric}, positive where the method is better than {plan.against}; 95 % Student interval "
        "of paired differences, over seeds (another run) and over clients (another person); "
        "effect: mean over standard deviation of the pairs",
        "no evidence: the interval over seeds includes 0. Intervals are not adjusted for their "
        f"number: were there no difference at all, {len(rows) / 20:g} of {len(rows)} would leave "
        "out 0 by chance",
    )
    return Table(f"Against {plan.against}", tuple(head), tuple(rows), notes)


def _pair(found: Paired | None) -> tuple[str, str]:
    if found is None:
        return "no pair", ""
    between = found.interval
    text = f"{between.mean:+.4f}"
    if math.isfinite(between.low):
        text += f" [{between.low:+.4f}, {between.high:+.4f}]"
    return text, "" if found.effect is None else f"{found.effect:+.2f}"


def _rates(plan: Plan, tuned: Sequence[Tuned], metric: str) -> Table:
    assert plan.tuning is not None
    rows = []
    for found in tuned:
        tried = " ".join(
            f"{one.learning_rate:g}: "
            + ("diverged" if one.score is None else f"{one.score:.4f}")
            + ("*" if one.learning_rate == found.learning_rate else "")
            for one in found.tried
        )
        edge = "still at the edge" if found.at_edge else "inside"
        rows.append((*_where(plan, found.point), found.method, tried, edge))
    notes = (
        f"{metric} of the {plan.tuning.on} adapter on the validation parts, mean over clients, "
        f"seed {plan.tuning.seed}; * chosen; each method had {plan.tuning.values} values and at "
        f"most {plan.tuning.extra} more beyond an edge",
    )
    head = (*_grid_head(plan), "method", "learning rates", "best")
    return Table("Tuned learning rates", head, tuple(rows), notes)


def _grid_head(plan: Plan) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key for point in plan.points for key in point))


def _where(plan: Plan, point: int) -> tuple[str, ...]:
    return tuple(str(plan.points[point].get(key, "")) for key in _grid_head(plan))


def _name(plan: Plan, method: str, point: int) -> str:
    return ", ".join(filter(None, (method, show_overrides(plan.points[point]))))


def _shown(found: Interval) -> str:
    if not math.isfinite(found.low):
        return f"{found.mean:.4f} (one run)"
    return f"{found.mean:.4f} ± {found.high - found.mean:.4f}"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
