"""From runs to what a comparison says: means with intervals, and paired tests between methods.

Two questions are kept apart, since each has its own chance:

    over seeds     would the method be better again, with another draw of everything that a seed
                   decides? A pair is one seed, under both methods; its value is the mean over
                   clients.
    over clients   would it be better for another person? A pair is one client, under both methods;
                   its value is the mean over the seeds in which both methods have one.

Clients × seeds are not pooled: the seeds of one client are no independent people, and an interval
over them all would be too narrow. Intervals are Student's, 95 %, and each is of one claim: of
twenty claims without any truth, one on average has an interval without 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from fedlora.metrics import Interval, interval
from fedlora.simulation.comparison.runs import Result, Score

__all__ = ["ADAPTERS", "Cell", "Difference", "Measured", "Paired", "cell", "difference", "paired"]

ADAPTERS = ("base", "own", "global", "personal")
COMPARED = ("global", "personal")  # base and own know nothing of a method's aggregation


@dataclass(frozen=True, slots=True)
class Measured:
    """An adapter of one method at one grid point, over seeds."""

    metric: Interval
    loss: Interval

    def as_dict(self) -> dict[str, Any]:
        return {"metric": self.metric.as_dict(), "loss": self.loss.as_dict()}


@dataclass(frozen=True, slots=True)
class Cell:
    """One method at one grid point. The means are over the runs that are done, if there are any."""

    method: str
    point: int
    done: int
    runs: int
    adapters: Mapping[str, Measured]
    held_out: Mapping[str, Measured]
    bytes_up: float | None  # of a whole run, mean over seeds
    bytes_down: float | None
    seconds: float | None
    left_out: int  # clients that diverged after the rounds, over all runs
    dropped: int  # replies that did not count, over all runs
    failures: tuple[str, ...]  # a line for each seed whose run is not done

    @property
    def status(self) -> str:
        """ "" when all runs are done, else how many are not."""
        return f"{self.runs - self.done} of {self.runs} diverged or failed" * bool(self.failures)

    def as_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "point": self.point,
            "done": self.done,
            "runs": self.runs,
            "adapters": {name: found.as_dict() for name, found in self.adapters.items()},
            "held_out": {name: found.as_dict() for name, found in self.held_out.items()},
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "seconds": self.seconds,
            "left_out": self.left_out,
            "dropped": self.dropped,
            "failures": list(self.failures),
        }


@dataclass(frozen=True, slots=True)
class Paired:
    """Paired differences, positive where the method is better than the reference."""

    interval: Interval
    effect: float | None  # Cohen's d of pairs: their mean over their standard deviation
    wins: int  # pairs in which the method is strictly better
    losses: int

    @property
    def verdict(self) -> str:
        """ "better" or "worse" where the 95 % interval leaves out 0, else "no evidence"."""
        if self.interval.count < 2 or self.interval.low <= 0 <= self.interval.high:
            return "no evidence"
        return "better" if self.interval.mean > 0 else "worse"

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.interval.as_dict(),
            "effect_size": self.effect,
            "wins": self.wins,
            "losses": self.losses,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, slots=True)
class Difference:
    """A method against the reference at one grid point, for one adapter."""

    method: str
    against: str
    point: int
    adapter: str
    over_seeds: Paired | None  # None: no seed that both have finished
    over_clients: Paired | None

    @property
    def verdict(self) -> str:
        """The one over seeds."""
        return "no evidence" if self.over_seeds is None else self.over_seeds.verdict

    def as_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "against": self.against,
            "point": self.point,
            "adapter": self.adapter,
            "over_seeds": self.over_seeds.as_dict() if self.over_seeds else None,
            "over_clients": self.over_clients.as_dict() if self.over_clients else None,
            "verdict": self.verdict,
        }


def cell(method: str, point: int, results: Mapping[int, Result]) -> Cell:
    """Return one method's numbers at one grid point; `results` are by seed."""
    done = [result for result in results.values() if result.is_done]
    return Cell(
        method=method,
        point=point,
        done=len(done),
        runs=len(results),
        adapters=_measured([result.scores for result in done]),
        held_out=_measured([result.held_out for result in done]),
        bytes_up=fmean(r.bytes_up for r in done) if done else None,
        bytes_down=fmean(r.bytes_down for r in done) if done else None,
        seconds=fmean(r.seconds for r in done) if done else None,
        left_out=sum(r.left_out for r in done),
        dropped=sum(r.dropped for r in done),
        failures=tuple(
            f"seed {seed} {result.status}: {result.reason}"
            for seed, result in results.items()
            if not result.is_done
        ),
    )


def _measured(scores: Sequence[Mapping[str, Score]]) -> dict[str, Measured]:
    return {
        name: Measured(
            interval([score[name].mean for score in scores]),
            interval([score[name].loss for score in scores]),
        )
        for name in ADAPTERS
        if scores and all(name in score for score in scores)
    }


def difference(
    method: str,
    against: str,
    point: int,
    adapter: str,
    results: Mapping[int, Result],
    reference: Mapping[int, Result],
) -> Difference:
    """Return `method` against `against`, by the seeds that both have finished.

    Over clients, each counts with the mean over those seeds in which both have a value for it: a
    seed may also decide which clients there are.
    """
    both = [
        (results[seed], reference[seed])
        for seed in results
        if seed in reference and results[seed].is_done and reference[seed].is_done
    ]
    if not both:
        return Difference(method, against, point, adapter, None, None)
    sign = 1.0 if both[0][0].higher_is_better else -1.0
    means = [(mine.scores[adapter].mean, other.scores[adapter].mean) for mine, other in both]
    by_client: dict[str, list[float]] = {}
    for mine, other in both:
        for client, value in mine.clients[adapter].items():
            if client in other.clients[adapter]:
                change = sign * (value - other.clients[adapter][client])
                by_client.setdefault(client, []).append(change)
    clients = [fmean(changes) for changes in by_client.values()]
    over_seeds = paired([sign * (mine - other) for mine, other in means])
    over_clients = paired(clients) if clients else None
    return Difference(method, against, point, adapter, over_seeds, over_clients)


def paired(differences: Sequence[float]) -> Paired:
    """Return the mean of paired differences with its interval, and Cohen's d of pairs.

    ``d = mean / standard deviation`` (n - 1 in its denominator); None with fewer than two pairs or
    where all are equal. Raises `DataError` without pairs.
    """
    found = interval(differences)
    spread = stdev(differences) if len(differences) > 1 else 0.0
    # Equal differences have a spread of their rounding, not of anything measured.
    smallest = 1e-12 * max(map(abs, differences))
    effect = found.mean / spread if spread > smallest and math.isfinite(spread) else None
    return Paired(
        found,
        effect,
        wins=sum(value > 0 for value in differences),
        losses=sum(value < 0 for value in differences),
    )
