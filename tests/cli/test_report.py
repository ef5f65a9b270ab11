from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlora.cli.main import app
from fedlora.errors import RunError
from tests.report.run_folders import write_run


def test_the_report_s_name_is_printed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = write_run(tmp_path / "run", cross=0, rounds=1)
    found = CliRunner().invoke(app, ["report", str(folder)])
    assert (found.exit_code, found.output) == (0, f"{folder / 'report.html'}\n")
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_markdown_is_all_of_stdout_or_a_file(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    found = CliRunner().invoke(app, ["report", str(folder), "--markdown"])
    assert found.output.startswith("# keyboard: report of a run\n")
    file = tmp_path / "page.md"
    again = CliRunner().invoke(app, ["report", str(folder), "--markdown", "--out", str(file)])
    assert again.output == f"{file}\n"
    assert file.read_text() == found.output


def test_open_shows_the_page_in_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", shown.append)
    folder, file = write_run(tmp_path / "run"), tmp_path / "page.md"
    CliRunner().invoke(app, ["report", str(folder), "--markdown", "--open", "--out", str(file)])
    assert shown == [file.as_uri()]


def test_no_run_and_no_place_to_write_are_refused(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert isinstance(found.exception, RunError)
    folder, out = write_run(tmp_path / "run"), tmp_path / "nowhere" / "page.html"
    found = CliRunner().invoke(app, ["report", str(folder), "--out", str(out)])
    assert isinstance(found.exception, RunError)
    assert "expected a folder that is there" in str(found.exception)
