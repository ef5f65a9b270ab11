"""Canary clients: an estimate of epsilon from one run, by what is left of them (arXiv:2302.03098).

A canary is an invented client whose update is a random direction that nobody else knows. It is
drawn, clipped and summed like anybody. Afterwards the auditor asks how far the sum of everything
that was released points in its direction. Without the canary that cosine would be N(0, 1/d), since
in d dimensions a random direction is orthogonal to nearly everything; with it, it is shifted. The
shift is the distance of two Gaussians, and that is an epsilon.

This is an estimate and no bound: it is of this attack, which looks at the sum of all rounds alone,
and not of the best one. Where cohorts are sampled, or people's updates are long beside the noise,
it lies below the ledger's epsilon by design. It says nothing good about a mechanism; but where it
lies well above the ledger's epsilon, the mechanism is broken.

Methods that alternate factors, or turn them, are measured alike: not their adapter is looked at but
the sum of the released rows, apart for every kind of row (which factors it holds).
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedlora.errors import ConfigError
from fedlora.low_rank import Matrix
from fedlora.privacy.exact import gaussian_epsilon
from fedlora.randomness import rng

__all__ = ["Canaries", "Estimate", "Trace", "estimate_epsilon"]

# A canary asks for so many times the clipping norm, so that it is clipped like everybody: where
# clipping is forgotten, its trace is as many times too deep.
OVER = 10.0
_NAME = "\tcanary "  # no client has it in front: their ids are printable
_STATE = "canaries/"  # of the keys in a method's state


@dataclass(frozen=True, slots=True)
class Canaries:
    """The canaries of a run; their directions are keyed by the run's secret."""

    count: int
    secret: bytes = field(repr=False)

    @property
    def ids(self) -> tuple[str, ...]:
        """Names to draw a cohort from beside the clients'."""
        return tuple(f"{_NAME}{number:06d}" for number in range(self.count))

    def number_of(self, client_id: str) -> int | None:
        """Return which canary it is; None: a client."""
        return int(client_id.removeprefix(_NAME)) if client_id.startswith(_NAME) else None

    def direction(self, number: int, kind: str, size: int) -> Matrix:
        """Return a canary's unit vector ``(size,)`` float64 in the rows of one kind."""
        key = hmac.new(self.secret, f"canary:{number}:{kind}:{size}".encode(), hashlib.sha256)
        found = rng(int.from_bytes(key.digest(), "big"), "canary").standard_normal(size)
        length = math.sqrt(_dot(found, found))
        unit: Matrix = found / length if length else found
        return unit

    def updates(
        self, drawn: Sequence[str], kind: str, size: int, clipping_norm: float
    ) -> Iterator[Matrix]:
        """Yield the updates ``(size,)`` float64 of those drawn, not yet clipped."""
        for client_id in drawn:
            number = self.number_of(client_id)
            if number is not None:
                yield (OVER * clipping_norm) * self.direction(number, kind, size)


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """The sums of what was released, noise and all, each in units of its round's clipping norm.

    sums: by kind of row, ``(n,)`` float64. It is made of releases alone, and so as public as they
    are.
    """

    sums: Mapping[str, Matrix]

    @classmethod
    def of_state(cls, state: Mapping[str, np.ndarray]) -> Trace:
        """Return the trace that `to_state` has put into a method's state."""
        found = {
            key.removeprefix(_STATE): np.asarray(value, np.float64)
            for key, value in state.items()
            if key.startswith(_STATE)
        }
        return cls(found)

    def to_state(self) -> dict[str, Matrix]:
        """Return the sums under keys of their own, for a checkpoint."""
        return {f"{_STATE}{kind}": value for kind, value in self.sums.items()}

    def after(self, kind: str, released: Matrix, clipping_norm: float) -> Trace:
        """Return the trace with one more noised sum ``(n,)`` of updates."""
        more = released / clipping_norm
        before = self.sums.get(kind)
        return Trace({**self.sums, kind: more if before is None else before + more})


@dataclass(frozen=True, slots=True)
class Estimate:
    """An estimate of epsilon, no bound."""

    epsilon: float
    spread: float  # of the estimate: half of what a deviation of `distance` up and down makes
    distance: float  # of the two Gaussians, in standard deviations
    low: float  # epsilon at two deviations below
    canaries: int
    size: int  # dimensions of all kinds of rows
    delta: float


def estimate_epsilon(canaries: Canaries, trace: Trace, delta: float) -> Estimate:
    """Estimate epsilon at `delta` from what the canaries left in the released sums.

    ``distance = mean_j cos(c_j, S) sqrt(d)``, a Gaussian's mu in units of its null deviation; over
    several kinds of rows the inner products are summed, and so are the null variances
    ``|S|^2 / d``. Its standard deviation over k canaries is ``1 / sqrt(k)``. Epsilon is that of two
    unit Gaussians so far apart. Raises `ConfigError` without canaries or rounds.
    """
    kinds = {kind: value for kind, value in trace.sums.items() if np.any(value)}
    if canaries.count < 1 or not kinds:
        raise ConfigError(
            "canaries: expected at least one, and a round with an update, found "
            f"{canaries.count} and {len(trace.sums)} kinds of released rows"
        )
    null = sum(_dot(value, value) / len(value) for value in kinds.values())
    inner = 0.0
    for number in range(canaries.count):
        inner += sum(
            _dot(canaries.direction(number, kind, len(value)), value)
            for kind, value in kinds.items()
        )
    distance = inner / canaries.count / math.sqrt(null)
    deviation = 1 / math.sqrt(canaries.count)

    def epsilon(at: float) -> float:
        return gaussian_epsilon(at, delta) if at > 0 else 0.0

    return Estimate(
        epsilon=epsilon(distance),
        spread=(epsilon(distance + deviation) - epsilon(distance - deviation)) / 2,
        distance=distance,
        low=epsilon(distance - 2 * deviation),
        canaries=canaries.count,
        size=sum(map(len, kinds.values())),
        delta=delta,
    )


def _dot(one: Matrix, other: Matrix) -> float:
    """The inner product, in this thread: BLAS wakes others for these lengths, and waits."""
    return float(np.einsum("i,i->", one, other))
