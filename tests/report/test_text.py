from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedlora.report import markdown_report
from tests.report.run_folders import write_comparison, write_run


def test_markdown_has_the_words_and_the_tables(tmp_path: Path) -> None:
    lines = markdown_report(write_run(tmp_path / "run")).splitlines()
    assert lines[0] == "# keyboard: report of a run"
    assert "| adapter | loss mean | median | worst tenth | top-1 |" in lines
    assert "### Training loss" in lines
    assert "| 1 | 3.9000 |" in lines
    assert lines.count("```") % 2 == 0


def test_markdown_of_a_stranger_s_name_is_no_markup(tmp_path: Path) -> None:
    names = ("<script>x</script>|`[a](http://b)", *"bcdefgh")
    text = markdown_report(write_run(tmp_path / "run", names=names, held_out=0))
    assert "\\<script\\>x\\</script\\>\\|\\`\\[a\\](http://b)" in text
    assert "<script>" not in text


def test_markdown_needs_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = write_comparison(tmp_path / "compared")
    text = markdown_report(folder)
    assert "| rolora | global | -0.0200 | -0.0500 | 0.0100 | -0.4000 | no evidence |" in text
    assert f"cp {folder}/plan.json runs/again/" in text
