"""Settings of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

import fedlora.report

# One of several test processes: each has a core, and so have the processes that it starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples in every run: a failure is that of the change at hand, and happens again.
# FEDLORA_SEARCH=1 draws new ones.
settings.register_profile("fixed", derandomize=not os.environ.get("FEDLORA_SEARCH"))
settings.load_profile("fixed")


@pytest.fixture(autouse=True, scope="session")
def no_report_at_the_end() -> Iterator[None]:
    """Keep runs of this process from drawing a report, which takes longer than most of them do.

    Tests of the report put the function back.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fedlora.report, "report_at_end", lambda folder: None)
        yield
