"""Rows that a client keeps for itself from round to round: restarts, crashes, hostile names."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from fedlora.errors import FormatError, StoreError
from fedlora.flat import Segment
from fedlora.store import RunRows, Store
from fedlora.store.kept import MOST_RUNS
from tests.store.power_cut import Disk, PowerCut
from tests.store.states import BASE, adapter

LAYOUT = (Segment("a", "B", (3, 2)), Segment("b", "B", (5, 2)))
HOSTILE = ("../../etc/passwd", "/etc/passwd", "a/../../b", "..", "", "\x00", "x" * 5000, "\ud800")


def row(number: int) -> np.ndarray:
    return np.full(16, number, np.float32)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create_without_bundle(tmp_path / "home" / "state", BASE)


def first(found: np.ndarray | None) -> float | None:
    return None if found is None else float(found[0])


def test_a_state_without_a_bundle_keeps_adapters_and_serves_none(store: Store) -> None:
    again = Store.open(store.path)
    again.install_both(adapter(1), adapter(2), provenance={"round": 3}, metrics={"loss": 1.0})
    found = Store.open(store.path)
    assert (found.global_adapter(), found.personal_adapter()) == (adapter(1), adapter(2))
    status = found.status()
    assert status.installed is not None
    assert status.personal is not None
    assert status.personal.started_from == status.installed.fingerprint
    assert (status.personal.metrics, status.personal.stale) == ({"loss": 1.0}, False)
    with pytest.raises(StoreError, match="found that of a client that trains in torch"):
        _ = found.bundle
    found.install_both(adapter(3), None, provenance={}, metrics={})
    assert (found.serving(), found.personal_adapter()) == (adapter(3), None)
    assert len(list((store.path / "adapters").iterdir())) == 1


def test_a_round_that_runs_again_reads_what_it_read_before(store: Store) -> None:
    def rows() -> RunRows:  # as another process has them
        return RunRows(Store.open(store.path), "run")

    assert rows().read("own", LAYOUT, 9) is None
    rows().write("own", LAYOUT, 2, row(2))
    rows().write("own", LAYOUT, 5, row(5))
    assert [first(rows().read("own", LAYOUT, n)) for n in (2, 3, 5, 6)] == [None, 2, 2, 5]
    rows().write("own", LAYOUT, 5, row(50))  # the server was killed in round 5
    assert [first(rows().read("own", LAYOUT, n)) for n in (3, 5, 6)] == [2, 2, 50]
    rows().write("other", LAYOUT, 1, row(7))
    assert first(rows().read("other", LAYOUT, 9)) == 7
    assert first(rows().read("own", LAYOUT, 9)) == 50
    assert RunRows(store, "another run").read("own", LAYOUT, 9) is None


def test_rows_of_another_layout_or_damaged_ones_are_refused(store: Store) -> None:
    rows = RunRows(store, "run")
    rows.write("own", LAYOUT, 1, row(1))
    with pytest.raises(StoreError, match="expected the layers and ranks of this run"):
        rows.read("own", LAYOUT[:1], 2)
    (path,) = (store.path / "federation").glob("*/*")
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(FormatError, match="damaged or changed; erase it"):
            rows.read("own", LAYOUT, 2)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_reaches_a_path(name: str, store: Store) -> None:
    before = {path for path in store.path.parents[1].rglob("*") if path.is_file()}
    RunRows(store, name).write(name, LAYOUT, 1, row(1))
    (made,) = {path for path in store.path.parents[1].rglob("*") if path.is_file()} - before
    assert made.parents[2] == store.path
    assert made.parent.parent.name == "federation"
    assert all(len(part) == 32 and part.isalnum() for part in (made.name, made.parent.name))
    assert first(RunRows(store, name).read(name, LAYOUT, 2)) == 1


def test_old_runs_are_bounded_in_number(store: Store) -> None:
    for number in range(MOST_RUNS + 3):
        RunRows(store, f"run {number}").write("own", LAYOUT, 1, row(number))
    left = [RunRows(store, f"run {n}").read("own", LAYOUT, 2) for n in range(MOST_RUNS + 3)]
    assert list(map(first, left)) == [None] * 3 + list(range(3, MOST_RUNS + 3))
    assert len(list((store.path / "federation").iterdir())) == MOST_RUNS


def test_forget_erases_them(store: Store) -> None:
    RunRows(store, "run").write("own", LAYOUT, 1, row(1))
    assert store.forget()
    assert list((store.path / "federation").iterdir()) == []
    assert not store.forget()
    RunRows(store, "run").write("own", LAYOUT, 1, row(2))
    assert first(RunRows(store, "run").read("own", LAYOUT, 2)) == 2


def test_only_the_owner_may_read_them(store: Store) -> None:
    RunRows(store, "run").write("own", LAYOUT, 1, row(1))
    for path in (store.path / "federation").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)


@pytest.mark.parametrize("earlier", [0, 1], ids=["the first row", "a later row"])
def test_a_power_cut_at_any_call_leaves_the_rows_before_or_after(
    earlier: int, store: Store, tmp_path: Path
) -> None:
    if earlier:
        RunRows(store, "run").write("own", LAYOUT, 1, row(1))
    old, new = (1.0 if earlier else None), 2.0
    random, seen, done, stop = np.random.default_rng(0), set(), False, 0
    while not done:
        live = tmp_path / "live"
        shutil.rmtree(live, ignore_errors=True)
        shutil.copytree(store.path, live)
        disk = Disk(live)
        with disk.watched(stop):
            try:
                RunRows(Store.open(live), "run").write("own", LAYOUT, 2, row(2))
                done = True
            except PowerCut:
                pass
        stop += 1
        for how in ("forgets", "renames first", random, random):
            image = disk.after_cut(tmp_path / "image", how)
            rows = RunRows(Store.open(image), "run")
            found = first(rows.read("own", LAYOUT, 3))
            assert found in ((new,) if done else (old, new))
            assert first(rows.read("own", LAYOUT, 2)) == old
            rows.write("own", LAYOUT, 2, row(2))  # it goes on, and clears up what was left over
            assert first(rows.read("own", LAYOUT, 3)) == 2
            assert len(list((image / "federation").glob("*/*"))) == 1
            seen.add(found)
            shutil.rmtree(image)
    assert seen == {old, new}
    assert stop >= 7
