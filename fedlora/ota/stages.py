"""A staged rollout: 1 → 10 → 100 % of the devices, raised and halted by what devices report.

`decide` is the rule, a pure function of counts; `advance` applies it to a repository. It is called
every few minutes, by hand or by a timer, where the online keys are:

- More than `max_failures` of the reports are failures → halt. Until `min_reports` have come, their
  number stands in for that of the reports: with 50 and 2 %, the second failure halts, at once.
- Enough reports came → the next step. "Enough" grows with the share of the devices that may report:
  50 at 1 % are 500 at 10 %, so the reports of the first step do not decide for the second.
- Otherwise wait.

A halted release is offered to nobody. So that the devices that have it come back, the release
before it is published again as the newest one, for everyone (that needs the targets key). Nothing
here knows a device: the share is decided on the devices (`fedlora.ota.releases.share_of`), and
reports name nobody.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedlora.errors import ConfigError, PublishError
from fedlora.ota.releases import Release, Rollout
from fedlora.ota.reports import Counts

if TYPE_CHECKING:
    from fedlora.ota.publisher import Publisher

__all__ = ["Advanced", "Decision", "Plan", "advance", "decide", "release_before"]


@dataclass(frozen=True, slots=True)
class Plan:
    """steps: percent of the devices, rising. max_failures: share of the reports."""

    steps: tuple[float, ...] = (1.0, 10.0, 100.0)
    max_failures: float = 0.02
    min_reports: int = 50  # at the first step

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0.0, *self.steps), self.steps, strict=False))
        if not self.steps or not rising or self.steps[-1] > 100:
            raise ConfigError(
                f"steps: expected rising percentages over 0 up to 100, such as 1,10,100, found "
                f"{','.join(f'{step:g}' for step in self.steps)}"
            )
        if not 0 <= self.max_failures < 1:
            raise ConfigError(
                f"max-failures: expected a share in [0, 1), such as 0.02, found {self.max_failures}"
            )
        if self.min_reports < 1:
            raise ConfigError(f"min-reports: expected at least 1, found {self.min_reports}")

    def needed(self, percent: float) -> int:
        """Return how many reports allow the step after `percent`."""
        return math.ceil(self.min_reports * max(1.0, percent / self.steps[0]))


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with a release; percent: offered to afterwards."""

    action: Literal["wait", "raise", "halt", "done"]
    percent: float
    reason: str


@dataclass(frozen=True, slots=True)
class Advanced:
    """What `advance` did."""

    version: int
    decision: Decision
    counts: Counts
    republished: Release | None = None  # the release before, as the newest one
    note: str = ""  # why nothing was republished after a halt


def decide(percent: float, counts: Counts, plan: Plan) -> Decision:
    """Return what to do with a release that is offered to `percent` of the devices.

    >>> decide(1.0, Counts(healthy=60, failed=1), Plan()).action
    'raise'
    >>> decide(1.0, Counts(healthy=7, failed=2), Plan()).action
    'halt'
    """
    told = f"{counts.failed} of {counts.total} reports are failures"
    if counts.failed > plan.max_failures * max(counts.total, plan.min_reports):
        return Decision("halt", percent, f"{told}, expected at most {plan.max_failures:.1%}")
    later = [step for step in plan.steps if step > percent]
    if not later:
        return Decision("done", percent, told)
    needed = plan.needed(percent) if percent else 0
    if counts.total < needed:
        return Decision("wait", percent, f"{told}, {needed} reports are needed")
    return Decision("raise", later[0], told)


def release_before(releases: Sequence[Release], rollout: Rollout, version: int) -> Release | None:
    """Return the newest release before `version` to go back to, None where there is none.

    Of the same channel and base, offered until now, not halted or withdrawn, and another adapter.
    """
    bad = next(release for release in releases if release.version == version)
    for release in sorted(releases, key=lambda one: one.version, reverse=True):
        stage = rollout.stage(release.version)
        if (
            release.version < version
            and (release.channel, release.base) == (bad.channel, bad.base)
            and release.digest != bad.digest
            and not release.withdrawn
            and stage is not None
            and not stage.halted
            and stage.percent > 0
        ):
            return release
    return None


def advance(publisher: Publisher, channel: str, counts: dict[int, Counts], plan: Plan) -> Advanced:
    """Raise, halt or leave the newest offered release of a channel.

    Where the targets key is missing after a halt, nothing is republished, and the note says how.
    Raises `PublishError` without a release that is offered, or without the online keys.
    """
    rollout = publisher.channel(channel)
    offered = [stage for stage in rollout.stages if not stage.halted]
    if not offered or rollout.stages[-1].halted:
        raise PublishError(
            f"{publisher.path}: channel {channel}: expected a newest release that is offered, "
            "found none; publish one, or republish the one before"
        )
    stage = offered[-1]
    found = counts.get(stage.version, Counts())
    decision = decide(stage.percent, found, plan)
    if decision.action == "raise":
        release = next(one for one in publisher.releases() if one.version == stage.version)
        if decision.percent > release.limit:
            reason = f"the targets key allows {release.limit:g} % at most"
            return Advanced(stage.version, Decision("wait", stage.percent, reason), found)
        publisher.set_rollout(stage.version, decision.percent)
    if decision.action != "halt":
        return Advanced(stage.version, decision, found)
    publisher.halt(stage.version)
    before = release_before(publisher.releases(), publisher.channel(channel), stage.version)
    if before is None:
        note = "there is no release before it: devices that have it keep it until the next one"
        return Advanced(stage.version, decision, found, None, note)
    try:
        notes = f"release {before.version} again: release {stage.version} was halted"
        again = publisher.republish(before.version, notes=notes)
    except PublishError as error:
        note = f"devices keep it until release {before.version} is republished: {error}"
        return Advanced(stage.version, decision, found, None, note)
    return Advanced(stage.version, decision, found, again)
