"""Reports: a run's or a comparison's folder as one HTML file, or as Markdown.

A report reads the files of a folder and nothing else, so it needs neither torch nor Flower, can be
made again at any time, and also of a run that is under way. Plots need the extra ``plots``.
"""

from __future__ import annotations

import logging
from pathlib import Path

from fedlora.errors import MissingExtraError
from fedlora.files import write_atomic
from fedlora.report.page import html_page
from fedlora.report.run import build_report
from fedlora.report.text import markdown

__all__ = ["REPORT", "markdown_report", "report_at_end", "write_report"]

REPORT = "report.html"

_log = logging.getLogger(__name__)


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of the run or comparison in `folder`; return the file.

    out: default ``report.html`` in the folder. Raises `RunError` for a folder that is neither, and
    `MissingExtraError` without matplotlib.
    """
    path = Path(folder) / REPORT if out is None else Path(out)
    write_atomic(path, html_page(build_report(folder)).encode())
    return path


def markdown_report(folder: str | Path) -> str:
    """Return the same report as Markdown, which needs no matplotlib. Raises `RunError`."""
    return markdown(build_report(folder))


def report_at_end(folder: str | Path) -> Path | None:
    """Write the report of a run that has just ended, or say in a line why there is none.

    A run that is done must not fail by its picture, whatever is wrong with that.
    """
    try:
        return write_report(folder)
    except MissingExtraError as missing:
        _log.warning("no %s: %s, then fedlora report %s", REPORT, missing, folder)
    except Exception as error:
        _log.warning("no %s: %s: %s", REPORT, type(error).__name__, error)
        _log.debug("the report's failure", exc_info=True)
    return None
