"""Power cuts at every call of a commit: the store opens with one whole state or the other."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fedlora as fl
from fedlora.errors import FedloraError, StoreError
from fedlora.formats.packed import encode_packed
from fedlora.store import Store
from tests.store.power_cut import Disk, PowerCut
from tests.store.states import adapter, make_bundle

IMAGES = 4  # drawn at random for each cut, beside the two extremes
GLOBAL, PERSONAL, NEW, OTHER = map(adapter, (1, 2, 3, 4))

DATA = encode_packed(NEW)


def stage(store: Store) -> None:
    """Stage the new adapter as release 7."""
    store.stage(DATA, digest=hashlib.sha256(DATA).hexdigest(), channel="stable", release=7)


# What is done, and what is then served globally and personally.
ACTIONS: dict[str, tuple[Callable[[Store], object], tuple[fl.Adapter | None, ...]]] = {
    "commit_personal": (lambda s: s.commit_personal(NEW, {"loss": 1.0}), (GLOBAL, NEW)),
    "install_global": (lambda s: s.install_global(NEW, {"round": 2}), (NEW, PERSONAL)),
    "install_both": (
        lambda s: s.install_both(NEW, OTHER, provenance={"round": 2}, metrics={"loss": 1.0}),
        (NEW, OTHER),
    ),
    "the global one alone": (
        lambda s: s.install_both(NEW, None, provenance={}, metrics={}),
        (NEW, None),
    ),
    "forget": (lambda s: s.forget(), (GLOBAL, None)),
    "commit a release": (lambda s: s.commit_pending(7), (NEW, PERSONAL)),
    "the same again": (lambda s: s.commit_personal(PERSONAL, {}), (GLOBAL, PERSONAL)),
}
OLD = (GLOBAL, PERSONAL)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    store = Store.create(folder / "state", make_bundle(folder / "bundle"))
    store.install_global(GLOBAL)
    store.commit_personal(PERSONAL, {"loss": 2.0})
    stage(store)
    (store.cache / "sentences").write_bytes(b"private")
    return store.path


class Bench:
    """Copies of the prepared state, and of what power cuts leave of them."""

    def __init__(self, prepared: Path, folder: Path) -> None:
        self.prepared, self.folder = prepared, folder
        self.random = np.random.default_rng(0)
        self.images = 0

    def start(self) -> Disk:
        root = self.folder / "live"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.prepared, root)
        return Disk(root)

    def found_after_cut(self, disk: Disk) -> list[tuple[fl.Adapter | None, ...]]:
        """Open what is left, in several ways that a cut can leave it; check that it goes on."""
        found = []
        for how in ("forgets", "renames first", *[self.random] * IMAGES):
            image = disk.after_cut(self.folder / "image", how)
            self.images += 1
            store = Store.open(image)
            found.append((store.global_adapter(), store.personal_adapter()))
            assert store.serving() is not None
            with store.lock():
                pass
            names = {path.name for path in (image / "adapters").iterdir()}
            assert names == {f"{digest}.safetensors" for digest in store.status().digests()}
            assert not list(image.glob(".state.json.*"))
            assert (store.global_adapter(), store.personal_adapter()) == found[-1]
            shutil.rmtree(image)
        return found


@pytest.fixture
def bench(prepared: Path, tmp_path: Path) -> Bench:
    return Bench(prepared, tmp_path)


def run(disk: Disk, action: Callable[[Store], object], stop: int | None) -> bool:
    """Return whether the action came to its end."""
    with disk.watched(stop):
        try:
            action(Store.open(disk.root))
        except PowerCut:
            return False
        return True


@pytest.mark.parametrize("name", ACTIONS)
def test_a_power_cut_at_any_call_leaves_the_old_state_or_the_new_one(
    name: str, bench: Bench
) -> None:
    action, new = ACTIONS[name]
    done, stop, seen = False, 0, []
    while not done:
        disk = bench.start()
        done = run(disk, action, stop)
        stop += 1
        found = bench.found_after_cut(disk)
        assert set(found) <= {OLD, new}
        if done or _is_committed(disk):
            assert set(found) == {new}, "what was committed is there whatever else is lost"
        if not any(call[0] == "rename" and _is_state(call[1], disk) for call in disk.calls):
            assert set(found) == {OLD}, "nothing is there before the commit point"
        seen.extend(found)
    assert set(seen) == {OLD, new}
    # Create, write, flush, fsync, chmod, rename, fsync of the folder, of state.json at least.
    assert stop >= 8
    print(f"{name}: {stop} places, {bench.images} disks")


def test_a_power_cut_while_a_killed_commit_is_cleared_up_loses_nothing(bench: Bench) -> None:
    """The kill leaves what was not flushed in memory, where the next process sees it."""
    action, new = ACTIONS["commit_personal"]
    killed, at = False, 0
    while not killed:
        disk = bench.start()
        killed, at, cleared, stop = run(disk, action, at), at + 1, False, 0
        before = disk.calls
        while not cleared:
            again = bench.start()
            run(again, action, len(before) if not killed else None)
            with again.watched(stop):
                try:
                    with Store.open(again.root).lock():
                        cleared = True
                except PowerCut:
                    pass
            stop += 1
            assert set(bench.found_after_cut(again)) <= {OLD, new}
    print(f"{at} kills, {bench.images} disks")


def test_a_power_cut_while_a_state_is_made_leaves_a_whole_one_or_none(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    done, stop = False, 0
    random = np.random.default_rng(0)
    while not done:
        shutil.rmtree(tmp_path / "home", ignore_errors=True)
        (tmp_path / "home").mkdir()
        disk = Disk(tmp_path / "home")
        with disk.watched(stop):
            try:
                Store.create(tmp_path / "home" / "state", bundle)
                done = True
            except PowerCut:
                pass
        stop += 1
        for how in ("forgets", "renames first", random, random):
            image = disk.after_cut(tmp_path / "image", how)
            try:
                store = Store.open(image / "state")
            except StoreError:
                assert not done
                store = Store.create(image / "state", bundle)
            assert store.serving() is None
            for name in ("base.onnx.data", "infer.onnx", "manifest.json"):
                assert (store.bundle / name).read_bytes() == (bundle / name).read_bytes()
            assert [path.name for path in image.iterdir()] == ["state"]
            shutil.rmtree(image)
    assert stop >= 20


# A program with one of these bugs must be caught, or the tests above prove nothing.
BUGS: dict[str, Callable[[str, Path], bool]] = {
    "files are not flushed": lambda kind, path: kind == "file",
    "the adapter's file is not flushed": lambda kind, path: (
        kind == "file" and path.parent.name == "adapters"
    ),
    "state.json is not flushed": lambda kind, path: kind == "file" and "state.json" in path.name,
    "the folder of adapters is not flushed": lambda kind, path: path.name == "adapters",
    "the state's folder is not flushed": lambda kind, path: path.name == "live",
}


@pytest.mark.parametrize("name", BUGS)
def test_a_store_that_does_not_flush_is_caught(name: str, bench: Bench) -> None:
    action, new = ACTIONS["commit_personal"]
    disk = bench.start()
    with disk.watched(not_flushed=BUGS[name]):
        action(Store.open(disk.root))
    try:
        found = set(bench.found_after_cut(disk))
    except FedloraError:
        return
    assert found != {new}


def _is_state(path: Path, disk: Disk) -> bool:
    return path == disk.root / "state.json"


def _is_committed(disk: Disk) -> bool:
    """Whether state.json was renamed into place and its folder then flushed."""
    renamed = False
    for what, path in disk.calls:
        renamed = renamed or (what == "rename" and _is_state(path, disk))
        if renamed and (what, path) == ("fsync folder", disk.root):
            return True
    return False
