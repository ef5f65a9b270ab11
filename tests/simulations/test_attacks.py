"""The study of attacks runs the experiment that it names, and tells what came of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations.studies import attacks, small_world
from simulations.studies.attackers import ATTACKS


def setting(names: list[str], rounds: int = 10) -> attacks.Setting:
    return attacks.Setting("small world", attacks._small, ["fedit"], names, rounds, 1)


def test_an_attack_costs_and_a_rule_saves() -> None:
    one = setting(["no attack", "sign x 10"])
    honest = attacks.loss_of(one, "fedit", "no attack", "none", 0)
    attacked = attacks.loss_of(one, "fedit", "sign x 10", "none", 0)
    saved = attacks.loss_of(one, "fedit", "sign x 10", "multi-krum 2", 0)
    assert honest is not None
    assert attacked is not None
    assert saved is not None
    # The attack doubles what it did in every round; without two of ten people the loss is another,
    # not a multiple.
    assert attacked > 1.5 * honest
    assert saved < 1.1 * honest


def test_what_is_malformed_costs_what_silence_costs() -> None:
    one = setting(["NaN"])
    losses = {
        attacks.loss_of(one, "fedit", name, "none", 0)
        for name, attack in ATTACKS.items()
        if attack.refused
    }
    assert len(losses) == 1
    assert None not in losses


def test_the_page_has_a_table_a_method_and_a_row_an_attack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attacks, "SHOWN", ["no attack", "replay"])
    monkeypatch.setattr(attacks, "RULES", {"none": (None, {}), "median": ("median", {})})
    monkeypatch.setattr(attacks.logging, "disable", lambda level: None)
    out = tmp_path / "page.md"
    attacks.main(["--methods", "ffa-lora", "--seeds", "1", "--no-watch", "--out", str(out)])
    page = out.read_text(encoding="utf-8")
    assert "## ffa-lora, small world" in page
    assert "| attack | none | median |" in page
    rows = [line for line in page.splitlines() if line.startswith(("| no attack", "| replay"))]
    assert len(rows) == 2
    assert all("diverged" not in row for row in rows)


def test_people_have_what_the_page_says() -> None:
    people = small_world.data()
    counts = [len(person.train) for person in people.values()]
    assert counts == list(range(24, 97, 8))
    assert all(len(person.test) == 100 for person in people.values())
