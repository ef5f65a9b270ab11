"""A device's side: what a poll costs, what is kept over cuts and restarts, and what goes wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedlora as fl
from fedlora.errors import (
    ConfigError,
    DownloadError,
    ExpiryError,
    FedloraError,
    MetadataError,
    ReleaseError,
    StoreError,
)
from fedlora.files import write_atomic
from fedlora.ota import DeviceUpdater, Limits, Release
from fedlora.ota.updater import CLOCK_TOLERANCE
from fedlora.store import Store
from tests.matching import raises
from tests.ota.folder import URL, read_from
from tests.ota.web import Request, Web, cut_after, drip, status
from tests.ota.world import World, big_adapter, big_bundle, make_world
from tests.store.power_cut import Disk, PowerCut
from tests.store.states import BASE, adapter


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


@pytest.fixture
def web(world: World) -> Iterator[Web]:
    with Web(world.repository) as found:
        yield found


def fetched(updater: DeviceUpdater) -> Release:
    found = updater.fetch()
    assert found is not None
    return found


def test_fetched_is_staged_committed_is_served_reverted_is_gone(world: World, web: Web) -> None:
    updater = world.updater(web)
    assert updater.fetch() is None
    world.publish(1, notes="first")
    first = fetched(updater)
    assert (first.version, first.notes) == (1, "first")
    assert world.store.serving() is None
    assert world.store.pending_adapter() == adapter(1)
    updater.commit(first)
    assert world.store.serving() == adapter(1)
    world.publish(2)
    second = fetched(updater)
    assert fetched(updater) == second, "until it is committed or reverted"
    updater.revert(second)
    assert world.store.serving() == adapter(1)
    assert updater.fetch() is None
    assert updater.last_poll is not None
    assert updater.last_poll.passed_over == {2: "rejected on this device"}
    world.publish(3)
    third = fetched(updater)
    updater.commit(third)
    assert world.store.serving() == adapter(3)
    updater.revert(third)
    assert world.store.serving() == adapter(1)
    commits = world.store.status().commits
    updater.revert(second)
    updater.revert(third)
    assert world.store.status().commits == commits, "both are rejected already"
    with raises(ReleaseError, "expected release 2 to be staged, found none"):
        updater.commit(second)
    with raises(ReleaseError, "release 9 is neither staged nor served"):
        updater.revert(replace(third, version=9))


def test_a_release_that_brings_the_process_down_is_rejected_by_itself(
    world: World, web: Web
) -> None:
    world.publish(1)
    updater = world.updater(web)
    for _ in range(3):
        fetched(updater)
        assert updater.store.begin_trial() == adapter(1)  # and the process is gone
    release = fetched(updater)
    assert updater.store.begin_trial() is None
    updater.revert(release)
    assert updater.fetch() is None
    assert world.store.serving() is None


def test_a_poll_without_news_is_two_requests_and_less_than_three_kilobytes(
    world: World, web: Web
) -> None:
    world.publish(1)
    updater = world.updater(web)
    updater.commit(fetched(updater))
    for _ in range(3):  # a renewed timestamp is no news
        world.publisher.refresh()
        web.forget()
        assert updater.fetch() is None
        assert web.paths() == ["metadata/2.root.json", "metadata/timestamp.json"]
        print(f"poll: {web.sent} bytes received, {web.received} bytes sent, headers included")
        assert web.sent + web.received <= 3000
    assert updater.last_poll is not None
    assert updater.last_poll.requests == 2


def test_going_back_by_republishing_needs_no_download(world: World, web: Web) -> None:
    updater = world.updater(web)
    for seed in (1, 2):
        world.publish(seed)
        updater.commit(fetched(updater))
    world.publisher.republish(1)
    release = fetched(updater)
    assert release.version == 3
    assert updater.last_poll is not None
    assert not updater.last_poll.downloaded
    updater.commit(release)
    assert world.store.serving() == adapter(1)


def test_a_halted_release_is_dropped_where_it_was_not_committed(world: World, web: Web) -> None:
    updater = world.updater(web)
    world.publish(1)
    updater.commit(fetched(updater))
    world.publish(2)
    fetched(updater)
    world.publisher.halt(2)
    assert updater.fetch() is None
    status = world.store.status()
    assert (status.pending, status.rejected) == (None, ())
    assert status.installed is not None
    assert status.installed.release == 1
    assert len(list((world.store.path / "adapters").iterdir())) == 1
    world.publisher.set_rollout(2, 100)
    assert fetched(updater).version == 2


def test_a_newer_release_takes_the_place_of_a_staged_one(world: World, web: Web) -> None:
    updater = world.updater(web)
    world.publish(1)
    fetched(updater)
    world.store.begin_trial()
    world.publish(2)
    assert fetched(updater).version == 2
    assert world.store.status().tries == 0
    assert world.store.pending_adapter() == adapter(2)


def test_channels_are_apart_and_a_change_of_channel_never_goes_back(world: World, web: Web) -> None:
    world.publish(1, channel="stable")
    world.publish(2, channel="beta")
    beta = world.updater(web, channel="beta")
    beta.commit(fetched(beta))
    assert world.store.serving() == adapter(2)
    stable = world.updater(web, channel="stable")
    assert stable.fetch() is None, "1 is older than 2"
    world.publisher.republish(2, channel="stable")
    assert fetched(stable).version == 3


def test_the_devices_id_is_made_once_and_never_sent(world: World, web: Web) -> None:
    world.publish(1)
    sent: list[str] = []

    def note(request: Request) -> None:
        sent.append(f"{request.path}\n{request.headers}")
        file = web.folder / request.path.lstrip("/")
        request.answer(file.read_bytes() if file.is_file() else b"", 200 if file.is_file() else 404)

    web.rules[".*"] = note
    fetched(world.updater(web))
    path = world.store.path / "ota" / "device-id"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    first = path.read_text()
    fetched(world.updater(web))
    assert path.read_text() == first == world.updater(web).device().id
    assert len(sent) == 8
    assert not any(first[:16] in text for text in sent)
    path.write_bytes(b"\xff damaged")
    second = world.updater(web).device().id
    assert len(second) == 64
    assert second != first


def test_everything_of_an_updater_is_its_owners_alone(world: World, web: Web) -> None:
    world.publish(1)
    old = os.umask(0o077)
    try:
        updater = world.updater(web)
        updater.commit(fetched(updater))
    finally:
        os.umask(old)
    for path in world.store.path.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


# A megabyte over a link that is cut


@pytest.fixture(scope="module")
def megabyte(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A repository with one release of a megabyte, and a device for it."""
    folder = tmp_path_factory.mktemp("megabyte")
    world = make_world(folder, bundle=big_bundle(folder / "bundle"))
    fl.save_adapter(big_adapter(1), folder / "a.safetensors")
    release = world.publisher.publish(folder / "a.safetensors")
    assert 1.0e6 < release.num_bytes < 1.05e6
    return world


@pytest.fixture
def device(megabyte: World, tmp_path: Path) -> World:
    """A device of its own for the megabyte."""
    shutil.copytree(megabyte.store.path, tmp_path / "state")
    store = Store.open(tmp_path / "state")
    return World(megabyte.folder, megabyte.publisher, store, megabyte.root)


def test_a_megabyte_over_a_link_that_is_cut_every_50_kb(device: World) -> None:
    with Web(device.repository) as web:
        web.rules["targets/.*"] = cut_after(50_000)
        updater = device.updater(web)
        release = fetched(updater)
        sent = web.sent
        print(f"{release.num_bytes} bytes: {sent} sent in {len(web.log)} answers, "
              f"{sent / release.num_bytes:.4f}")  # fmt: skip
        # All that the server sent, metadata and headers included.
        assert sent <= 1.05 * release.num_bytes
        assert len([path for path in web.paths() if path.startswith("targets")]) >= 20
    updater.commit(release)
    assert device.store.serving() == big_adapter(1)


def test_what_has_come_survives_restarts(device: World) -> None:
    received = []
    with Web(device.repository) as web:
        web.rules["targets/.*"] = cut_after(200_000)
        one = Limits(gap=0.5, attempts=1, pause=0.01, deadline=5)
        for _ in range(10):
            count = iter(range(100))

            def once(request: Request, count: Iterator[int] = count) -> None:
                (cut_after(200_000) if next(count) == 0 else status(503))(request)

            web.rules["targets/.*"] = once
            web.forget()
            try:
                release = fetched(device.updater(web, limits=one))
            except DownloadError:
                received.append(web.sent)
                continue
            break
        assert len(received) == 5
        assert release.version == 1
        assert sum(received) < 1.05 * release.num_bytes
    assert list((device.store.path / "ota" / "partial").iterdir()) == []


def test_a_file_that_changed_on_the_server_is_sent_whole(device: World) -> None:
    """If-Range: the part is of another file, so the server sends all of the new one."""
    with Web(device.repository) as web:
        count = iter(range(100))
        real = next(device.repository.glob("targets/stable/*")).read_bytes()

        def do(request: Request) -> None:
            if next(count) == 0:
                request.data = bytes(len(real))  # same length, another ETag
                cut_after(100_000)(request)
            else:
                request.answer(real)

        web.rules["targets/.*"] = do
        release = fetched(device.updater(web))
        asked = [ranges for path, ranges in web.log if path.startswith("targets")]
        assert asked == [None, "bytes=100000-"]
        assert web.sent < 1.2 * release.num_bytes


def test_a_slow_link_ends_the_download_and_keeps_what_has_come(device: World) -> None:
    with Web(device.repository) as web:
        web.rules["targets/.*"] = drip(400, 0.005)
        slow = Limits(gap=0.5, deadline=0.5, attempts=2, pause=0.01)
        with pytest.raises(fl.errors.SlowDownloadError, match=r"not done after 0\.5 s"):
            device.updater(web, limits=slow).fetch()
        (part,) = (device.store.path / "ota" / "partial").glob("*.part")
        have = part.stat().st_size
        assert have > 0
        web.rules.clear()
        web.forget()
        fetched(device.updater(web))
        assert web.log[-1][1] == f"bytes={have}-"


# The device's own disk and clock


@pytest.mark.parametrize("where", ["metadata", "partial", "adapters", "state.json", "device-id"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_no_more_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, where: str, code: int
) -> None:
    """Full and read-only, at each place that an update writes to."""
    read_from(world.repository, monkeypatch)
    updater = DeviceUpdater(URL, world.store, bootstrap=world.root)
    world.publish(1)
    updater.commit(fetched(updater))
    world.publish(2)
    if where == "device-id":
        (world.store.path / "ota" / "device-id").unlink()
    real = os.open

    def full(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_CREAT and where in str(path) and not str(path).endswith(".lock"):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        with pytest.raises(FedloraError, match=os.strerror(code)) as caught:
            updater.fetch()
        assert "\n" not in str(caught.value)
    assert world.store.serving() == adapter(1)
    assert world.store.status().pending is None
    updater.commit(fetched(updater))
    assert world.store.serving() == adapter(2)


def test_a_disk_that_is_full_in_the_middle_of_a_file(
    device: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_from(device.repository, monkeypatch)
    updater = DeviceUpdater(URL, device.store, bootstrap=device.root)
    real = os.fdopen
    left = [300_000]

    class Full:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def write(self, data: Any) -> int:
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= len(data)
            return int(self._file.write(data))

    with monkeypatch.context() as patch:
        patch.setattr(
            os, "fdopen",
            lambda fd, *a, **k: Full(real(fd, *a, **k)) if "buffering" in k else real(fd, *a, **k),
        )  # fmt: skip
        with raises(StoreError, "partial", "No space left on device"):
            updater.fetch()
    (part,) = (device.store.path / "ota" / "partial").glob("*.part")
    assert part.stat().st_size >= 300_000
    assert fetched(updater).version == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_state_is_one_line(world: World, web: Web) -> None:
    world.store.path.chmod(0o500)
    with pytest.raises(StoreError, match="cannot be written"):
        world.updater(web).fetch()
    world.store.path.chmod(0o700)


def test_a_clock_that_was_set_back_is_noticed(world: World, web: Web) -> None:
    world.publish(1)
    clock = [time.time()]
    updater = world.updater(web, clock=lambda: clock[0])
    updater.commit(fetched(updater))
    clock[0] -= CLOCK_TOLERANCE - 60
    assert updater.fetch() is None
    web.forget()
    clock[0] -= 10 * 86_400
    with raises(ExpiryError, "the clock is 11.0 days behind the last update"):
        updater.fetch()
    assert web.log == []
    clock[0] += 20 * 86_400
    assert updater.fetch() is None
    assert world.store.serving() == adapter(1)
    (world.store.path / "ota" / "latest-time").write_bytes(b"yesterday")
    assert updater.fetch() is None


def test_two_updaters_at_once(world: World, web: Web) -> None:
    world.publish(1)
    web.rules["targets/.*"] = drip(10, 0.05)
    done: list[Release | None] = []
    first = world.updater(web)
    thread = threading.Thread(target=lambda: done.append(first.fetch()))
    thread.start()
    while not any(path.startswith("targets") for path in web.paths()):
        time.sleep(0.005)
    with raises(StoreError, "another process is updating this device"):
        world.updater(web).fetch()
    # A download holds nobody up who uses the state.
    world.store.commit_personal(adapter(5), {})
    thread.join()
    assert done[0] is not None
    updater = world.updater(web)
    assert fetched(updater) == done[0]
    with world.store.lock(), raises(StoreError, "another process is writing to this state"):
        DeviceUpdater(web.url, world.store.path, bootstrap=world.root).commit(done[0])
    updater.commit(done[0])
    assert world.store.global_adapter() == adapter(1)
    assert world.store.serving() == adapter(5)


def test_wrong_settings_are_refused_at_once(world: World) -> None:
    for url in ("ftp://x", "example.com/adapters", "http://", "file:///etc/passwd", "http://x:y"):
        with raises(ConfigError, "expected a URL that begins with https://"):
            DeviceUpdater(url, world.store, bootstrap=world.root)
    with raises(ConfigError, "channel"):
        DeviceUpdater(URL, world.store, bootstrap=world.root, channel="../x")
    with raises(ConfigError, "limits: gap: expected a positive number"):
        Limits(gap=0)
    with raises(StoreError, "fedlora device init"):
        DeviceUpdater(URL, world.folder / "none", bootstrap=world.root)


@pytest.mark.parametrize("root", [b"", b"{}", b"\xff", b'{"signed": {"_type": "root"}}'])
def test_a_root_that_is_none_is_one_line(world: World, web: Web, root: bytes) -> None:
    with pytest.raises(MetadataError) as caught:
        world.updater(web, bootstrap=root).fetch()
    assert "\n" not in str(caught.value)


def test_the_root_of_another_repository_is_refused(world: World, web: Web, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = make_world(tmp_path / "other")
    world.publish(1)
    with pytest.raises(fl.errors.SignatureError, match="whom this device trusts"):
        world.updater(web, bootstrap=other.root).fetch()


# Power cuts and damage


def test_a_power_cut_at_any_call_of_an_update_leaves_a_device_that_updates(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cuts from the first request to the end of the commit; every device then gets release 2."""
    read_from(world.repository, monkeypatch)
    world.publish(1)
    updater = DeviceUpdater(URL, world.store, bootstrap=world.root)
    updater.commit(fetched(updater))
    world.publish(2)
    stride = 1 if os.environ.get("FEDLORA_SEARCH") else 5
    random = np.random.default_rng(0)
    done, stop, cuts = False, 0, 0
    versions = set()
    while not done:
        live = tmp_path / "live"
        shutil.rmtree(live, ignore_errors=True)
        shutil.copytree(world.store.path, live, symlinks=True)
        (live / "ota" / "metadata" / "root.json").unlink()  # a link, which the account has not
        disk = Disk(live)
        with disk.watched(stop):
            try:
                updater = DeviceUpdater(URL, live, bootstrap=world.root)
                updater.commit(fetched(updater))
                done = True
            except PowerCut:
                pass
        how = ("forgets", "renames first", random)[cuts % 3]
        stop, cuts = stop + stride, cuts + 1
        image = disk.after_cut(tmp_path / f"image{cuts}", how)
        store = Store.open(image)
        status = store.status()
        assert status.installed is not None
        version = status.installed.release
        assert version in (1, 2)
        assert not done or version == 2
        versions.add(version)
        assert store.serving() == adapter(version)
        again = DeviceUpdater(URL, image, bootstrap=world.root)
        if version == 1:
            again.commit(fetched(again))
        assert again.fetch() is None
        assert store.serving() == adapter(2)
        names = {path.name for path in image.iterdir()}
        assert names <= {".lock", "adapters", "bundle", "cache", "ota", "state.json"}
        assert len(list((image / "adapters").iterdir())) == 2
        assert list((image / "ota" / "partial").glob("*")) == []
        shutil.rmtree(image)
    assert versions == {1, 2}
    assert cuts >= 10
    print(f"{stop} calls, {cuts} cuts")


def test_leftovers_of_kills_are_removed(world: World, web: Web) -> None:
    world.publish(1)
    updater = world.updater(web)
    updater.commit(fetched(updater))
    ota = world.store.path / "ota"
    junk = [ota / "metadata" / "tmpabc123", ota / ".device-id.x1", ota / ".latest-time.x2",
            ota / "partial" / "old.part", ota / "partial" / ".x.json.y"]  # fmt: skip
    for path in junk:
        path.write_bytes(b"half")
    world.publish(2)
    updater.commit(fetched(updater))
    assert not any(path.exists() for path in junk)


def test_metadata_that_grew_is_not_fetched_without_bound(world: World, web: Web) -> None:
    web.rules[r"metadata/timestamp\.json"] = b" " * 20_000
    with pytest.raises(DownloadError, match="expected at most 16,384 bytes"):
        world.updater(web).fetch()


def test_the_state_of_an_earlier_version_is_read(world: World, web: Web) -> None:
    """Version 1 had one global adapter, under another key."""
    world.store.install_global(adapter(5), {"round": 3})
    path = world.store.path / "state.json"
    record = json.loads(path.read_text())
    active = record.pop("active")
    del active["channel"], active["release"]
    for name in ("previous", "pending", "tries", "rejected"):
        del record[name]
    write_atomic(path, json.dumps({**record, "version": 1, "global": active}).encode())
    store = Store.open(world.store.path)
    assert store.serving() == adapter(5)
    world.publish(1)
    updater = world.updater(web)
    updater.commit(fetched(updater))
    assert store.serving() == adapter(1)
    store.revert()
    assert store.serving() == adapter(5)
    assert store.status().rejected == (1,)
    assert store.status().bundle.base == BASE
