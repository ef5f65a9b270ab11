from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fedlora.cli.live import SHOWN, LiveTable
from fedlora.experiment import ExperimentConfig, find_experiment
from fedlora.federation.checkpoint import Dropped, RoundRecord
from fedlora.report.words import amount


def record(number: int, loss: float | None = 0.5) -> RoundRecord:
    lost = (Dropped("b", "late"), Dropped("c", "declined: metered"))
    return RoundRecord(
        number, "updated", ("a", "b", "c"), loss, 2.25, 1_000_000, 2_000_000, lost,
        declined=("c",), late=1,
    )  # fmt: skip


@pytest.fixture
def table() -> LiveTable:
    config = ExperimentConfig.from_toml(find_experiment("watch"), {"federation.rounds": 12})
    found = LiveTable(Console(file=io.StringIO(), width=100, record=True))
    found.on_start(Path("runs/watch"), config, 0)
    return found


def shown(table: LiveTable) -> str:
    table.console.print(table.picture())
    return table.console.export_text()


def test_a_line_has_all_of_a_round(table: LiveTable) -> None:
    table.on_round(record(1))
    text = shown(table)
    assert "watch, fedit, in runs/watch" in text
    words = "1/12 0.5000 1/3 1 MB 2 MB 2.2 s 1 dropped, 1 declined, 1 late"
    assert words in " ".join(text.split())
    assert "epsilon" not in text


def test_the_last_rounds_are_shown_and_the_bytes_of_all(table: LiveTable) -> None:
    for number in range(1, 13):
        table.on_round(record(number, None))
    text = shown(table)
    lines = [line.split()[0] for line in text.splitlines() if "/12" in line]
    assert lines == [f"{number}/12" for number in range(13 - SHOWN, 13)]
    assert "in all: 12 MB up, 24 MB down" in text


@pytest.mark.parametrize("width", [48, 80, 120])
def test_numbers_are_whole_at_any_width(width: int) -> None:
    """Where there is no room, the bytes of single rounds and the end of the words are left out."""
    config = ExperimentConfig.from_toml(find_experiment("watch"), {"federation.rounds": 120})
    found = LiveTable(Console(file=io.StringIO(), width=width, record=True))
    found.on_start(Path("runs/watch"), config, 0)
    found.progress("rounds", 103, 120, "")
    found.progress("clients", 12, 117, "somebody with a long name of many words")
    found.on_round(record(103))
    text = shown(found)
    lines = [line for line in text.splitlines() if line.startswith("  103/120")]
    assert len(lines) == 1
    words = " ".join(lines[0].split())
    assert words.startswith(
        "103/120 0.5000 1/3 1 MB 2 MB" if width > 48 else "103/120 0.5000 1/3 2.2"
    )
    heads = next(line for line in text.splitlines() if "round" in line and "time" in line).split()
    assert heads == ["round", "loss", "clients", *(["up", "down"] if width > 48 else []), "time"]
    bar = text.splitlines()[-1]
    assert "12/117" in bar
    assert "left -:--:--" in bar
    assert "…" in bar or width == 120
    assert len(bar.rstrip()) <= width


def test_a_private_run_has_epsilon_in_place_of_losses(table: LiveTable) -> None:
    table.on_round(replace(record(1, None), epsilon=1.234))
    text = " ".join(shown(table).split())
    assert "round epsilon clients" in text
    assert "1/12 1.24 1/3" in text  # never less than it is


def test_bars_have_the_stage_how_far_it_is_and_the_time_left(table: LiveTable) -> None:
    table.progress("rounds", 0, 12, "")
    table.progress("rounds", 3, 12, "loss 0.5 2.2 s")
    table.on_round(record(3))
    table.progress("clients", 1, 10, "[red]a client")
    text = shown(table)
    assert "3/12" in text.splitlines()[-2]
    assert "left" in text.splitlines()[-2]
    assert "loss 0.5" not in text.splitlines()[-2]  # it is in the table
    assert "1/10" in text
    assert "[red]a client" in text  # a client's name is no markup


def test_bytes_of_a_resumed_run_are_those_since_then(table: LiveTable) -> None:
    config = ExperimentConfig.from_toml(find_experiment("watch"), {"federation.rounds": 12})
    table.on_start(Path("runs/watch"), config, 4)
    table.on_round(record(5))
    assert "since round 5: 1 MB up, 2 MB down" in shown(table)


def test_a_round_that_ends_while_the_table_is_drawn_is_in_the_next_picture(
    table: LiveTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is drawn in a thread of its own, which an error would end."""
    table.on_round(record(1))

    def ends_a_round(count: float | None) -> str:
        if count == 1_000_000 and len(table._rounds) < 3:
            table.on_round(record(2))
        return amount(count)

    monkeypatch.setattr("fedlora.cli.live.amount", ends_a_round)
    assert "2/12" not in shown(table)
    assert "2/12" in shown(table)


def test_on_a_narrow_terminal_all_numbers_that_are_there_are_whole() -> None:
    config = ExperimentConfig.from_toml(find_experiment("watch"), {"federation.rounds": 120})
    table = LiveTable(Console(file=io.StringIO(), width=40, record=True))
    table.on_start(Path("runs/watch"), config, 0)
    table.progress("rounds", 100, 120, "")
    table.on_round(replace(record(100, 0.5), epsilon=1.25))
    lines = shown(table).splitlines()
    assert max(map(len, lines)) <= 40
    assert ["round", "loss", "epsilon", "clients"] in [line.split() for line in lines]
    assert ["100/120", "0.5000", "1.25", "1/3"] in [line.split()[:4] for line in lines]
    assert lines[-1].split()[:2] == ["rounds", "100/120"]
    assert "…" not in "".join(lines)


def test_a_private_run_has_its_epsilon(table: LiveTable) -> None:
    table.on_round(replace(record(1, None), epsilon=1.25))
    words = shown(table).split()
    assert "epsilon" in words
    assert "1.25" in words
