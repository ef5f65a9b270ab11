"""Two plots: every contrast of a claim with its interval, and the map of a task. SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from fedlora.errors import MissingExtraError
from simulations.studies.methods.evidence import TIE, Finding, Reduced, paired_scores
from simulations.studies.methods.parts import RANKS, SKEWS, map_point

__all__ = ["draw_claim", "draw_map"]

# Told apart by those who see no red or green, and by their marker on paper.
_COLORS = {
    "yes": "#0072b2", "tie": "#0072b2", "no evidence": "#777777", "no, the contrary": "#d55e00",
}  # fmt: skip
_LINES = {"rolora": ("#0072b2", "o"), "flexlora": ("#d55e00", "s"), "ffa-lora": ("#009e73", "^")}


def draw_claim(findings: Sequence[Finding]) -> bytes | None:
    """Return a claim's contrasts, one a row; None where none was run.

    Raises `MissingExtraError` without matplotlib.
    """
    shown = [f for f in findings if f.metric is not None]
    if not shown:
        return None
    figure_class = _figure_class()
    figure = figure_class(figsize=(8, 0.9 + 0.24 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    for place, finding in enumerate(shown):
        assert finding.metric is not None
        found, color = finding.metric.interval, _COLORS[finding.verdict]
        axes.plot([found.low, found.high], [place, place], color=color, linewidth=2)
        axes.plot([found.mean], [place], "o", color=color, markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    if any(f.contrast.tie for f in shown):
        axes.axvspan(-TIE, TIE, color="#eeeeee", zorder=0)
    axes.set_yticks(
        range(len(shown)), [f"{f.contrast.part}: {f.contrast.words}" for f in shown], fontsize=7
    )
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("difference in the metric, 95 % interval over seeds")
    return _svg(figure)


def draw_map(part: Reduced) -> bytes | None:
    """Return each method minus FedIT over the rank, a panel a skew; None without those points."""
    points = [map_point(rank, skew)[0] for skew in SKEWS for rank in RANKS]
    if not set(points) <= set(part["points"]):
        return None
    figure = _figure_class()(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, len(SKEWS), sharey=True)
    for panel, skew in zip(panels, SKEWS, strict=True):
        for shift, (method, (color, marker)) in enumerate(_LINES.items()):
            found = [paired_scores(part, method, "fedit", map_point(r, skew)[0]) for r in RANKS]
            drawn = [(at, f.interval) for at, f in enumerate(found) if f is not None]
            panel.errorbar(
                [at + 0.1 * (shift - 1) for at, _ in drawn],
                [i.mean for _, i in drawn],
                yerr=[[i.mean - i.low for _, i in drawn], [i.high - i.mean for _, i in drawn]],
                color=color, marker=marker, markersize=4, linewidth=1, capsize=2, label=method,
            )  # fmt: skip
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_xticks(range(len(RANKS)), [f"rank {rank}" for rank in RANKS])
        panel.set_title(skew, fontsize=9)
    panels[0].set_ylabel(f"{part['metric']} minus FedIT's")
    panels[-1].legend(fontsize=7)
    return _svg(figure)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("plotting a study", "plots") from None
    return Figure


def _svg(figure: Any) -> bytes:
    import matplotlib

    buffer = io.BytesIO()
    # Without a date and with ids of its own, the same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fedlora"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
