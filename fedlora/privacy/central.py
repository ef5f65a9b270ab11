"""Central differential privacy: what a trusted server does to the sum of a cohort.

    release = (sum of clipped updates + N(0, (z C)^2)) / expected cohort

The denominator is the expected number of clients, a constant. Divided by the number of replies, the
noise would shrink and grow with who answered, and that number would be released without any. A
client that does not answer makes the sum smaller and never the noise.

`CentralMechanism` is a value for one round: the norm of the next one may be another. Its noise is a
function of the run's secret, the round, and the exact sum (`fedlora.privacy.noise`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fedlora.adapter import Array
from fedlora.low_rank import Matrix
from fedlora.privacy.clipping import (
    clip,
    count_noise,
    multiplier_of_sum,
    next_clipping_norm,
    norm_of,
)
from fedlora.privacy.config import PrivacyConfig
from fedlora.privacy.events import PrivacyEvent
from fedlora.privacy.noise import derive, normals, uniforms

__all__ = ["CentralMechanism", "PrivacyState", "draw_members", "event_of"]

Sampling = Literal["fixed", "poisson"]


@dataclass(frozen=True, slots=True)
class PrivacyState:
    """What of a run's privacy goes into its checkpoint."""

    noise_multiplier: float  # z, given or calibrated once at the start of the run
    clipping_norm: float  # C of the round that is next


@dataclass(frozen=True, slots=True)
class CentralMechanism:
    """Clip, add up, add noise, divide by what is fixed."""

    secret: bytes = field(repr=False)  # of the run, 32 bytes
    noise_multiplier: float  # z: the whole release costs this, the count of an adaptive norm too
    clipping_norm: float  # C of this round
    denominator: int  # the expected cohort
    target_quantile: float | None = None  # of the norms, which C follows
    clipping_rate: float = 0.2

    @classmethod
    def of(
        cls, secret: bytes, config: PrivacyConfig, state: PrivacyState, cohort: int
    ) -> CentralMechanism:
        """Return the mechanism of the next round. Raises `ConfigError` as `multiplier_of_sum`."""
        found = cls(
            secret,
            state.noise_multiplier,
            state.clipping_norm,
            cohort,
            config.target_quantile,
            config.clipping_rate,
        )
        _ = found.sum_multiplier  # refuses now what it could not release
        return found

    @property
    def sum_multiplier(self) -> float:
        """The noise multiplier of the sum alone: more than z beside the count of an adaptive norm.

        Raises `ConfigError` as `multiplier_of_sum` does.
        """
        if self.target_quantile is None:
            return self.noise_multiplier
        return multiplier_of_sum(self.noise_multiplier, self.denominator)

    @property
    def noise_std(self) -> float:
        """The standard deviation of the noise on every number of the sum."""
        return self.sum_multiplier * self.clipping_norm

    def clip(self, row: Array | Matrix) -> Matrix:
        """Return a client's update ``(n,)`` as float64, its norm at most C."""
        return clip(row, self.clipping_norm)

    def is_below(self, row: Array | Matrix) -> bool:
        """Whether an update is within C as it is: a client's bit of an adaptive norm."""
        return norm_of(row) <= self.clipping_norm

    def release(self, total: Matrix, round: int, bits: int | None = None) -> Matrix:
        """Return the mean ``(n,)`` float64 that may leave the server.

        total: the sum ``(n,)`` float64 of what `clip` has returned. bits: how many of those updates
        were below C; it is part of what the noise is keyed by.
        """
        noise = normals(self._key("sum", total, round, bits), len(total))
        released: Matrix = (total + self.noise_std * noise) / self.denominator
        return released

    def share_below(self, total: Matrix, round: int, bits: int, replies: int) -> float:
        """Return the noised share of the cohort that is below C, as it may leave the server.

        Each of `replies` clients adds 1/2 or -1/2, so that one client more or less moves the count
        by 1/2; it is divided by the expected cohort as the sum is (arXiv:1905.03871, section 3).
        """
        noise = float(normals(self._key("count", total, round, bits), 1)[0])
        count = bits - replies / 2 + count_noise(self.denominator) * noise
        return count / self.denominator + 0.5

    def next_norm(self, total: Matrix, round: int, bits: int, replies: int) -> float:
        """Return C of the next round: the same, unless it follows a quantile."""
        if self.target_quantile is None:
            return self.clipping_norm
        share = self.share_below(total, round, bits, replies)
        return next_clipping_norm(
            self.clipping_norm, share, self.target_quantile, self.clipping_rate
        )

    def _key(self, purpose: str, total: Matrix, round: int, bits: int | None) -> bytes:
        digest = hashlib.sha256(np.ascontiguousarray(total, "<f8").tobytes()).digest()
        # The scale too: one noise in two sizes would tell what it is added to.
        scale = f"{self.noise_std.hex()}/{self.denominator}"
        return derive(self.secret, "noise", purpose, round, digest, scale, str(bits))


def draw_members(
    secret: bytes, round: int, population: int, cohort: int, sampling: Sampling
) -> tuple[int, ...]:
    """Return the sorted places of a round's cohort in the population, drawn from the secret.

    The guarantee counts on nobody else knowing who was drawn, so the published seed is not used.
    poisson: each with probability ``cohort / population``; fixed: `cohort` without replacement, or
    all where there are fewer.
    """
    drawn = uniforms(derive(secret, "cohort", round), population)
    if sampling == "poisson":
        found = np.flatnonzero(drawn * population < cohort)
    else:
        found = np.sort(np.argsort(drawn, kind="stable")[: min(cohort, population)])
    return tuple(found.tolist())


def event_of(
    noise_multiplier: float,
    population: int,
    cohort: int,
    sampling: Sampling,
    earlier: Literal["add-or-remove-one", "replace-one"] | None = None,
) -> PrivacyEvent:
    """Return what a round of central privacy costs.

    cohort: the expected number of clients, the denominator. earlier: the neighboring relation of
    the rounds before in this run, since no guarantee adds up over two relations; None: there is
    none yet.

    A fixed cohort of everyone draws nobody, so that one person more or less moves the sum by C: it
    is `all`. Should others join such a run, a fixed cohort is drawn from then on. Then one person
    more takes the place of another in the cohort, and the sum moves by 2 C: the same as half of the
    noise, and nothing is gained by the drawing.
    """
    if sampling == "poisson":
        probability = min(1.0, cohort / max(population, 1))
        return PrivacyEvent(noise_multiplier, "poisson", probability)
    if cohort >= population and earlier != "replace-one":
        return PrivacyEvent(noise_multiplier, "all")
    if earlier == "add-or-remove-one":
        return PrivacyEvent(noise_multiplier / 2, "all")
    size = min(cohort, population)
    return PrivacyEvent(noise_multiplier, "fixed", size / population, size, population)
