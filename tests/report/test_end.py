from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from fedlora.report import REPORT, report_at_end  # the real one; conftest.py has put a stub there
from tests.report.run_folders import write_run


def test_without_matplotlib_a_run_ends_well_and_says_how_to_get_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = write_run(tmp_path / "run")
    assert report_at_end(folder) is None
    assert [record.getMessage() for record in caplog.records] == [
        "no report.html: a report with plots needs packages that are not installed: run pip "
        f"install 'fedlora[plots]', then fedlora report {folder}"
    ]
    assert not (folder / REPORT).exists()


def test_a_report_that_fails_is_a_line_and_not_the_run_s_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert report_at_end(folder) is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("no report.html: RunError: ")
