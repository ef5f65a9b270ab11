from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fedlora.report import write_report
from fedlora.report.blocks import Notes, Plot, Report, Section, Table, Words
from fedlora.report.people import worst_tenth
from fedlora.report.run import build_report
from tests.report.run_folders import round_lines, write_lines, write_run

NAMES = tuple("abcdefgh")
PRIVACY = {
    "mechanism": "central", "unit": "user", "neighboring_relation": "add-or-remove-one",
    "epsilon": 2.125, "delta": 1e-5, "accountant": "pld", "clipping_norm": 0.5,
    "noise_multiplier": 1.1, "sampling": "poisson", "sampling_probability": 0.1, "rounds": 3,
    "stopped": "max_epsilon", "secure_aggregation": False, "notes": ["virtual users are copies"],
}  # fmt: skip
GUARANTEE = "[privacy]\nclipping_norm = 0.5\nnoise_multiplier = 1.1\n"
AUDIT = {
    "seconds": 2.5,
    "canaries": {"estimate": 0.75, "words": "epsilon is estimated at 0.75"},
    "inversion": {"words": "a look at rows", "rows": [{"stage": "round 1", "row_space": 0.5}]},
    "threats": [{"who": "server", "learns": ["a sum."], "does_not": ["an update."]}],
}


def section(report: Report, name: str) -> Section:
    (found,) = (s for s in report.sections if s.name == name)
    return found


def words(found: Section) -> str:
    texts = [b.text for b in found.blocks if isinstance(b, Words)]
    texts += [item for b in found.blocks if isinstance(b, Notes) for item in b.items]
    return " ".join(texts)


def plots(found: Section) -> dict[str, Plot]:
    return {b.title: b for b in found.blocks if isinstance(b, Plot)}


def test_without_privacy_the_report_says_so(tmp_path: Path) -> None:
    text = words(section(build_report(write_run(tmp_path / "run")), "privacy"))
    assert "no guarantee of differential privacy" in text
    assert "No audit of this run" in text
    for who in ("server", "another client", "thief"):
        assert who in text.lower()


def test_a_guarantee_is_in_words_with_its_unit_and_relation(tmp_path: Path) -> None:
    lines = round_lines(3, NAMES, loss=None)
    for number, line in enumerate(lines):
        line["epsilon"] = 0.5 + number
    folder = write_run(tmp_path / "run", lines=lines, privacy=PRIVACY, toml=GUARANTEE)
    ledger = [{"round": n, "clipping_norm": 0.5 / n, "noise_multiplier": 1.1} for n in (1, 2, 3)]
    write_lines(folder / "privacy.jsonl", ledger)
    (folder / "audit.json").write_text(json.dumps(AUDIT))
    report = build_report(folder)
    privacy = section(report, "privacy")
    text = words(privacy)
    assert "(2.125, 1e-05)-differentially private for each user (add-or-remove-one" in text
    assert "ended early by max_epsilon" in text
    assert "virtual users are copies" in text
    assert "rules out little" not in text
    assert "Canaries: epsilon is estimated at 0.75" in text
    assert "Server. It could learn: a sum. It could not: an update." in text
    tables = [b for b in privacy.blocks if isinstance(b, Table)]
    assert tables[1] == Table(("stage", "row space"), (("round 1", 0.5),))
    assert tables[2].rows == (("seconds", 2.5),)
    rounds = section(report, "rounds")
    assert plots(rounds)["Epsilon"].table.rows == ((1, 0.5), (2, 1.5), (3, 2.5))
    assert plots(rounds)["Clipping norm"].table.rows == ((1, 0.5), (2, 0.25), (3, 0.5 / 3))
    assert "Training loss" not in plots(rounds)
    assert "none leaves a device" in words(rounds)


def test_a_run_whose_devices_tell_no_scores_has_a_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", privacy=PRIVACY)
    path = folder / "summary.json"
    found = json.loads(path.read_text())
    found |= dict.fromkeys(("base", "own", "global", "personal", "held_out", "share_improved"))
    found |= {"clients": 0, "extra": {"notes": []}}
    path.write_text(json.dumps(found))
    (folder / "clients.jsonl").unlink()
    report = build_report(folder)
    assert "No client tells how well its adapters do" in words(section(report, "summary"))
    assert "clients" not in {s.name for s in report.sections}


def test_a_round_that_was_declined_counts_with_the_one_that_came_of_it(tmp_path: Path) -> None:
    away = [{"client": name, "reason": "declined: metered"} for name in "abcd"]
    lines = round_lines(
        1, NAMES, status="declined", loss=None, dropped=away, declined=list("abcd")
    ) + round_lines(1, NAMES, noted={"discarded": 0.25}, late=2)
    lost = [
        {"client": "a", "reason": "client 'a': bad"},
        {"client": "b", "reason": "client 'b': bad"},
    ]
    lines += round_lines(1, NAMES, round=2, dropped=lost, status="failed", loss=None)
    report = build_report(write_run(tmp_path / "run", lines=lines, rounds=2))
    rounds = plots(section(report, "rounds"))
    assert rounds["Clients"].table.head == (
        "round", "asked", "counted", "dropped", "declined", "late",
    )  # fmt: skip
    assert rounds["Clients"].table.rows == ((1, 8, 4, 0, 4, 2), (2, 4, 2, 2, 0, 0))
    assert rounds["Training loss"].table.rows == ((1, 3.9), (2, None))
    assert rounds["Bytes"].table.rows[0] == (1, 2.0, 2.2)
    assert rounds["Noted: discarded"].table.rows == ((1, 0.25), (2, None))
    assert "1 round brought no update: 2." in words(section(report, "rounds"))
    losses = section(report, "losses")
    assert words(losses) == (
        "Of 12 messages to clients, 6 brought an update that counted. 2 replies did not count or "
        "never came. 4 times a device declined. 2 replies came too late and went unread."
    )
    reasons = next(b for b in losses.blocks if isinstance(b, Table))
    assert reasons.rows == (("declined: metered", 4), ("bad", 2))


def test_the_cross_matrix_is_that_of_the_summary(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", names=NAMES, cross=3)
    cross = json.loads((folder / "summary.json").read_text())["extra"]["cross"]
    found = section(build_report(folder), "cross")
    plot = plots(found)["Everyone's adapter on everyone's data"]
    assert [list(row) for row in plot.table.rows] == [
        [name, *values] for name, values in zip("abc", cross["values"], strict=True)
    ]
    assert f"on {cross['own_beats_others']} of 3 clients" in words(found)


@pytest.mark.parametrize(
    ("values", "higher", "expected"),
    [
        ([0.5], True, {0}),
        ([3.0, 1.0, 2.0], True, {1}),
        ([3.0, 1.0, 2.0], False, {0}),
        ([float(n) for n in range(11)], False, {10, 9}),
    ],
)
def test_the_worst_tenth_is_rounded_up(
    values: list[float], higher: bool, expected: set[int]
) -> None:
    assert worst_tenth(values, higher) == expected


def test_the_run_can_be_made_again_by_what_the_report_says(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a run")
    found = section(build_report(folder), "again")
    codes = [b.text for b in found.blocks if hasattr(b, "text")]
    assert codes[0] == f"fedlora simulate '{folder}/experiment.toml' --out runs/again"
    assert codes[1] == (folder / "experiment.toml").read_text()


def test_an_epsilon_without_a_bound_is_in_no_plot_s_way(tmp_path: Path) -> None:
    lines = [line | {"epsilon": math.inf} for line in round_lines(2, "abcd")]
    folder = write_run(tmp_path / "run", lines=lines)
    assert ("Epsilon", ((1, math.inf), (2, math.inf))) in [
        (plot.title, plot.table.rows) for plot in build_report(folder).plots()
    ]
    assert "<h3" in write_report(folder).read_text(encoding="utf-8")


def test_a_large_epsilon_and_another_relation_have_other_words(tmp_path: Path) -> None:
    weak = PRIVACY | {"epsilon": 28.0, "neighboring_relation": "replace-one", "stopped": None}
    folder = write_run(tmp_path / "run", privacy=weak, toml=GUARANTEE)
    found = section(build_report(folder), "privacy")
    parts = next(block for block in found.blocks if isinstance(block, Table))
    assert "stopped" not in [row[0] for row in parts.rows]  # it was not
    text = words(found)
    assert "with other data of one of them" in text
    assert "An epsilon of this size rules out little" in text
    assert "ended early" not in text
