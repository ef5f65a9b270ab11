"""The slots of releases: staged, tried, committed or rejected, and one step back."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fedlora.errors import (
    BaseMismatchError,
    DigestMismatchError,
    FormatError,
    ReleaseError,
    StoreError,
)
from fedlora.formats.packed import encode_packed
from fedlora.store import Store
from fedlora.store.status import MAX_REJECTED
from fedlora.store.store import MAX_TRIES
from tests.matching import raises
from tests.store.states import adapter, make_bundle


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "state", make_bundle(tmp_path / "bundle"))


def stage(store: Store, seed: int, release: int, **about: object) -> bytes:
    data = encode_packed(adapter(seed), "int8")
    given = {"digest": hashlib.sha256(data).hexdigest(), "channel": "stable", **about}
    store.stage(data, release=release, **given)  # type: ignore[arg-type]
    return data


def versions(store: Store) -> tuple[int | None, int | None, int | None]:
    """Return the releases of active, pending and previous."""
    status = store.status()
    slots = (status.installed, status.pending, status.previous)
    active, pending, previous = (None if entry is None else entry.release for entry in slots)
    return active, pending, previous


def test_a_staged_release_is_not_served_and_its_bytes_are_kept(store: Store) -> None:
    store.install_global(adapter(1))
    data = stage(store, 2, 7, provenance={"round": 3})
    assert store.serving() == adapter(1)
    pending = store.status().pending
    assert pending is not None
    assert (pending.release, pending.channel, pending.provenance) == (7, "stable", {"round": 3})
    path = store.path / "adapters" / f"{pending.digest}.safetensors"
    assert path.read_bytes() == data
    found = store.pending_adapter()
    assert found is not None
    assert found.fingerprint() == pending.fingerprint


def test_commit_keeps_what_was_before_and_revert_goes_back_once(store: Store) -> None:
    for seed, release in ((1, 5), (2, 6), (3, 8)):
        stage(store, seed, release)
        store.commit_pending(release)
    assert versions(store) == (8, None, 6)
    assert len(list((store.path / "adapters").iterdir())) == 2
    store.revert()
    assert versions(store) == (6, None, None)
    assert store.status().rejected == (8,)
    store.revert()
    assert versions(store) == (None, None, None)
    assert store.serving() is None
    assert store.status().rejected == (6, 8)
    with raises(ReleaseError, "expected a global adapter to revert, found none"):
        store.revert()


def test_three_trials_that_come_to_no_end_reject_the_release(store: Store) -> None:
    store.install_global(adapter(1))
    assert store.begin_trial() is None
    stage(store, 2, 7)
    for number in range(1, MAX_TRIES + 1):
        assert Store.open(store.path).begin_trial() is not None
        assert store.status().tries == number
    assert store.begin_trial() is None
    status = store.status()
    assert (status.pending, status.tries, status.rejected) == (None, 0, (7,))
    assert store.serving() == adapter(1)


def test_a_commit_ends_the_trials(store: Store) -> None:
    stage(store, 2, 7)
    store.begin_trial()
    store.commit_pending(7)
    assert store.status().tries == 0
    assert versions(store) == (7, None, None)
    with raises(ReleaseError, "expected release 7 to be staged, found none"):
        store.commit_pending(7)
    stage(store, 3, 8)
    with raises(ReleaseError, "expected release 9 to be staged, found 8"):
        store.commit_pending(9)


def test_the_personal_adapter_follows_what_is_active(store: Store) -> None:
    def stale() -> bool:
        personal = store.status().personal
        assert personal is not None
        return personal.stale

    stage(store, 1, 1)
    store.commit_pending(1)
    store.commit_personal(adapter(9), {})
    stage(store, 2, 2)
    assert not stale()
    store.commit_pending(2)
    assert stale()
    assert store.serving() == adapter(9)
    store.revert()
    assert not stale()
    store.revert()
    assert stale(), "the base is not what it started from"


def test_an_adapter_in_a_slot_is_staged_again_without_its_bytes(store: Store) -> None:
    for seed, release in ((1, 1), (2, 2)):
        digest = hashlib.sha256(stage(store, seed, release)).hexdigest()
        store.commit_pending(release)
    first = store.status().previous
    assert first is not None
    assert store.stage_again(first.digest, channel="stable", release=3)
    assert versions(store) == (2, 3, 1)
    store.commit_pending(3)
    assert versions(store) == (3, None, 2)
    assert not store.stage_again("0" * 64, channel="stable", release=4)
    assert store.stage_again(digest, channel="stable", release=5)


def test_what_is_installed_by_hand_leaves_nothing_to_go_back_to(store: Store) -> None:
    stage(store, 1, 1)
    store.commit_pending(1)
    stage(store, 2, 2)
    store.install_global(adapter(3))
    assert versions(store) == (None, 2, None)
    store.commit_pending(2)
    store.revert()
    assert store.serving() == adapter(3)


def test_rejected_releases_are_remembered_and_not_without_end(store: Store) -> None:
    stage(store, 1, 1)
    assert store.reject_pending()
    assert not store.reject_pending()
    for release in range(2, MAX_REJECTED + 10):
        store.reject(release)
    commits = store.status().commits
    store.reject(MAX_REJECTED)
    assert store.status().commits == commits
    rejected = store.status().rejected
    assert len(rejected) == MAX_REJECTED
    assert rejected[-1] == MAX_REJECTED + 9
    stage(store, 1, 99)
    assert store.drop_pending()
    assert not store.drop_pending()
    assert 99 not in store.status().rejected


def test_only_a_release_with_its_digest_and_base_enters_a_slot(store: Store) -> None:
    data = encode_packed(adapter(1))
    with raises(DigestMismatchError, "release 1: expected SHA-256 000000"):
        store.stage(data, digest="0" * 64, channel="stable", release=1)
    junk = b"x" * 100
    digest = hashlib.sha256(junk).hexdigest()
    with pytest.raises(FormatError):
        store.stage(junk, digest=digest, channel="stable", release=1)
    for base, text in (("cd" * 32, "found one of cdcdcdcdcdcd"), (None, "found one of no base")):
        data = encode_packed(adapter(1, base=base))
        with raises(BaseMismatchError, text):
            digest = hashlib.sha256(data).hexdigest()
            store.stage(data, digest=digest, channel="stable", release=1)
    assert store.status().commits == 0
    assert list((store.path / "adapters").iterdir()) == []


def test_a_damaged_slot_is_not_served(store: Store) -> None:
    for seed, release in ((1, 1), (2, 2)):
        stage(store, seed, release)
        store.commit_pending(release)
    stage(store, 3, 3)
    status = store.status()
    for entry in (status.previous, status.pending):
        assert entry is not None
        (store.path / "adapters" / f"{entry.digest}.safetensors").write_bytes(b"damaged")
    with raises(DigestMismatchError, "expected SHA-256"):
        store.commit_pending(3)
    with raises(DigestMismatchError, "expected SHA-256"):
        store.revert()
    (store.path / "adapters" / f"{status.pending.digest}.safetensors").unlink()  # type: ignore[union-attr]
    with raises(ReleaseError, "cannot be read"):
        store.commit_pending(3)
    assert versions(store) == (2, 3, 1)


def test_slots_are_changed_by_the_holder_of_the_lock_alone(store: Store) -> None:
    stage(store, 1, 1)
    other = Store.open(store.path)
    with store.lock():
        for change in (
            lambda: other.commit_pending(1), other.begin_trial, other.reject_pending,
            other.drop_pending, other.revert, lambda: stage(other, 2, 2),
        ):  # fmt: skip
            with raises(StoreError, "another process is writing"):
                change()
        store.commit_pending(1)
    assert versions(other) == (1, None, None)
