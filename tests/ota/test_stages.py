"""Staged rollouts: the rule, the repository under it, reports, and ten thousand devices."""

from __future__ import annotations

import http.client
import json
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from fedlora.agent.health import BUCKETS, Limits, bucket_of
from fedlora.agent.report import report_bytes, send
from fedlora.errors import ConfigError, DownloadError, PublishError
from fedlora.ota.releases import Device, Release, Rollout, Stage, choose, share_of
from fedlora.ota.reports import METRICS, Counts, collector, count, read_counts
from fedlora.ota.stages import Plan, advance, decide, release_before
from tests.matching import raises
from tests.ota.world import World, make_world
from tests.store.states import BASE

DEVICES = 10_000
IDS = [f"device {number}" for number in range(DEVICES)]


@pytest.mark.parametrize(
    ("percent", "healthy", "failed", "action", "then"),
    [
        (1.0, 0, 0, "wait", 1.0),
        (1.0, 49, 0, "wait", 1.0),
        (1.0, 50, 0, "raise", 10.0),
        (1.0, 49, 1, "raise", 10.0),  # exactly 2 %
        (1.0, 0, 1, "wait", 1.0),  # one failure alone may be that device's own
        (1.0, 0, 2, "halt", 1.0),  # of 50 it would be 4 %
        (1.0, 3, 2, "halt", 1.0),
        (10.0, 400, 0, "wait", 10.0),  # those of the first step do not decide for the second
        (10.0, 500, 0, "raise", 100.0),
        (10.0, 600, 13, "halt", 10.0),  # 2.1 %
        (100.0, 9000, 100, "done", 100.0),
        (100.0, 9000, 300, "halt", 100.0),
        (5.0, 250, 0, "raise", 10.0),  # set by hand between two steps
        (0.0, 0, 0, "raise", 1.0),  # published, offered to nobody yet
    ],
)
def test_the_rule(percent: float, healthy: int, failed: int, action: str, then: float) -> None:
    found = decide(percent, Counts(healthy, failed), Plan())
    assert (found.action, found.percent) == (action, then)


@pytest.mark.parametrize(
    ("about", "text"),
    [
        ({"steps": (10.0, 1.0)}, "expected rising percentages"),
        ({"steps": ()}, "expected rising percentages"),
        ({"steps": (1.0, 101.0)}, "expected rising percentages"),
        ({"max_failures": 2.0}, "expected a share in [0, 1)"),
        ({"min_reports": 0}, "expected at least 1"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(about: dict[str, object], text: str) -> None:
    with raises(ConfigError, text):
        Plan(**about)  # type: ignore[arg-type]


# Ten thousand devices, without a network: the functions that devices and the server call.


def release(version: int, digest: str) -> Release:
    return Release("stable", version, digest * 64, 1000, BASE)


@dataclass
class Simulated:
    """A fleet, a channel and the server's view of it. Devices poll in a random order.

    worse: by digest, how much the loss changes on a device, as a mean and a spread over devices. Of
    the devices `judging` have data of their own; the others find every release healthy.
    """

    worse: dict[str, tuple[float, float]]
    judging: float = 0.5
    releases: dict[int, Release] = field(default_factory=dict)
    rollout: Rollout = field(default_factory=lambda: Rollout("stable"))
    reports: list[bytes] = field(default_factory=list)
    touched: dict[int, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.devices = [Device(id, BASE, "b" * 64, None, "0.1.0") for id in IDS]
        self.has_data = self.random.random(DEVICES) < self.judging
        self.change = {  # of each device's loss, against the release before
            digest: self.random.normal(*about, DEVICES) for digest, about in self.worse.items()
        }

    def publish(self, digest: str, percent: float) -> int:
        version = len(self.releases) + 1
        self.releases[version] = release(version, digest)
        self.rollout = self.rollout.with_stage(Stage(version, percent))
        return version

    def poll(self, share: float) -> None:
        """Let a share of the devices poll, try what they find, and report."""
        for number in np.flatnonzero(self.random.random(DEVICES) < share):
            device = self.devices[number]
            found, _ = choose(self.rollout, self.releases.get, device)
            if found is None:
                continue
            self.touched.setdefault(found.version, set()).add(int(number))
            change = self.change[found.digest[0]][number]
            again = any(
                old.digest == found.digest for v, old in self.releases.items() if v < found.version
            )
            judged = self.has_data[number] and not again
            healthy = not judged or change <= Limits().margin
            word = bucket_of(1.0, 1.0 + change) if judged else "unknown"
            self.reports.append(report_bytes(found.version, bool(healthy), word))
            if healthy:
                self.devices[number] = replace(device, active=found.version)
            else:
                self.devices[number] = replace(device, rejected=device.rejected | {found.version})

    def digest(self, number: int) -> str | None:
        active = self.devices[number].active
        return None if active is None else self.releases[active].digest[0]

    def advance(self, plan: Plan) -> str:
        """What `advance` does to a repository, here to plain values."""
        stage = self.rollout.stages[-1]
        found = decide(stage.percent, count(self.reports).get(stage.version, Counts()), plan)
        if found.action == "raise":
            self.rollout = self.rollout.with_stage(replace(stage, percent=found.percent))
        elif found.action == "halt":
            self.rollout = self.rollout.with_stage(replace(stage, halted=True))
            before = release_before(list(self.releases.values()), self.rollout, stage.version)
            assert before is not None
            self.publish(before.digest[0], 100.0)
        return found.action


@pytest.mark.parametrize("percent", [1.0, 10.0, 50.0, 100.0])
def test_each_step_reaches_its_share_of_ten_thousand_devices(percent: float) -> None:
    for version in (1, 2, 3):
        reached = sum(share_of(id, "stable", version) < percent for id in IDS) / DEVICES * 100
        # The share of one release has a standard deviation of 0.5 points at most (at 50 %).
        assert reached == pytest.approx(percent, abs=1.0)


def test_who_was_reached_stays_reached() -> None:
    shares = {id: share_of(id, "stable", 7) for id in IDS}
    first = {id for id, share in shares.items() if share < 1}
    assert first < {id for id, share in shares.items() if share < 10}
    # And another release begins with others: 1 % of 1 % would be one device.
    assert len(first & {id for id in IDS if share_of(id, "stable", 8) < 1}) < 10


def test_a_good_release_reaches_everyone_by_its_steps() -> None:
    fleet = Simulated({"a": (0.0, 0.0), "c": (-0.05, 0.03)})
    fleet.publish("a", 100.0)
    fleet.poll(1.0)
    version = fleet.publish("c", 1.0)
    seen = []
    for _ in range(40):
        fleet.poll(0.2)
        percent = fleet.rollout.stages[-1].percent
        if not seen or seen[-1][0] != percent:
            seen.append((percent, len(fleet.touched.get(version, ()))))
        if fleet.advance(Plan()) == "done" and len(fleet.touched[version]) == DEVICES:
            break
    assert [percent for percent, _ in seen] == [1.0, 10.0, 100.0]
    served = sum(fleet.digest(number) == "c" for number in range(DEVICES))
    # A few in ten thousand are worse off with it by over 5 %, and keep what they have.
    assert served >= 0.99 * DEVICES


@pytest.mark.parametrize("judging", [1.0, 0.3, 0.1])
def test_a_bad_release_is_halted_and_everyone_comes_back(judging: float) -> None:
    """20 % worse, give or take a tenth: some devices even like it. Whoever has no data takes it."""
    fleet = Simulated({"a": (0.0, 0.0), "c": (0.2, 0.1)}, judging)
    fleet.publish("a", 100.0)
    fleet.poll(1.0)
    assert all(fleet.digest(number) == "a" for number in range(DEVICES))
    bad = fleet.publish("c", 1.0)
    actions = []
    for _ in range(60):
        fleet.poll(0.05)
        actions.append(fleet.advance(Plan()))
        if actions[-1] == "halt":
            break
    touched = len(fleet.touched[bad])
    print(f"judging {judging:.0%}: halted with {touched} of {DEVICES} devices touched")
    assert actions[-1] == "halt"
    assert "raise" not in actions
    assert touched <= 0.02 * DEVICES
    served = [fleet.digest(number) for number in range(DEVICES)]
    assert 0 < served.count("c") <= touched or judging == 1.0

    for _ in range(200):  # everyone polls at some time
        fleet.poll(0.1)
        if all(device.active == bad + 1 for device in fleet.devices):
            break
    assert {fleet.digest(number) for number in range(DEVICES)} == {"a"}
    assert {device.active for device in fleet.devices} == {bad + 1}


# The same on a repository.


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def test_a_repository_is_raised_halted_and_goes_back(world: World) -> None:
    world.publish(1)
    world.publish(2, rollout=1.0)
    publisher, plan = world.publisher, Plan()
    assert advance(publisher, "stable", {}, plan).decision.action == "wait"
    found = advance(publisher, "stable", {2: Counts(healthy=60)}, plan)
    assert (found.version, found.decision.percent) == (2, 10.0)
    assert publisher.channel("stable").stage(2) == Stage(2, 10.0)
    found = advance(publisher, "stable", {2: Counts(60, 5)}, plan)
    assert found.decision.reason == "5 of 65 reports are failures, expected at most 2.0%"
    assert found.republished is not None
    first = publisher.releases()[0]
    assert (found.republished.version, found.republished.digest) == (3, first.digest)
    assert publisher.channel("stable").stage(2) == Stage(2, 10.0, halted=True)
    assert publisher.channel("stable").stage(3) == Stage(3, 100.0)
    assert advance(publisher, "stable", {2: Counts(60, 5)}, plan).decision.action == "done"


def test_without_a_release_before_or_the_targets_key_a_halt_says_what_is_left(
    world: World,
) -> None:
    world.publish(1, rollout=1.0)
    found = advance(world.publisher, "stable", {1: Counts(0, 2)}, Plan())
    assert (found.decision.action, found.republished) == ("halt", None)
    assert "no release before it" in found.note
    with raises(PublishError, "expected a newest release that is offered"):
        advance(world.publisher, "stable", {}, Plan())

    world.publish(2)
    world.publish(3, rollout=1.0)
    for path in (world.folder / "keys" / "targets").iterdir():
        path.rename(world.folder / path.name)
    found = advance(world.publisher, "stable", {3: Counts(0, 2)}, Plan())
    assert (found.decision.action, found.republished) == ("halt", None)
    assert "until release 2 is republished" in found.note
    assert world.publisher.channel("stable").stage(3) == Stage(3, 1.0, halted=True)


def test_a_rollout_is_not_raised_past_what_the_targets_key_signed(world: World) -> None:
    world.publish(1, rollout=1.0, limit=5.0)
    found = advance(world.publisher, "stable", {1: Counts(healthy=60)}, Plan())
    assert found.decision.action == "wait"
    assert "5 % at most" in found.decision.reason


def test_going_back_passes_over_halted_withdrawn_and_equal_releases() -> None:
    rollout = Rollout("stable", tuple(Stage(v, 100.0, halted=v == 3) for v in (1, 2, 3, 4, 5, 6)))
    found = [release(1, "a"), release(2, "b"), release(3, "c"), release(4, "f"),
             replace(release(5, "d"), withdrawn=True), release(6, "f")]  # fmt: skip
    before = release_before(found, rollout, 6)
    assert before is not None
    assert before.version == 2
    assert release_before(found, rollout, 1) is None


# Reports over HTTP.


def test_reports_are_collected_as_they_came_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "reports.jsonl"
    server = collector(path, port=0)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    port = server.server_address[1]
    url = f"http://127.0.0.1:{port}/reports"
    bodies = [report_bytes(3, True, "same"), report_bytes(3, False, "much-worse")]
    odd: list[tuple[str, dict[str, str], int]] = [
        ("{}", {}, 400),
        ('{"version":3,"healthy":true,"metric":"same","id":"x"}', {}, 400),
        ('{"version":3,"healthy":true,"metric":"my name"}', {}, 400),
        ('{"version":3,"healthy":1,"metric":"same"}', {}, 400),
        ("x" * 300, {}, 413),
        ("", {"Content-Length": "-1"}, 411),
    ]
    try:
        for body in bodies:
            send(url, body)
        for text, headers, expected in odd:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("POST", "/", text, headers)
            assert connection.getresponse().status == expected
            connection.close()
        with raises(DownloadError, "found status 400"):
            send(url, b"[]")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert path.read_bytes() == b"".join(body + b"\n" for body in bodies)
    assert read_counts(path) == {3: Counts(1, 1, {"same": 1, "much-worse": 1})}
    with path.open("ab") as file:
        file.write(b"not a report\n" + json.dumps({"version": 4}).encode())
    assert read_counts(path)[3].total == 2
    assert read_counts(tmp_path / "none") == {}


def test_collector_and_devices_know_the_same_words() -> None:
    assert frozenset(BUCKETS) == METRICS
