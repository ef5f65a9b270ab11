"""The area under the ROC curve by looking at every pair."""

from __future__ import annotations

from collections.abc import Sequence


def auc_of_pairs(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Share of pairs whose positive scores higher; a tie is half a pair."""
    won = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return won / (len(positive) * len(negative))
