"""Is a staged release healthy on this device? Tried beside what is served, before any commit.

Three questions, in this order: are its outputs finite; is it fast enough; and is the owner's own
held-out loss not worse than with the global adapter that is installed now (the base, where there is
none). Compared with the global one and not with the personal one, since a personal adapter is
nearly always better on its owner's data than any global adapter: it is trained anew afterwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedlora.adapter import Adapter
from fedlora.data import Examples
from fedlora.device.canaries import Canaries, drift, tolerance
from fedlora.device.personal import Swapped
from fedlora.device.scoring import evaluate
from fedlora.errors import ConfigError, FedloraError, FormatError, NonFiniteError

__all__ = ["BUCKETS", "Bucket", "Health", "Limits", "bucket_of", "judge", "require_sound_base"]

Bucket = Literal["much-better", "better", "same", "worse", "much-worse", "unknown", "broken"]
BUCKETS: tuple[Bucket, ...] = (
    "much-better", "better", "same", "worse", "much-worse", "unknown", "broken",
)  # fmt: skip
SAME, MUCH = 0.01, 0.05  # relative changes of the loss between two words
SLACK = 2e-3  # seconds: what a scheduler may add to the shortest run of a tiny model


@dataclass(frozen=True, slots=True)
class Limits:
    """What a release may cost on this device."""

    margin: float = 0.05  # of the held-out loss: the share by which it may be worse than now
    min_examples: int = 8  # held-out examples; with fewer the loss is noted but decides nothing
    slower: float = 2.0  # factor of the time of a run
    runs: int = 5  # of each, in turns; the shortest counts: others were disturbed

    def __post_init__(self) -> None:
        for name in (one.name for one in fields(self)):
            value, least = getattr(self, name), 1 if name in ("slower", "runs") else 0
            if not math.isfinite(value) or value < least:
                raise ConfigError(
                    f"agent: {name}: expected a number of at least {least}, found {value}"
                )


@dataclass(frozen=True, slots=True)
class Health:
    """What was found. reason: why a release is not healthy, "" for one that is."""

    healthy: bool
    reason: str = ""
    loss_before: float | None = None  # nats; None: nothing to judge by
    loss_after: float | None = None
    seconds_before: float | None = None  # of one run on the probe
    seconds_after: float | None = None
    examples: int = 0  # held-out ones
    bucket: Bucket = "unknown"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a log."""
        return asdict(self)


def require_sound_base(session: Swapped, canaries: Canaries | None, where: str) -> float | None:
    """Return how far the base is from its canaries; the session is left with the base.

    Raises `FormatError` where that is too far. That is the device's fault and no release's, so none
    is tried and none is rejected.
    """
    if canaries is None:
        return None
    session.swap(None)
    found, most = drift(session, canaries), tolerance(session.manifest)
    if not found <= most:
        raise FormatError(
            f"{where}: expected the base to compute what it did when it was exported, within "
            f"{most:g}, found a difference of {found:.3g}; the bundle, its runtime or the memory "
            "is damaged: install the bundle again"
        )
    return found


def judge(
    session: Swapped,
    old: Adapter | None,
    new: Adapter,
    probe: npt.NDArray[Any],
    held_out: Examples | None,
    limits: Limits,
    *,
    known_good: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Health:
    """Try `new` beside `old` (None: the base); the session is left with either.

    probe: inputs of `Session.run`. held_out: the owner's, None where there are none. known_good: a
    release that was served here before, or what replaces one that was halted: its loss is noted
    and decides nothing. Whatever is raised with `new` is a reason against it.
    """
    session.swap(old)
    session.run(probe)
    before, held_out = _loss_now(session, held_out)
    try:
        session.swap(new)
        if not np.isfinite(session.run(probe)).all():
            return Health(False, "its outputs are not finite", before, bucket="broken")
        seconds = _seconds(session, old, new, probe, limits.runs, clock)
        session.swap(new)
        after = None if held_out is None else evaluate(session, held_out, "agent, new")["loss"]
    except FedloraError as error:
        return Health(False, str(error), before, bucket="broken")
    found = Health(
        True, "", before, after, *seconds,
        examples=0 if held_out is None else len(held_out), bucket=bucket_of(before, after),
    )  # fmt: skip
    reason = _reason_against(found, limits, known_good)
    return found if not reason else Health(**{**asdict(found), "healthy": False, "reason": reason})


def _loss_now(session: Swapped, held_out: Examples | None) -> tuple[float | None, Examples | None]:
    """Return the loss of what is served, and what the new adapter can be judged on.

    An installed adapter that has no finite loss must not keep a better one out.
    """
    try:
        loss = None if held_out is None else evaluate(session, held_out, "agent, now")["loss"]
    except NonFiniteError:
        return None, held_out
    except FedloraError:  # the examples are not of this bundle's kind
        return None, None
    return loss, held_out


def bucket_of(before: float | None, after: float | None) -> Bucket:
    """Return the word for a change of the loss: 1 % either way is the same, over 5 % is much.

    >>> bucket_of(2.0, 1.96), bucket_of(2.0, 2.4), bucket_of(None, 1.0)
    ('better', 'much-worse', 'unknown')
    """
    if before is None or after is None:
        return "unknown"
    if not math.isfinite(after):
        return "broken"
    change = (after - before) / max(abs(before), 1e-12)
    if abs(change) <= SAME:
        return "same"
    if change < 0:
        return "much-better" if change < -MUCH else "better"
    return "much-worse" if change > MUCH else "worse"


def _reason_against(found: Health, limits: Limits, known_good: bool) -> str:
    assert found.seconds_before is not None
    assert found.seconds_after is not None
    if found.seconds_after > limits.slower * found.seconds_before + SLACK:
        return (
            f"a run takes {found.seconds_after * 1e3:.1f} ms, expected at most {limits.slower:g} "
            f"times the {found.seconds_before * 1e3:.1f} ms of now"
        )
    before, after = found.loss_before, found.loss_after
    judged = before is not None and after is not None and found.examples >= limits.min_examples
    if judged and not known_good and after > before + limits.margin * abs(before):  # type: ignore[operator, arg-type]
        return (
            f"the held-out loss is {after:.4f}, expected at most {limits.margin:.0%} more than the "
            f"{before:.4f} of now"
        )
    return ""


def _seconds(
    session: Swapped,
    old: Adapter | None,
    new: Adapter,
    probe: npt.NDArray[Any],
    runs: int,
    clock: Callable[[], float],
) -> tuple[float, float]:
    """Return the shortest run of both, in turns, so that both meet the same disturbances."""
    best = [math.inf, math.inf]
    for _ in range(runs):
        for index, adapter in enumerate((old, new)):
            session.swap(adapter)
            start = clock()
            session.run(probe)
            best[index] = min(best[index], clock() - start)
    return best[0], best[1]
