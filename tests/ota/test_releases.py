"""Which release a device takes, and the share of devices that take it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

from fedlora.errors import ConfigError, ReleaseError
from fedlora.ota.releases import (
    MAX_LISTED,
    Device,
    Release,
    Rollout,
    Stage,
    choose,
    is_at_least,
    share_of,
)
from tests.matching import raises

BASE, DIGEST = "ab" * 32, "cd" * 32
IDS = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(10_000)]


def release(version: int, **about: object) -> Release:
    given = {"channel": "stable", "digest": DIGEST, "num_bytes": 10, "base": BASE, **about}
    return Release(version=version, **given)  # type: ignore[arg-type]


def device(**about: object) -> Device:
    given = {"id": IDS[0], "base": BASE, "bundle": "ef" * 32, "bundle_version": "0.1.0",
             "fedlora": "0.2.0", **about}  # fmt: skip
    return Device(**given)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=[1, 8])
def shares(request: pytest.FixtureRequest) -> list[float]:
    return [share_of(one, "stable", request.param) for one in IDS]


@pytest.mark.parametrize("percent", [0.0, 0.5, 1.0, 10.0, 50.0, 99.0, 100.0])
def test_a_rollout_reaches_its_share_of_ten_thousand_devices(
    percent: float, shares: list[float]
) -> None:
    found = sum(share < percent for share in shares)
    # The share of 10,000 fair draws has a standard deviation of at most 0.5 points; 1 is asked.
    assert abs(100 * found / len(IDS) - percent) <= 1.0
    assert percent not in (0.0, 100.0) or found == percent * 100


def test_a_device_takes_what_its_share_says() -> None:
    offered = Rollout("stable", (Stage(8, 10.0),))
    takes = [choose(offered, release, device(id=one))[0] is not None for one in IDS[:500]]
    assert takes == [share_of(one, "stable", 8) < 10 for one in IDS[:500]]
    assert 25 < sum(takes) < 80  # 50 expected, within four standard deviations of 6.7


def test_whoever_is_in_at_one_percent_is_in_at_ten_and_others_are_first_next_time() -> None:
    first = {one for one in IDS if share_of(one, "stable", 1) < 1}
    assert first < {one for one in IDS if share_of(one, "stable", 1) < 10}
    again = {one for one in IDS if share_of(one, "stable", 2) < 1}
    # Independent draws: 1 of the 100 is expected in both.
    assert len(first & again) <= 8
    assert share_of("a", "stable", 7) == pytest.approx(73.5884, abs=1e-4)


def test_the_share_is_the_same_everywhere_and_for_ever() -> None:
    """Pinned: another hash would start every rollout anew with other devices."""
    assert [round(share_of(one, "beta", 3), 6) for one in IDS[:3]] == PINNED


PINNED = [57.075209, 79.79321, 18.212142]

# What the newest of two releases is, beside what else may be wrong; then who is chosen, and why.
CHOICES = {
    "the newest": ({}, {}, {}, 2, None),
    "halted": ({"halted": True}, {}, {}, 1, "halted"),
    "withdrawn": ({}, {"withdrawn": True}, {}, 1, "halted"),
    "not rolled out": ({"percent": 0}, {}, {}, 1, "not yet rolled out to this device"),
    "beyond its limit": ({}, {"limit": 0}, {}, 1, "not yet rolled out to this device"),
    "another base": ({}, {"base": "00" * 32}, {}, 1, "for another base"),
    "another bundle": ({}, {"bundle": "00" * 32}, {}, 1, "for another bundle"),
    "this bundle": ({}, {"bundle": "ef" * 32}, {}, 2, None),
    "newer bundle": ({}, {"minimum_bundle": "0.1.1"}, {}, 1, "needs a bundle exported by"),
    "bundle of unknown age": (
        {}, {"minimum_bundle": "0.0.1"}, {"bundle_version": None}, 1, "needs a bundle"
    ),
    "old bundle is enough": ({}, {"minimum_bundle": "0.1"}, {}, 2, None),
    "newer fedlora": ({}, {"minimum_fedlora": "0.10"}, {}, 1, "needs fedlora 0.10"),
    "rejected here": ({}, {}, {"rejected": frozenset({2})}, 1, "rejected on this device"),
    "too large": ({}, {"num_bytes": 101}, {"max_bytes": 100}, 1, "has 101 bytes"),
    "has it": ({}, {}, {"active": 2}, None, None),
    "has a newer one": ({}, {}, {"active": 7}, None, None),
    "has the older one": ({}, {}, {"active": 1}, 2, None),
    "has the older one, the newer is halted": ({"halted": True}, {}, {"active": 1}, None, "halted"),
}  # fmt: skip


@pytest.mark.parametrize(("stage", "about", "here", "chosen", "reason"), CHOICES.values(),
                         ids=CHOICES.keys())  # fmt: skip
def test_a_device_takes_the_newest_release_that_is_for_it(
    stage: dict, about: dict, here: dict, chosen: int | None, reason: str | None
) -> None:
    offered = Rollout("stable", (Stage(1), Stage(2, **{"percent": 100, **stage})))
    known = {1: release(1), 2: release(2, **about)}
    found, reasons = choose(offered, known.get, device(**here))
    assert (found and found.version) == chosen
    assert (reason is None) == (not reasons)
    if reason is not None:
        assert reason in reasons[2]


def test_a_release_and_a_rollout_come_back_as_they_were_signed() -> None:
    full = release(
        7, bundle="ef" * 32, minimum_bundle="0.1", minimum_fedlora="0.1.0", notes="été",
        provenance={"epsilon": 2.5, "delta": 1e-6, "rounds": 20}, limit=12.5, withdrawn=True,
    )  # fmt: skip
    for one in (full, release(1)):
        custom = json.loads(json.dumps(one.custom()))
        path = f"stable/{one.version}.safetensors"
        assert Release.from_custom(custom, path=path, digest=DIGEST, num_bytes=10) == one
    offered = Rollout("stable", (Stage(1, 0.01), Stage(2, 33.3, True)))
    assert Rollout.from_custom(json.loads(json.dumps(offered.custom())), "stable") == offered
    # What TUF signs has no fractions at all.
    assert not any(isinstance(value, float) for value in full.custom().values())


def test_a_rollout_forgets_its_oldest_releases() -> None:
    offered = Rollout("stable")
    for version in range(1, MAX_LISTED + 5):
        offered = offered.with_stage(Stage(version))
    assert len(offered.stages) == MAX_LISTED
    assert offered.stages[-1].version == MAX_LISTED + 4
    assert offered.with_stage(Stage(10, 3.0)).stage(10) == Stage(10, 3.0)
    assert offered.stage(1) is None


BAD = {
    "channel in capitals": ({"channel": "Stable"}, "channel: expected"),
    "channel that is a path": ({"channel": "../x"}, "channel: expected"),
    "the rollout's own name": ({"channel": "rollout"}, "channel: expected"),
    "version 0": ({"version": 0}, "version: expected"),
    "version that is true": ({"version": True}, "version: expected"),
    "no digest": ({"digest": "xy"}, "digest: expected a SHA-256"),
    "no bytes": ({"num_bytes": 0}, "num_bytes"),
    "half a step": ({"limit": 0.005}, "limit: expected 0 to 100 percent in steps of 0.01"),
    "more than all": ({"limit": 100.5}, "limit"),
    "not a number": ({"limit": float("nan")}, "limit"),
    "long notes": ({"notes": "x" * 2001}, "notes: expected at most 2000"),
    "large provenance": ({"provenance": {"x": "y" * 9000}}, "provenance"),
    "no version": ({"minimum_fedlora": "latest"}, "minimum_fedlora"),
}


@pytest.mark.parametrize(("about", "text"), BAD.values(), ids=BAD.keys())
def test_what_makes_no_sense_is_refused(about: dict, text: str) -> None:
    with raises(ConfigError, text):
        replace(release(1), **about)


def test_percentages_of_a_stage_are_refused_the_same() -> None:
    for percent in (-1, 101, 0.001, True, "10"):
        with raises(ConfigError, "rollout of release 1: expected 0 to 100 percent"):
            Stage(1, percent)  # type: ignore[arg-type]


STRANGE = {
    "nothing": None,
    "a later format": {**release(1).custom(), "fedlora": 2},
    "an unknown key": {**release(1).custom(), "also": 1},
    "a missing key": {k: v for k, v in release(1).custom().items() if k != "notes"},
    "a limit as a fraction": {**release(1).custom(), "limit": 99.5},
    "a provenance that is no text": {**release(1).custom(), "provenance": {}},
    "another version": {**release(1).custom(), "version": 2},
    "another channel": {**release(1).custom(), "channel": "beta"},
}


@pytest.mark.parametrize("custom", STRANGE.values(), ids=STRANGE.keys())
def test_strange_metadata_is_one_line(custom: object) -> None:
    with raises(ReleaseError, "target"):
        Release.from_custom(custom, path="stable/1.safetensors", digest=DIGEST, num_bytes=10)


@pytest.mark.parametrize(
    "stages", [None, [1], [{"version": 1}], [{"version": 1, "percent": 101_00, "halted": False}],
               [{"version": 1, "percent": 100, "halted": 0}],
               [{"version": v, "percent": 100, "halted": False} for v in range(1, 40)]]
)  # fmt: skip
def test_a_strange_rollout_is_one_line(stages: object) -> None:
    custom = {"fedlora": 1, "channel": "stable", "stages": stages}
    with raises(ReleaseError, "rollout/stable.json"):
        Rollout.from_custom(custom, "stable")


def test_versions_are_compared_as_numbers() -> None:
    assert is_at_least("0.10.0", "0.9")
    assert is_at_least("1.0.0rc1", "1")
    assert not is_at_least("0.1.9", "0.2")
    assert not is_at_least(None, "0")
    assert not is_at_least("unknown", "0.0.0")
