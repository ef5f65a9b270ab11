"""What a device allows a download: time, rate and size."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields

from tuf.api.exceptions import SlowRetrievalError

from fedlora.errors import ConfigError

__all__ = ["Limits", "Pace", "TooSlow"]


class TooSlow(SlowRetrievalError):
    """Too few bytes in their time, or too late: what another connection would not mend."""


@dataclass(frozen=True, slots=True)
class Limits:
    """A server that keeps within `gap` between bytes can still hold a device for ever; the
    minimum rate and the deadlines end that. A release may take many polls: what has arrived is
    kept, and resumed."""

    gap: float = 30.0  # seconds: to connect, and between two bytes
    metadata_deadline: float = 60.0  # seconds: of one metadata file
    deadline: float = 3600.0  # seconds: of a release, with all its cuts
    minimum_rate: float = 1024.0  # bytes per second, over any `rate_window` seconds
    rate_window: float = 20.0  # seconds
    max_bytes: int = 1 << 26  # of a release
    attempts: int = 4  # connections in a row that bring not one byte
    pause: float = 0.5  # seconds after the first of them, doubled after each other one

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("minimum_rate", "pause") else 1e-9
            if not math.isfinite(value) or value < least:
                raise ConfigError(
                    f"limits: {field.name}: expected a positive number, found {value}"
                )


class Pace:
    """Raises `TooSlow` when bytes come too slowly; one for all parts of a download."""

    def __init__(self, limits: Limits, deadline: float) -> None:
        self._limits = limits
        self._since = time.monotonic()
        self._bytes = 0
        self._deadline = deadline
        self.end = self._since + deadline

    def left(self) -> float:
        """Return the seconds until the deadline; raises when there are none."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise self.late()
        return left

    def late(self) -> TooSlow:
        """Return the error of a deadline that has passed."""
        return TooSlow(f"not done after {self._deadline:g} s")

    def add(self, num_bytes: int) -> None:
        """Count bytes that have come."""
        self.left()
        self._bytes += num_bytes
        seconds = time.monotonic() - self._since
        if seconds >= self._limits.rate_window:
            rate = self._bytes / seconds
            if rate < self._limits.minimum_rate:
                raise TooSlow(
                    f"{rate:.0f} bytes/s over {seconds:.1f} s, at least "
                    f"{self._limits.minimum_rate:.0f} are expected"
                )
            self._since += seconds
            self._bytes = 0
