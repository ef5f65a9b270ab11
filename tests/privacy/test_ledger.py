"""The ledger: what is on the disk when, what a crash leaves, and what is refused on reading."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import ConfigError, RunError
from fedlora.privacy import PrivacyEvent
from fedlora.privacy.accounting import epsilon_of
from fedlora.privacy.ledger import Ledger, LedgerLine, released_together
from tests.matching import raises

EVENT = PrivacyEvent(5.0, "all")


def line(round: int, **changes: Any) -> LedgerLine:
    return dataclasses.replace(LedgerLine(round, EVENT, 0.5, 2.5), **changes)


def bit(round: int) -> LedgerLine:
    """The noised bit of adaptive clipping: half its range is its norm."""
    return LedgerLine(round, PrivacyEvent(10.0, "all"), 0.5, 5.0, "count")


def written(out: Path, *lines: LedgerLine) -> Ledger:
    ledger = Ledger.read(out)
    for one in lines:
        ledger = ledger.append(one)
    return ledger


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    poisson = PrivacyEvent(0.7, "poisson", 0.01)
    fixed = PrivacyEvent(2.0, "fixed", 0.1, 100, 1000)
    lines = (
        line(1, notes=("an empty cohort", "käse")),
        bit(1),
        LedgerLine(2, poisson, 0.3, 0.7 * 0.3),
        LedgerLine(7, fixed, 1.0, 2.0, "local"),
    )
    ledger = written(tmp_path / "new" / "run", *lines)
    assert ledger.lines == lines
    assert Ledger.read(tmp_path / "new" / "run") == ledger


def test_a_missing_ledger_is_empty_and_costs_nothing(tmp_path: Path) -> None:
    ledger = Ledger.read(tmp_path)
    assert ledger.lines == ()
    assert ledger.spent(1e-5) == 0.0
    assert ledger.drop_after(3) == ledger
    assert list(tmp_path.iterdir()) == []


def test_a_line_is_on_the_disk_when_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int]] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((Path(path).name, os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", recorded)
    ledger = Ledger.read(tmp_path).append(line(1))
    size = ledger.path.stat().st_size
    # The line, then the folder that the new file is in; for the second line the file alone.
    assert [name for name, _ in synced] == ["privacy.jsonl", tmp_path.name]
    assert synced[0][1] == size
    ledger.append(line(2))
    assert synced[2:] == [("privacy.jsonl", ledger.path.stat().st_size)]


def test_a_release_is_charged_once(tmp_path: Path) -> None:
    ledger = written(tmp_path, line(1), line(2), bit(2))
    before = ledger.path.read_bytes()
    for again in (line(2), bit(2)):
        with raises(RunError, "round 2", "second", "charged once"):
            ledger.append(again)
    with raises(RunError, "round: expected 2 or later, found 1"):
        ledger.append(bit(1))
    assert ledger.path.read_bytes() == before


def test_killed_between_the_line_and_the_checkpoint_the_round_is_charged_once(
    tmp_path: Path,
) -> None:
    ledger = written(tmp_path, line(1), line(2))
    # kill -9 here: round 2 is in the ledger, and the checkpoint is that of round 1
    resumed = Ledger.read(tmp_path).drop_after(1)
    assert resumed.lines == ledger.lines[:1]
    assert resumed.append(line(2)) == ledger
    assert Ledger.read(tmp_path) == ledger
    assert ledger.spent(1e-5, "exact") == epsilon_of([EVENT, EVENT], 1e-5, "exact")


def test_killed_after_the_checkpoint_nothing_is_forgotten(tmp_path: Path) -> None:
    ledger = written(tmp_path, line(1), line(2))
    assert Ledger.read(tmp_path).drop_after(2) == ledger


def test_killed_at_any_byte_of_a_line_the_earlier_ones_stay(tmp_path: Path) -> None:
    whole = written(tmp_path, line(1), line(2)).path.read_bytes()
    first = whole.index(b"\n") + 1
    path = tmp_path / "privacy.jsonl"
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        torn = Ledger.read(tmp_path)
        assert torn.lines == (line(1),)
        torn.append(line(2))  # the torn part is not glued to the next line
        assert path.read_bytes() == whole


def test_an_interrupted_drop_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = written(tmp_path, line(1), line(2))
    before = ledger.path.read_bytes()

    def power_cut(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", power_cut)
    with raises(RunError, "privacy.jsonl", "cannot be written"):
        ledger.drop_after(1)
    assert ledger.path.read_bytes() == before


def test_what_cannot_be_written_is_not_released(tmp_path: Path) -> None:
    (tmp_path / "privacy.jsonl").mkdir()
    with raises(RunError, "nothing of round 1 is released"):
        Ledger(tmp_path / "privacy.jsonl").append(line(1))
    with raises(RunError, "cannot be read"):
        Ledger.read(tmp_path)


GOOD = {
    "round": 1, "mechanism": "central", "sampling": "poisson", "sampling_probability": 0.25,
    "cohort": None, "population": None, "count": 1, "noise_multiplier": 2.0,
    "neighboring_relation": "add-or-remove-one", "clipping_norm": 0.5, "noise_std": 1.0,
    "notes": [],
}  # fmt: skip

# A change of GOOD (or the whole line as text), and what is said of it.
MUTATED: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "Expecting"),
    "no object": ("[1]", "expected an object"),
    "empty": ("", "Expecting"),
    "not UTF-8": (b"\xff\xfe{", "decode"),
    "a key twice": ('{"round": 1, "round": 2}', "'round' once"),
    "NaN": ('{"noise_std": NaN}', "finite numbers, found NaN"),
    "deep": ("[" * 100_000, "recursion"),
    "many digits": ('{"round": 1' + "0" * 5000 + "}", "digits"),
    "key missing": ({"noise_std": ...}, "the key 'noise_std', found none"),
    "key unknown": ({"epsilon": 1.0}, "no key 'epsilon'"),
    "round zero": ({"round": 0}, ">= 1, found 0"),
    "round true": ({"round": True}, "round: expected int, found True"),
    "round text": ({"round": "1"}, "round: expected int, found '1'"),
    "count zero": ({"count": 0}, "count: expected a whole number >= 1"),
    "mechanism": ({"mechanism": "cental"}, "central, local, count"),
    "sampling": ({"sampling": "uniform"}, "poisson, fixed or all"),
    "probability": ({"sampling_probability": 1.5}, "[0, 1], found 1.5"),
    "fixed of nobody": (
        {"sampling": "fixed", "neighboring_relation": "replace-one"}, "cohort, population",
    ),
    "less noise": ({"noise_std": 0.5}, "noise_multiplier times clipping_norm"),
    "more multiplier": ({"noise_multiplier": 4.0}, "noise_multiplier times clipping_norm"),
    "no norm": ({"clipping_norm": 0.0, "noise_std": 0.0}, "clipping_norm"),
    "infinite": ('{"round": 1e999}', "expected the key"),
    "huge noise": ({"noise_multiplier": 1e308, "clipping_norm": 1e308}, "finite"),
    "other relation": (
        {"neighboring_relation": "replace-one"}, "expected add-or-remove-one of sampling poisson",
    ),
    "notes": ({"notes": [1]}, "notes: expected texts"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATED)
def test_a_mutated_line_is_refused_with_its_number(name: str, tmp_path: Path) -> None:
    change, said = MUTATED[name]
    if isinstance(change, dict):
        table = {key: value for key, value in (GOOD | change).items() if value is not ...}
        change = json.dumps(table)
    data = change if isinstance(change, bytes) else change.encode()
    good = json.dumps(GOOD).encode()
    (tmp_path / "privacy.jsonl").write_bytes(good + b"\n" + data + b"\n")
    with raises(RunError, "privacy.jsonl, line 2: not a release", said, "start a new run"):
        Ledger.read(tmp_path)


def test_a_doubled_or_misplaced_line_is_refused(tmp_path: Path) -> None:
    good = json.dumps(GOOD).encode() + b"\n"
    later = json.dumps(GOOD | {"round": 5}).encode() + b"\n"
    for lines, number in ((good + good, 2), (good + later + good, 3)):
        (tmp_path / "privacy.jsonl").write_bytes(lines)
        with raises(RunError, f"line {number}: not a release", "round: expected"):
            Ledger.read(tmp_path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_changed_bytes_give_a_ledger_or_one_typed_line(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.getbasetemp() / "mutants"
    out.mkdir(exist_ok=True)
    good = bytearray(json.dumps(GOOD).encode() + b"\n" + json.dumps(GOOD | {"round": 2}).encode())
    good += b"\n"
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    (out / "privacy.jsonl").write_bytes(good)
    found, said = Ledger(out), ""
    try:
        found = Ledger.read(out)
    except RunError as error:
        said = str(error)
    assert "\n" not in said
    assert said == "" or "privacy.jsonl, line " in said
    for one in found.lines:
        assert one.noise_std == pytest.approx(one.event.noise_multiplier * one.clipping_norm)


def test_two_releases_of_one_cohort_are_one_gaussian(tmp_path: Path) -> None:
    # arXiv:1905.03871: z_Δ = (z⁻² − (2 σ_b)⁻²)^−½ beside a bit of the multiplier 2 σ_b costs as z.
    z, bits = 1.3, 8.0
    update = (z**-2 - bits**-2) ** -0.5
    half = [PrivacyEvent(update, "poisson", 0.1), PrivacyEvent(bits, "poisson", 0.1)]
    both = released_together(half)
    assert both.noise_multiplier == pytest.approx(z, rel=1e-12)
    assert dataclasses.replace(both, noise_multiplier=z) == PrivacyEvent(z, "poisson", 0.1)
    ledger = written(tmp_path, line(1), bit(1), line(2), bit(2))
    (event,) = ledger.events()
    assert event.count == 2
    assert event.noise_multiplier == pytest.approx((1 / 25 + 1 / 100) ** -0.5)


def test_releases_of_different_cohorts_are_not_put_together() -> None:
    with raises(ConfigError, "of one cohort", "2 different"):
        released_together([PrivacyEvent(1, "poisson", 0.1), PrivacyEvent(1, "poisson", 0.2)])


def test_no_noise_on_one_of_two_is_no_noise() -> None:
    both = released_together([PrivacyEvent(0.0, "all"), PrivacyEvent(3.0, "all")])
    assert both.noise_multiplier == 0


def test_what_is_appended_makes_sense() -> None:
    with raises(ConfigError, "round"):
        line(0)
    with raises(ConfigError, "noise_std"):
        line(1, noise_std=0.1)
    with raises(ConfigError, "mechanism"):
        line(1, mechanism="none")
