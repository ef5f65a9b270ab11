"""Methods that average factors: FedIT and FFA-LoRA.

    fedit      A = Σ p_k A_k, B = Σ p_k B_k           arXiv:2305.05644
    ffa-lora   A = A₀ stays frozen, B = Σ p_k B_k      arXiv:2403.12313

FedIT averages the two factors apart, so its product misses the true mean by exactly
``Σ p_k s (B_k - B)(A_k - A)``. FFA-LoRA shares one A and is therefore exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from fedlora.adapter import Adapter, Array
from fedlora.aggregation.method import (
    Broadcast,
    ClientProfile,
    Method,
    ServerState,
    Update,
    checked,
)
from fedlora.errors import FederationError
from fedlora.flat import RowForm, RowReader, Segment
from fedlora.low_rank import Matrix
from fedlora.training import Factor, LocalRule

__all__ = [
    "BOTH",
    "ONLY_A",
    "ONLY_B",
    "RunningMean",
    "broadcast_whole",
    "fedit",
    "ffa_lora",
    "mean_of_factors",
    "no_update",
    "running_mean",
]

# Rows that are summed together, numbers of each in one block (256 kB, of which three stay in a
# core's own cache), and groups in one float32 sum. Larger and smaller ones were slower.
GROUP, BLOCK, FOLD = 32, 65536, 4
SHORT = 8192  # rows with fewer numbers are summed in float64 one by one

BOTH: frozenset[Factor] = frozenset({"A", "B"})
ONLY_A: frozenset[Factor] = frozenset({"A"})
ONLY_B: frozenset[Factor] = frozenset({"B"})


def fedit() -> Method:
    """Return FedIT: the weighted mean of A and of B, each on its own (arXiv:2305.05644)."""
    return _averaging(
        "fedit",
        BOTH,
        exact=False,
        summary="the usual start; its error grows with how far clients drift apart",
        paper="2305.05644",
    )


def ffa_lora() -> Method:
    """Return FFA-LoRA: A stays as it was drawn from the seed, B is averaged (arXiv:2403.12313)."""
    return _averaging(
        "ffa-lora",
        ONLY_B,
        exact=True,
        summary="half the upload, and noise for privacy is never multiplied by noise",
        paper="2403.12313",
    )


class RunningMean:
    """The weighted mean of flat rows of factors, from one float64 sum.

    `like`: the adapter whose layout the rows have; `factors`: which of its factors are in them.

    Converting every row to float64 would take five times as long as reading it. So of long rows,
    `GROUP` at a time are summed in float32, and `FOLD` such sums before they go into the float64
    one. That is off by a few roundings of float32 at most (about 2e-7 of the largest number),
    however many clients there are. Fewer rows, and short ones, are summed in float64 throughout.
    """

    def __init__(self, like: Adapter, factors: frozenset[Factor]) -> None:
        self.like, self.factors = like, factors
        self._row_of = RowReader(like, factors)
        self._sums = np.zeros(self._row_of.size)
        self._waiting: list[tuple[Array, float]] = []
        self._partial: Array = np.zeros(0, np.float32)
        self._blocks: Array = np.zeros((2, 0), np.float32)  # a group's sum, and a row times weight
        self._folded = 0  # groups in `_partial`
        self._unit = 1.0  # of the weights in the sums: float32 is to see some of about 1
        self.total = 0.0  # of the weights

    def add(self, adapter: Adapter, weight: float) -> None:
        """Add ``weight`` times the factors of `adapter`."""
        self._waiting.append((self._row_of(adapter), weight))
        self.total += weight
        if len(self._sums) < SHORT:
            self._add_waiting()
        elif len(self._waiting) == GROUP:
            self._add_group()

    @property
    def row(self) -> Matrix:
        """The mean as one float64 row. Something must have been added."""
        self._add_waiting()
        self._fold()
        return self._sums / (self.total / self._unit)

    def _add_waiting(self) -> None:
        for row, weight in self._waiting:
            self._sums += row.astype(np.float64) * (weight / self._unit)
        self._waiting.clear()

    def _add_group(self) -> None:
        """Sum a whole group block by block, so that the sum stays in the cache."""
        if not len(self._partial):
            self._unit = self._waiting[0][1]
            self._sums /= self._unit  # zero, unless the mean has been looked at before
            self._partial = np.zeros(len(self._sums), np.float32)
            self._blocks = np.empty((2, min(BLOCK, len(self._sums))), np.float32)
        shares = [np.float32(weight / self._unit) for _, weight in self._waiting]
        for start in range(0, len(self._sums), BLOCK):
            parts = [row[start : start + BLOCK] for row, _ in self._waiting]
            total, scaled = self._blocks[:, : len(parts[0])]
            np.multiply(parts[0], shares[0], out=total)
            for part, share in zip(parts[1:], shares[1:], strict=True):
                # Equal weights need no product: half the work.
                total += part if share == 1 else np.multiply(part, share, out=scaled)
            self._partial[start : start + BLOCK] += total
        self._waiting.clear()
        self._folded += 1
        if self._folded == FOLD:
            self._fold()

    def _fold(self) -> None:
        if self._folded:
            self._sums += self._partial
            self._partial[:] = 0
            self._folded = 0

    def factor_rows(self) -> Iterator[tuple[Segment, Matrix]]:
        """Yield each factor's place and its mean, in float64 and in its shape."""
        row, start = self.row, 0
        for segment in self._row_of.segments:
            yield segment, row[start : start + segment.size].reshape(segment.shape)
            start += segment.size

    def adapter(self) -> Adapter:
        """Return `like` with the means in place of its factors, rounded to float32 once."""
        mean = self.row.astype("<f4").tobytes()
        # A copy does not say what it was made of: else it would keep all rounds' adapters alive.
        return replace(RowForm.of(self.like, self.factors).read(mean))


def running_mean(
    state: ServerState, updates: Iterable[Update], factors: frozenset[Factor], method: str
) -> RunningMean:
    """Return the mean of the clients' `factors`, weighted by their num_examples.

    Memory does not grow with the number of clients. Raises as `checked` does, and
    `FederationError` without any update.
    """
    mean = RunningMean(state.trainable, factors)
    for update in checked(state, updates, method):
        mean.add(update.adapter, update.num_examples)
    if not mean.total:
        raise no_update(state, method)
    return mean


def mean_of_factors(
    state: ServerState, updates: Iterable[Update], factors: frozenset[Factor], method: str
) -> Adapter:
    """Return the trainable adapter with ``Σ p_k X_k`` in place of each of `factors`.

    ``p_k`` are the clients' num_examples over their sum.
    """
    return running_mean(state, updates, factors, method).adapter()


def no_update(state: ServerState, method: str) -> FederationError:
    """Build the error for a round in which no client answered."""
    return FederationError(f"round {state.round + 1}: {method} got no update to average")


def _averaging(
    name: str, factors: frozenset[Factor], *, exact: bool, summary: str, paper: str
) -> Method:
    def aggregate(state: ServerState, updates: Iterable[Update]) -> ServerState:
        adapter = mean_of_factors(state, updates, factors, name)
        return replace(state, round=state.round + 1, trainable=adapter)

    return Method(
        name=name,
        trained=lambda round: factors,
        shared=factors,
        aggregate=aggregate,
        broadcast=broadcast_whole,
        local=LocalRule(trained=factors),
        exact=exact,
        linear=True,
        summary=summary,
        paper=paper,
        continues=True,
    )


def broadcast_whole(state: ServerState, profile: ClientProfile) -> Broadcast:
    """Send every client the same, whatever rank it would like."""
    return state.broadcast
