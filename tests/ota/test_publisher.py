"""A repository: made, changed, its keys replaced, and cut off at every instant of a change."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

import fedlora as fl
from fedlora.errors import ExpiryError, PublishError
from fedlora.ota import DeviceUpdater, Keys, Publisher, Stage
from fedlora.ota.publisher import KEPT
from fedlora.ota.roles import now
from fedlora.store import Store
from tests.matching import raises
from tests.ota.folder import URL, read_from
from tests.ota.world import World, make_world
from tests.store.power_cut import Disk, PowerCut
from tests.store.states import adapter


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def test_a_release_says_where_it_comes_from(world: World) -> None:
    path = world.folder / "a.safetensors"
    about = {"run": "keyboard", "round": 20, "method": "fedit", "epsilon": 2.5, "delta": 1e-6}
    fl.save_adapter(adapter(1), path, codec="int8", provenance=about)
    release = world.publisher.publish(path, rollout=1, notes="first", provenance={"more": True})
    assert release.version == 1
    assert release.provenance == {**about, "more": True}
    assert world.publisher.releases() == [release]
    assert world.publisher.channel("stable").stages == (Stage(1, 1.0),)
    (file,) = (world.repository / "targets" / "stable").iterdir()
    assert file.name == f"{release.digest}.1.safetensors"
    assert file.read_bytes() == path.read_bytes()


def test_versions_count_over_all_channels(world: World) -> None:
    world.publish(1, channel="beta")
    world.publish(2)
    again = world.publisher.republish(1, channel="stable", rollout=5)
    assert [(r.channel, r.version) for r in world.publisher.releases()] == [
        ("beta", 1), ("stable", 2), ("stable", 3),
    ]  # fmt: skip
    assert again.digest == world.publisher.releases()[0].digest
    assert world.publisher.channel("stable").stages == (Stage(2), Stage(3, 5.0))


def test_rollout_and_halt_need_the_online_keys_only(world: World) -> None:
    world.publish(1, rollout=1)
    shutil.rmtree(world.folder / "keys" / "root")
    shutil.rmtree(world.folder / "keys" / "targets")
    assert world.publisher.set_rollout(1, 10) == Stage(1, 10)
    assert world.publisher.halt(1) == Stage(1, 10, True)
    assert world.publisher.channel("stable").stages == (Stage(1, 10, True),)
    assert world.publisher.set_rollout(1, 20) == Stage(1, 20, False)
    world.publisher.refresh()
    for change in (
        lambda: world.publish(2),
        lambda: world.publisher.republish(1),
        lambda: world.publisher.halt(1, withdraw=True),
    ):
        with raises(PublishError, "targets: expected 1 of the 1 private keys of the role targets"):
            change()
    with raises(PublishError, "role root, found 0"):
        world.publisher.rotate("timestamp")
    assert len(world.publisher.releases()) == 1


def test_signed_offline_and_made_visible_online(world: World) -> None:
    """The targets key's machine has no online keys; the other one no targets key."""
    online = world.folder / "keys" / "online"
    online.rename(world.folder / "online")
    world.publish(1)
    assert world.publisher.channel("stable").stages == ()
    assert not world.publisher.roles.is_published()
    with raises(PublishError, "online"):
        world.publisher.set_rollout(1, 10)
    (world.folder / "online").rename(online)
    (world.folder / "keys" / "targets").rename(world.folder / "targets")
    world.publisher.refresh()
    assert world.publisher.roles.is_published()
    world.publisher.set_rollout(1, 10)
    assert world.publisher.status()["channels"]["stable"][0]["rollout"] == {
        "percent": 10.0, "halted": False,
    }  # fmt: skip


def test_the_signed_limit_binds_the_rollout(world: World) -> None:
    world.publish(1, limit=5.0, rollout=1.0)
    assert world.publisher.set_rollout(1, 5.0) == Stage(1, 5.0)
    with raises(PublishError, "at most 5 percent, which the targets key signed, found 6"):
        world.publisher.set_rollout(1, 6)


def test_what_cannot_be_published_is_refused_before_anything_is_written(world: World) -> None:
    before = sorted(world.repository.rglob("*"))  # with the lock
    path = world.folder / "a.safetensors"
    fl.save_adapter(adapter(1, base=None), path)
    with raises(PublishError, "expected an adapter that names its base"):
        world.publisher.publish(path)
    fl.save_adapter(adapter(1), path)
    with pytest.raises(fl.errors.ConfigError, match="channel"):
        world.publisher.publish(path, channel="Stable!")
    with pytest.raises(fl.errors.ConfigError, match="percent"):
        world.publisher.publish(path, rollout=101)
    with pytest.raises(fl.errors.FormatError):
        world.publisher.publish(world.folder / "bundle" / "infer.onnx")
    with raises(PublishError, "expected a release of this repository, found 5; known: none"):
        world.publisher.set_rollout(5, 10)
    assert sorted(world.repository.rglob("*")) == before
    with raises(PublishError, "there is a repository already"):
        Publisher.create(world.repository, Keys(world.folder / "keys"))
    with raises(PublishError, "fedlora ota init"):
        Publisher(world.folder / "none", Keys(world.folder / "keys")).refresh()


def test_keys_are_their_owners_alone_and_apart(world: World) -> None:
    folder = world.folder / "keys"
    found = sorted(p.relative_to(folder).parent.as_posix() for p in folder.rglob("*.pem"))
    assert found == ["online/rollout", "online/snapshot", "online/timestamp", "root", "targets"]
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if path.is_file() else 0o700)
    published = b"".join(p.read_bytes() for p in world.repository.rglob("*") if p.is_file())
    assert b"PRIVATE" not in published


def test_private_keys_are_never_in_the_folder_that_is_published(tmp_path: Path) -> None:
    for folder in ("r", "r/keys", "r/targets/../keys"):
        with raises(PublishError, "expected the private keys outside of the repository"):
            Publisher.create(tmp_path / "r", Keys(tmp_path / folder))
    assert not (tmp_path / "r").exists()


def test_a_passphrase_locks_the_keys(tmp_path: Path) -> None:
    few = {"root": (1, 1)}
    made = Publisher.create(tmp_path / "r", Keys(tmp_path / "k", "correct horse"), thresholds=few)
    made.refresh()
    assert all(b"ENCRYPTED" in path.read_bytes() for path in (tmp_path / "k").rglob("*.pem"))
    for wrong in (None, "wrong"):
        with raises(PublishError, "is the passphrase right?"):
            Publisher(tmp_path / "r", Keys(tmp_path / "k", wrong)).refresh()


@pytest.mark.parametrize(("count", "needed"), [(1, 2), (0, 0), (3, 0)])
def test_a_threshold_beyond_the_keys_is_refused(tmp_path: Path, count: int, needed: int) -> None:
    with raises(PublishError, "1 <= threshold <= keys"):
        Publisher.create(tmp_path / "r", Keys(tmp_path / "k"), thresholds={"root": (count, needed)})
    assert not (tmp_path / "k").exists()


def test_two_of_three_root_keys_are_enough_and_one_is_not(tmp_path: Path) -> None:
    made = Publisher.create(tmp_path / "r", Keys(tmp_path / "k"))
    first, second, _ = sorted((tmp_path / "k" / "root").iterdir())
    first.unlink()
    made.rotate("timestamp")
    assert made.roles.root().version == 2
    second.unlink()
    with raises(PublishError, "expected 2 of the 3 private keys of the role root, found 1"):
        made.rotate("timestamp")
    assert made.roles.root().version == 2


def test_a_timestamp_lives_for_a_day_and_refresh_renews_it(world: World) -> None:
    early = now()
    later = Publisher(
        world.repository, world.publisher.keys, clock=lambda: early + timedelta(hours=20)
    )
    left = (world.publisher.roles.timestamp().expires - early).total_seconds()
    assert 0 < left <= 86_400
    later.refresh()
    assert later.roles.timestamp().expires == early + timedelta(hours=44)
    assert later.roles.snapshot().version == 1, "half of its week is not over"
    much_later = Publisher(
        world.repository, world.publisher.keys, clock=lambda: early + timedelta(days=4)
    )
    much_later.refresh()
    assert much_later.roles.snapshot().version == 2
    assert much_later.roles.rollout().version == 2
    assert much_later.roles.targets().version == 1
    much_later.renew("targets")
    much_later.renew("root")
    for role in ("targets", "root"):
        signed = getattr(much_later.roles, role)()
        assert signed.version == 2
        assert signed.expires == early + timedelta(days=369)
    with raises(PublishError, "expected the role root or targets"):
        much_later.renew("timestamp")


def test_old_metadata_is_removed_and_roots_are_kept(world: World) -> None:
    clock: list[datetime] = [now()]
    publisher = Publisher(world.repository, world.publisher.keys, clock=lambda: clock[0])
    (world.repository / "metadata" / ".x.json.tmp").write_bytes(b"left by a kill")
    for _ in range(KEPT + 4):
        clock[0] += timedelta(days=4)
        publisher.refresh()
    publisher.rotate("timestamp")
    publisher.refresh()
    names = {path.name for path in (world.repository / "metadata").iterdir()}
    assert len([name for name in names if name.endswith(".snapshot.json")]) == KEPT
    assert len([name for name in names if name.endswith(".rollout.json")]) == KEPT
    assert {"1.root.json", "2.root.json", "1.targets.json"} <= names
    assert not any(name.startswith(".") for name in names)


def test_the_targets_name_the_newest_releases_only(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedlora.ota.publisher.LISTED", 2)
    for _ in range(4):
        world.publish(1)
    assert [release.version for release in world.publisher.releases()] == [3, 4]


def test_two_publishers_at_once(world: World) -> None:
    other = Publisher(world.repository, world.publisher.keys)
    with world.publisher._lock(), raises(PublishError, "another process is publishing here"):
        other.refresh()


# Each change of a repository, and which release a device may find after a cut in its middle.
CHANGES: dict[str, Callable[[World], object]] = {
    "publish": lambda world: world.publish(2),
    "republish": lambda world: world.publisher.republish(1),
    "rollout": lambda world: world.publisher.set_rollout(1, 100),
    "halt and withdraw": lambda world: world.publisher.halt(1, withdraw=True),
    "refresh": lambda world: world.publisher.refresh(),
    "rotate root": lambda world: world.publisher.rotate("root"),
    "rotate targets": lambda world: world.publisher.rotate("targets"),
    "rotate snapshot": lambda world: world.publisher.rotate("snapshot"),
    "rotate timestamp": lambda world: world.publisher.rotate("timestamp"),
    "rotate rollout": lambda world: world.publisher.rotate("rollout"),
}


# Cuts at every eighth call; FEDLORA_SEARCH=1 cuts at each.
STRIDE = 1 if os.environ.get("FEDLORA_SEARCH") else 8


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A repository with release 1, and a device that serves the base and has polled once."""
    world = make_world(tmp_path_factory.mktemp("prepared"))
    world.publish(1)
    with pytest.MonkeyPatch.context() as patch:
        read_from(world.repository, patch)
        updater = DeviceUpdater(URL, world.store, bootstrap=world.root)
        assert updater.fetch() is not None
    world.store.drop_pending()
    return world


@pytest.mark.parametrize("name", CHANGES)
def test_a_cut_anywhere_in_a_change_leaves_a_repository_that_devices_accept(
    name: str, prepared: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    place = tmp_path / "live"
    done, stop, polls = False, 0, 0
    while not done:
        shutil.rmtree(place, ignore_errors=True)
        for folder in ("repository", "keys", "state"):
            shutil.copytree(prepared.folder / folder, place / folder, symlinks=True)
        disk = Disk(place / "repository")
        publisher = Publisher(place / "repository", Keys(place / "keys"))
        world = World(place, publisher, Store.open(place / "state"), prepared.root)
        with disk.watched(stop):
            try:
                CHANGES[name](world)
                done = True
            except PowerCut:
                pass
        how = ("forgets", "renames first", random)[polls % 3]
        stop += STRIDE
        image = disk.after_cut(place / "image", how if not done else "forgets")
        with monkeypatch.context() as patch:
            read_from(image, patch)
            updater = DeviceUpdater(URL, world.store, bootstrap=prepared.root)
            found = updater.fetch()
            assert (found and found.version) in {None, 1, 2}
            if done and name in ("publish", "republish"):
                assert found is not None
                assert found.version == 2
            # The publisher goes on from there, and devices follow.
            again = Publisher(image, Keys(place / "keys"))
            again.refresh()
            updater.fetch()
            polls += 1
    assert polls >= 2
    print(f"{name}: {stop} places, {polls} polls")


def test_an_old_device_follows_a_chain_of_rotations(
    prepared: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("repository", "keys", "state"):
        shutil.copytree(prepared.folder / folder, tmp_path / folder, symlinks=True)
    publisher = Publisher(tmp_path / "repository", Keys(tmp_path / "keys"))
    for role in ("root", "timestamp", "root", "targets", "rollout", "snapshot"):
        publisher.rotate(role, count=2, threshold=2)
    read_from(tmp_path / "repository", monkeypatch)
    updater = DeviceUpdater(URL, tmp_path / "state", bootstrap=prepared.root)
    found = updater.fetch()
    assert found is not None
    assert found.version == 1
    root = json.loads((tmp_path / "repository/metadata/6.root.json").read_text())["signed"]
    assert {role: about["threshold"] for role, about in root["roles"].items()} == {
        "root": 2, "snapshot": 2, "targets": 2, "timestamp": 2,
    }  # fmt: skip


def test_a_lost_key_is_replaced_without_it(
    prepared: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("repository", "keys", "state"):
        shutil.copytree(prepared.folder / folder, tmp_path / folder, symlinks=True)
    shutil.rmtree(tmp_path / "keys" / "online" / "timestamp")
    publisher = Publisher(tmp_path / "repository", Keys(tmp_path / "keys"))
    with raises(PublishError, "role timestamp, found 0"):
        publisher.refresh()
    publisher.rotate("timestamp")
    read_from(tmp_path / "repository", monkeypatch)
    found = DeviceUpdater(URL, tmp_path / "state", bootstrap=prepared.root).fetch()
    assert found is not None


def test_a_repository_that_nobody_refreshes_is_refused_and_accepted_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    past = Publisher(
        world.repository, world.publisher.keys, clock=lambda: now() - timedelta(days=2)
    )
    path = world.folder / "a.safetensors"
    fl.save_adapter(adapter(1), path)
    past.publish(path)
    read_from(world.repository, monkeypatch)
    updater = DeviceUpdater(URL, world.store, bootstrap=world.root)
    with raises(ExpiryError, "expired", "refreshed"):
        updater.fetch()
    world.publisher.refresh()
    found = updater.fetch()
    assert found is not None
    assert found.version == 1
