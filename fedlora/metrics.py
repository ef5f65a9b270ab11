"""Numbers of one client and over clients: means, summaries and paired gains. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np

from fedlora.errors import DataError

__all__ = [
    "Gain",
    "Interval",
    "Summary",
    "auc",
    "gain",
    "interval",
    "means_of",
    "share_better",
    "summarize",
]


@dataclass(frozen=True, slots=True)
class Summary:
    """A metric over clients, each client counting once. `loss` is the mean of their losses."""

    mean: float
    median: float
    worst_tenth: float  # mean of the ⌈n/10⌉ worst clients
    loss: float  # nats per token or per example

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Gain:
    """A paired difference over clients, positive where the second is better; 95 % interval."""

    mean: float
    low: float
    high: float
    clients: int

    def as_dict(self) -> dict[str, float | None]:
        """Return plain values; JSON has no infinity, so an infinite bound is None."""
        return _finite(asdict(self))


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean of `count` values with its 95 % Student interval, infinite with fewer than two."""

    mean: float
    low: float
    high: float
    count: int

    def as_dict(self) -> dict[str, float | None]:
        """Return plain values; JSON has no infinity, so an infinite bound is None."""
        return _finite(asdict(self))


def summarize(
    values: Sequence[float], losses: Sequence[float], *, higher_is_better: bool
) -> Summary:
    """Return the summary of one adapter's `values` and `losses`, one of each a client.

    Raises `DataError` without clients.
    """
    if not values or len(values) != len(losses):
        raise DataError(
            f"expected a value and a loss for at least one client, found {len(values)} values and "
            f"{len(losses)} losses"
        )
    ordered = np.sort(np.asarray(values, np.float64))
    worst = math.ceil(len(ordered) / 10)
    tail = ordered[:worst] if higher_is_better else ordered[-worst:]
    return Summary(
        mean=float(ordered.mean()),
        median=float(np.median(ordered)),
        worst_tenth=float(tail.mean()),
        loss=float(np.mean(losses)),
    )


def gain(before: Sequence[float], after: Sequence[float], *, higher_is_better: bool) -> Gain:
    """Return the mean paired improvement with its 95 % Student interval over clients.

    With fewer than two clients the interval is infinite.
    """
    sign = 1.0 if higher_is_better else -1.0
    differences = sign * (np.asarray(after, np.float64) - np.asarray(before, np.float64))
    found = interval(differences.tolist())
    return Gain(found.mean, found.low, found.high, found.count)


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent `values` with its 95 % Student interval.

    ``mean ± t(n - 1) s / √n``. Raises `DataError` without values.

    >>> round(interval([1.0, 2.0, 3.0]).high, 3)
    4.484
    """
    n = len(values)
    if n == 0:
        raise DataError("expected at least one value for a mean, found none")
    numbers = np.asarray(values, np.float64)
    mean = float(np.mean(numbers))
    if n < 2:
        return Interval(mean, -math.inf, math.inf, n)
    half = _student(n - 1) * float(np.std(numbers, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def share_better(
    before: Sequence[float], after: Sequence[float], *, higher_is_better: bool
) -> float:
    """Return the share of clients for whom `after` is strictly better."""
    first, second = np.asarray(before), np.asarray(after)
    return float(np.mean(second > first if higher_is_better else second < first))


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Return the probability that a positive scores higher than a negative, a tie counting half.

    The area under the ROC curve, from the ranks of all scores (Mann and Whitney 1947, equal scores
    sharing their mean rank). Raises `DataError` without one of the two, or for NaN.
    """
    scores = np.concatenate([np.asarray(positive, np.float64), np.asarray(negative, np.float64)])
    count, others = len(positive), len(negative)
    if not count or not others or np.isnan(scores).any():
        raise DataError(
            f"auc: expected positive and negative scores without NaN, found {count} and {others} "
            f"with {np.count_nonzero(np.isnan(scores))} NaN"
        )
    _, place, times = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(times) - (times - 1) / 2)[place]  # from 1
    return float((ranks[:count].sum() - count * (count + 1) / 2) / (count * others))


def means_of(sums: Mapping[str, float], characters: int | None) -> dict[str, float]:
    """Turn a task's sums over some examples into means.

    sums: "nats" with "tokens" or "examples", and what the task counts; one that is not known here
    is divided by the number of targets. characters: what the counted targets spell; None: not text.
    """
    rest = dict(sums)
    nats, word_starts = rest.pop("nats"), rest.pop("word_starts", 0)
    targets = rest.pop("tokens") if "tokens" in rest else rest.pop("examples")
    values = {"loss": nats / targets}
    if "tokens" in sums:
        values["perplexity"] = math.exp(min(values["loss"], 700.0))
        for name in ("top1", "top3"):
            if name in rest:
                values[name] = rest.pop(name) / word_starts if word_starts else 0.0
        if characters:
            values["bits_per_character"] = nats / math.log(2) / characters
    if "correct" in rest:
        values["accuracy"] = rest.pop("correct") / targets
    return values | {name: value / targets for name, value in rest.items()}


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t.

    Exact for one and two degrees of freedom; else the expansion in 1/freedom of Abramowitz and
    Stegun 26.7.5, whose error is under 0.2 % from three degrees on.
    """
    p = 0.975
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z, v = NormalDist().inv_cdf(p), freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )
