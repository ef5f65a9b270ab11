"""SIGKILL in the middle of commits: the last committed adapter, or the one being committed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.store import Store
from tests.store.states import make_bundle

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


# The long run is the measurement; the short one guards every change.
@pytest.mark.parametrize("hits", [30, pytest.param(400, marks=pytest.mark.slow)])
def test_a_kill_at_any_instant_of_a_commit_loses_nothing(hits: int, tmp_path: Path) -> None:
    store = Store.create(tmp_path / "state", make_bundle(tmp_path / "bundle"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.store.kills", str(store.path), str(hits)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["hits"] >= hits
    assert found["old"] + found["new"] == found["hits"]
    # Both ends of the window were hit: before the commit point and after it.
    assert min(found["old"], found["new"]) >= hits // 30
    assert sum(count > 0 for count in found["deciles"]) >= 8
    with store.lock():
        pass
    assert len(list((store.path / "adapters").iterdir())) == len(store.status().digests())
