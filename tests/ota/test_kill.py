"""SIGKILL in the middle of updates, with a real server: no device is bricked, nothing piles up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


# The long run is the measurement; the short one guards every change.
@pytest.mark.parametrize("hits", [4, pytest.param(300, marks=pytest.mark.slow)])
def test_a_kill_at_any_instant_of_an_update_leaves_a_device_that_updates(
    hits: int, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.ota.kills", str(tmp_path), str(hits)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["hits"] >= hits
    assert found["old"] + found["new"] == found["hits"]
    # Two adapters, the bundle's three files, the updater's own, and what one kill leaves at most.
    assert found["files_at_the_end"] <= 16
    assert found["most_files_after_a_kill"] <= found["files_at_the_end"] + 5
    if hits >= 100:
        assert sum(count > 0 for count in found["deciles"]) == 10
