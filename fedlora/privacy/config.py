"""What a run promises to its people: the tables ``[privacy]`` and ``[secure_aggregation]``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedlora.errors import ConfigError

__all__ = ["PrivacyConfig", "SecureAggregationConfig"]


@dataclass(frozen=True, slots=True)
class PrivacyConfig:
    """``[privacy]``: user-level differential privacy of the global adapter.

    Either the noise multiplier is given, or epsilon, from which it is calibrated for all rounds.
    """

    clipping_norm: float  # C: the most that one client's whole update may move, as an L2 norm
    noise_multiplier: float | None = None  # z: the noise on the sum has the standard deviation z C
    epsilon: float | None = None  # what the whole run may cost; noise is calibrated to it
    delta: float = 1e-5  # well below one over the number of people
    max_epsilon: float | None = None  # the run stops before this is passed; None: epsilon, or never
    accountant: Literal["pld", "rdp"] = "pld"
    # central: the server adds the noise to the sum; local: each device to what it sends
    mechanism: Literal["central", "local"] = "central"
    # Adaptive clipping (arXiv:1905.03871): the norm follows this quantile of the updates' norms.
    # None: it stays what it is.
    target_quantile: float | None = None
    clipping_rate: float = 0.2  # eta of the norm's steps; with target_quantile only
    canaries: int = 0  # invented clients whose traces `fedlora privacy audit` looks for

    def __post_init__(self) -> None:
        for name in ("clipping_norm", "noise_multiplier", "epsilon", "max_epsilon"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"privacy.{name}: expected a finite number > 0, found {value!r}")
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ConfigError(
                "privacy.noise_multiplier: expected either it or privacy.epsilon, found "
                + ("both" if self.epsilon is not None else "neither")
            )
        if not 0 < self.delta < 1:
            raise ConfigError(f"privacy.delta: expected a number in (0, 1), found {self.delta!r}")
        if self.target_quantile is not None and not 0 < self.target_quantile < 1:
            raise ConfigError(
                "privacy.target_quantile: expected a share in (0, 1), found "
                f"{self.target_quantile!r}"
            )
        if not 0 < self.clipping_rate < math.inf:
            raise ConfigError(
                f"privacy.clipping_rate: expected a finite number > 0, found {self.clipping_rate!r}"
            )
        if self.canaries < 0:
            raise ConfigError(
                f"privacy.canaries: expected a whole number >= 0, found {self.canaries!r}"
            )
        if self.mechanism == "local" and (self.target_quantile is not None or self.canaries):
            key = "canaries" if self.canaries else "target_quantile"
            raise ConfigError(
                f"privacy.{key}: expected mechanism = 'central' beside it, found 'local'; "
                f"remove {key}"
            )


@dataclass(frozen=True, slots=True)
class SecureAggregationConfig:
    """``[secure_aggregation]``: the server learns the sum of a cohort's updates, and no update."""

    # Of the cohort: with fewer clients left, nothing is revealed and the round is given up.
    threshold: float = 0.6
    neighbors: int | None = None  # clients with whom each shares a mask; None: everyone
    bits: Literal[32, 64] = 32  # of the ring that the sums are in
    # The largest size of a number of an update; None: privacy.clipping_norm.
    clipping_range: float | None = None

    def __post_init__(self) -> None:
        if not 0.5 < self.threshold <= 1:
            raise ConfigError(
                "secure_aggregation.threshold: expected a share in (0.5, 1], found "
                f"{self.threshold!r}"
            )
        if self.neighbors is not None and self.neighbors < 2:
            raise ConfigError(
                "secure_aggregation.neighbors: expected a whole number >= 2, found "
                f"{self.neighbors!r}"
            )
        if self.clipping_range is not None and not 0 < self.clipping_range < math.inf:
            raise ConfigError(
                "secure_aggregation.clipping_range: expected a finite number > 0, found "
                f"{self.clipping_range!r}"
            )
