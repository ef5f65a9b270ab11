"""Local differential privacy: a device clips and noises its own update before anything is sent.

    told = clipped update + N(0, (z C)^2)

Nobody needs to be trusted but the device. Every number that it sends is noised as if it were alone,
so that the mean of K devices has the noise of one divided by the root of K, where a central server
would add it once.

What it costs: neighbors are two data sets that the same device may have (replace-one), whose
clipped updates can point in opposite ways. So one release is a Gaussian mechanism of sensitivity
2 C, with no amplification by sampling, as the server knows who has answered. In the ledger that is
a cohort of one out of a population of one: the accountant takes such an event as replace-one, at
twice the norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedlora.errors import ConfigError
from fedlora.low_rank import Matrix
from fedlora.privacy.clipping import clip
from fedlora.privacy.events import PrivacyEvent
from fedlora.privacy.noise import normals

__all__ = ["NO_LIMITS", "LocalNoise", "NoiseLimits", "local_event"]


@dataclass(frozen=True, slots=True)
class LocalNoise:
    """How a device is to noise what it sends."""

    clipping_norm: float  # C
    noise_multiplier: float  # z

    def __post_init__(self) -> None:
        for name in ("clipping_norm", "noise_multiplier"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"{name}: expected a finite number > 0, found {value!r}")

    def applied(self, update: Matrix, key: bytes) -> Matrix:
        """Return an update ``(n,)`` clipped and noised, float64. key: a new one for each call."""
        clipped = clip(update, self.clipping_norm)
        found: Matrix = clipped + self.noise_multiplier * self.clipping_norm * normals(
            key, len(clipped)
        )
        return found


@dataclass(frozen=True, slots=True)
class NoiseLimits:
    """What a device's owner demands of local noise, whatever a server orders."""

    min_noise_multiplier: float = 0.0  # 0: noise is not demanded
    max_clipping_norm: float | None = None  # None: as it is ordered

    def agreed(self, ordered: LocalNoise | None) -> LocalNoise | None:
        """Return the noise that the device puts on: never less than either of the two wants.

        Raises `ConfigError` where the server orders none and the owner demands some.
        """
        if ordered is None:
            if self.min_noise_multiplier or self.max_clipping_norm is not None:
                raise ConfigError(
                    "this device's owner demands local noise (node config min-noise-multiplier, "
                    "max-clipping-norm), and the server orders none; take part in a run with "
                    "privacy.mechanism = 'local'"
                )
            return None
        most = ordered.clipping_norm if self.max_clipping_norm is None else self.max_clipping_norm
        return LocalNoise(
            min(ordered.clipping_norm, most),
            max(ordered.noise_multiplier, self.min_noise_multiplier),
        )


NO_LIMITS = NoiseLimits()


def local_event(noise_multiplier: float, count: int = 1) -> PrivacyEvent:
    """Return what one device spends by `count` replies; see the module's text."""
    return PrivacyEvent(noise_multiplier, "fixed", 1.0, 1, 1, count)
