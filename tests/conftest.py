"""Settings of all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from functools import cache

import pytest
import typer.main
import typer.testing
from hypothesis import settings

import fedlora.report

# One of several test processes: each has a core, and so have the processes that it starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Importing all tests makes 700,000 objects that stay: to look through them for garbage, again and
# again, took a fifth of the time it takes to collect the tests, and half a second each time later.
gc.disable()

# The same examples in every run: a failure is that of the change at hand, and happens again.
# FEDLORA_SEARCH=1 draws new ones, and twice as many.
_search = bool(os.environ.get("FEDLORA_SEARCH"))
settings.register_profile("fixed", derandomize=not _search, max_examples=100 if _search else 50)
settings.load_profile("fixed")


def pytest_collection_finish() -> None:
    """Look for garbage from now on, and only among what the tests themselves make."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def no_report_at_the_end() -> Iterator[None]:
    """Keep runs of this process from drawing a report, which takes longer than most of them do.

    Tests of the report put the function back.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fedlora.report, "report_at_end", lambda folder: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_tree_of_commands() -> Iterator[None]:
    """Let typer make the commands of an app once, and not at each call of one: over 0.1 s."""
    with pytest.MonkeyPatch.context() as patched:
        made = cache(typer.main.get_command)
        patched.setattr(typer.main, "get_command", made)
        patched.setattr(typer.testing, "_get_command", made)
        yield
