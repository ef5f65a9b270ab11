"""A comparison as one picture: the global and the personal adapter, a line or a point a method."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from fedlora.errors import MissingExtraError
from fedlora.simulation.comparison.plan import Plan, show_overrides
from fedlora.simulation.comparison.statistics import COMPARED, Cell

__all__ = ["draw"]


def draw(plan: Plan, cells: Sequence[Cell], metric: str) -> bytes:
    """Return a PNG: mean over seeds with its 95 % interval, over the grid where there is one.

    Raises `MissingExtraError` without matplotlib.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError:
        raise MissingExtraError("a plot", "plots") from None

    names = [name for name in COMPARED if any(name in cell.adapters for cell in cells)]
    figure = Figure(figsize=(5.2 * max(len(names), 1), 4), layout="constrained")
    axes = figure.subplots(1, max(len(names), 1), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=False):
        _draw_adapter(axis, plan, cells, name)
        axis.set_title(name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(metric)
    if len(plan.points) > 1:
        axes[0].legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def _draw_adapter(axis: Any, plan: Plan, cells: Sequence[Cell], adapter: str) -> None:
    one_point = len(plan.points) == 1
    numbers = None if one_point else _numbers(plan)
    for order, method in enumerate(plan.methods):
        mine = [c for c in cells if c.method == method and adapter in c.adapters]
        found = [cell.adapters[adapter].metric for cell in mine]
        if one_point:
            places = [float(order)] * len(mine)
        else:
            places = [numbers[c.point] if numbers else float(c.point) for c in mine]
        halves = [f.high - f.mean if math.isfinite(f.high) else 0.0 for f in found]
        line = "none" if one_point else "-"
        means = [f.mean for f in found]
        axis.errorbar(places, means, halves, label=method, marker="o", ls=line, capsize=3)
    if one_point:
        axis.set_xticks(range(len(plan.methods)), list(plan.methods))
        axis.set_xlim(-0.5, len(plan.methods) - 0.5)
        return
    if numbers is None:
        shown = [show_overrides(point).replace(", ", "\n") for point in plan.points]
        axis.set_xticks(range(len(plan.points)), shown, fontsize=7)
        return
    axis.set_xlabel(next(iter(plan.points[0])))
    # A ladder such as 2, 8, 32 is evenly spaced by its logarithms.
    if min(numbers) > 0 and max(numbers) >= 8 * min(numbers):
        axis.set_xscale("log")
        axis.minorticks_off()
    axis.set_xticks(numbers, [f"{number:g}" for number in numbers])


def _numbers(plan: Plan) -> list[float] | None:
    """Return the grid's values where it sweeps one key over numbers."""
    values = [value for point in plan.points for value in point.values()]
    if len({key for point in plan.points for key in point}) != 1:
        return None
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        return None
    return [float(value) for value in values]
