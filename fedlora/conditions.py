"""Under what conditions rounds run: how long they wait and for whom, and what is made to go wrong.

Both tables of an experiment are data. `fedlora.federation.quorum` and `fedlora.federation.faults`
act on them, in a simulation and in a deployment alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from fedlora.errors import ConfigError

__all__ = ["FaultsConfig", "QuorumConfig"]


@dataclass(frozen=True, slots=True)
class QuorumConfig:
    """``[quorum]``: a round ends when enough clients have replied, and does not wait for the last.

    Without the table a round waits for everyone until its deadline.
    """

    share: float = 1.0  # of the cohort; so many valid replies, rounded up, end the waiting
    grace: float = 0.0  # seconds to wait for the others after that
    over_selection: float = 0.0  # so many more clients than the cohort are asked, as a share of it
    deadline: float = 3600.0  # seconds, for a round's replies and as the messages' time to live

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"quorum.share: expected a share in (0, 1], found {self.share!r}")
        for name in ("grace", "over_selection"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"quorum.{name}: expected a finite number >= 0, found {value!r}")
        if not 0 < self.deadline < math.inf:
            raise ConfigError(
                f"quorum.deadline: expected seconds, a finite number > 0, found {self.deadline!r}"
            )


@dataclass(frozen=True, slots=True)
class FaultsConfig:
    """``[faults]``: what happens to a message and its reply, each with its probability.

    Drawn by (seed, client, round), so that a run can be repeated with the same faults.
    """

    drop: float = 0.0  # the message never arrives
    crash: float = 0.0  # the client ends in the middle: an error reply
    delay: float = 0.0  # the reply comes after `seconds`
    slow: float = 0.0  # the client itself takes `seconds` longer before it replies
    duplicate: float = 0.0  # the reply comes twice
    corrupt: float = 0.0  # something in the reply is changed: numbers, shapes, digest, metrics
    seconds: float = 1.0  # of delay and slow
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("seconds", "seed") and not 0 <= value <= 1:
                raise ConfigError(
                    f"faults.{field.name}: expected a probability in [0, 1], found {value!r}"
                )
        if not 0 <= self.seconds < math.inf:
            raise ConfigError(
                f"faults.seconds: expected a finite number >= 0, found {self.seconds!r}"
            )
