"""A comparison reduced to what the page needs, and contrasts between its runs.

A contrast is a sum of runs' metrics with factors, seed by seed: 1 · rolora − 1 · fedit, or the
difference of two such differences. Seeds decide the clients' data, the first adapter and all draws,
alike for all methods and ranks, so that each seed is a pair; the interval is Student's over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedlora.errors import DataError
from fedlora.simulation.comparison.compare import Comparison
from fedlora.simulation.comparison.statistics import Paired, paired
from simulations.studies.methods.parts import Part

__all__ = ["Contrast", "Finding", "Term", "Verdict", "examine", "paired_scores", "reduced"]

TIE = 0.02  # an effect within it is none that anyone would choose a method for
Reduced = Mapping[str, Any]  # what `reduced` returns, as JSON
Verdict = Literal["yes", "no, the contrary", "no evidence", "tie", "not run"]
Term = tuple[float, str, str]  # factor, method, point


@dataclass(frozen=True, slots=True)
class Contrast:
    """What is claimed to be over 0; with `tie`, to be within ±`TIE` of it."""

    part: str
    words: str
    terms: tuple[Term, ...]
    tie: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """A contrast with its numbers; `metric` None: no two seeds in which all its runs are done."""

    contrast: Contrast
    metric: Paired | None
    loss: Paired | None  # over 0 where the loss is lower
    lost: int = 0  # seeds left out, since a run of theirs diverged or failed
    edges: int = 0  # learning rates at the edge of what was tried

    @property
    def verdict(self) -> Verdict:
        """What the interval of the metric says, and no more.

        A claimed order holds where the interval is over 0 as a whole. A claimed tie holds where it
        is within ±`TIE` as a whole; an interval that reaches out of that and contains 0 tells
        neither.
        """
        if self.metric is None:
            return "not run"
        found = self.metric.interval
        if self.contrast.tie:
            if found.low >= -TIE and found.high <= TIE:
                return "tie"
            return "no evidence" if found.low <= 0 <= found.high else "no, the contrary"
        if found.low <= 0 <= found.high:
            return "no evidence"
        return "yes" if found.mean > 0 else "no, the contrary"


def reduced(part: Part, comparison: Comparison) -> dict[str, Any]:
    """Return the part's runs as plain values: each adapter's mean metric and loss.

    Raises `DataError` when none is done.
    """
    ended = [r for found in comparison.results.values() for r in found.values() if r.is_done]
    if not ended:
        raise DataError(f"part {part.name!r}: expected a run that is done, found none")
    names = list(part.points)
    runs = []
    for (point, method), results in comparison.results.items():
        for seed, result in results.items():
            row: dict[str, Any] = {"method": method, "point": names[point], "seed": seed}
            if result.is_done:
                row |= {
                    name: [round(score.mean, 6), round(score.loss, 6)]
                    for name, score in result.scores.items()
                }
                row["seconds"] = round(result.seconds, 2)
            else:
                row["failed"] = f"{result.status}: {result.reason}"
            runs.append(row)
    return {
        "part": part.name,
        "title": part.title,
        "adapter": part.adapter,
        "metric": ended[0].metric,
        "higher_is_better": ended[0].higher_is_better,
        "methods": list(part.methods),
        "points": {name: dict(point) for name, point in part.points.items()},
        "seeds": list(comparison.plan.seeds),
        "tuned": [
            {
                "method": found.method,
                "point": names[found.point],
                "learning_rate": found.learning_rate,
                "at_edge": found.at_edge,
            }
            for found in comparison.tuned
        ],
        "runs": runs,
    }


def examine(contrast: Contrast, parts: Mapping[str, Reduced]) -> Finding:
    """Return what the runs say of a contrast. Parts and points that were not run are no error."""
    part = parts.get(contrast.part)
    if part is None or not all(_has(part, term) for term in contrast.terms):
        return Finding(contrast, None, None)
    values, losses, lost = [], [], 0
    for seed in part["seeds"]:
        rows = [_row(part, method, point, seed) for _, method, point in contrast.terms]
        scores = [row.get(part["adapter"]) for row in rows]
        if any(score is None for score in scores):
            lost += 1
            continue
        sign = 1.0 if part["higher_is_better"] else -1.0
        factors = [factor for factor, _, _ in contrast.terms]
        pairs = list(zip(factors, scores, strict=True))
        values.append(sign * sum(factor * score[0] for factor, score in pairs if score))
        losses.append(-sum(factor * score[1] for factor, score in pairs if score))
    cells = {(method, point) for _, method, point in contrast.terms}
    edges = sum((row["method"], row["point"]) in cells and row["at_edge"] for row in part["tuned"])
    if len(values) < 2:
        return Finding(contrast, None, None, lost, edges)
    return Finding(contrast, paired(values), paired(losses), lost, edges)


def paired_scores(part: Reduced, method: str, other: str, point: str) -> Paired | None:
    """Return `method` minus `other` at a point; None with fewer than two seeds."""
    terms = ((1.0, method, point), (-1.0, other, point))
    return examine(Contrast(part["part"], "", terms), {part["part"]: part}).metric


def _has(part: Reduced, term: Term) -> bool:
    return term[1] in part["methods"] and term[2] in part["points"]


def _row(part: Reduced, method: str, point: str, seed: int) -> Mapping[str, Any]:
    key: Sequence[Any] = (method, point, seed)
    for row in part["runs"]:
        if (row["method"], row["point"], row["seed"]) == key:
            found: Mapping[str, Any] = row
            return found
    raise DataError(f"part {part['part']!r}: expected a run of {key}, found none; run it again")
