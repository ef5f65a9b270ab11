"""SIGKILL at any instant of a turn: fetch, trial, commit and personalization."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedlora.store import Store
from tests.agent.device import Fleet, make_fleet

pytestmark = pytest.mark.slow
PROJECT = Path(__file__).resolve().parents[2]
KILLS = 40
TURN = """
import sys
from pathlib import Path
from fedlora.agent import Agent, Limits
from fedlora.device.owner_data import read_owner_data
from fedlora.ota import DeviceUpdater
from fedlora.training import TrainConfig
url, state, root, data = sys.argv[1:]
agent = Agent(
    DeviceUpdater(url, state, bootstrap=Path(root).read_bytes()),
    data=lambda bundle: read_owner_data(data, None, bundle.manifest),
    training=TrainConfig(local_steps=40, learning_rate=0.02, batch_size=16),
    personalize=True, limits=Limits(margin=1e6, slower=1e6), threads=1,
)
print("begun", flush=True)
turn = agent.update()
print("done", flush=True)
"""


def test_a_kill_at_any_instant_of_a_turn_leaves_a_device_that_serves(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path)
    (tmp_path / "root.json").write_bytes(fleet.world.root)
    np.savez(tmp_path / "own.npz", inputs=fleet.data.train.inputs, targets=fleet.data.train.targets)
    try:
        seconds = [turn(fleet, 0.3 + 0.1 * number, None) for number in range(3)]
        window = sorted(seconds)[1]
        draw = random.Random(0)
        outcomes: dict[str, int] = {}
        for number in range(KILLS):
            before = active(fleet)
            turn(fleet, 0.3 + 0.01 * number, draw.uniform(0, window))
            store = Store.open(fleet.world.store.path)
            status = store.status()
            after = active(fleet)
            assert after >= before
            assert store.serving() is not None
            assert store.global_adapter() is not None
            where = "committed" if after > before else "staged" if status.pending else "before"
            outcomes[where] = outcomes.get(where, 0) + 1
            # The next start does what this one did not.
            turn(fleet, None, None)
            newest = fleet.world.publisher.releases()[-1].version
            assert active(fleet) == newest
            files = [path for path in store.path.rglob("*") if path.is_file()]
            assert len(files) < 40
    finally:
        fleet.web.close()
    print(f"{KILLS} kills over {window * 1e3:.0f} ms, 0 bricked; found after them: {outcomes}")
    assert sum(outcomes.values()) == KILLS


def turn(fleet: Fleet, share: float | None, kill_after: float | None) -> float:
    """Let a process do a turn, with a new release first; kill it; return its seconds."""
    if share is not None:
        fleet.publish(share)
    folder = fleet.world.folder.parent
    command = [sys.executable, "-c", TURN, fleet.web.url, str(fleet.world.store.path),
               str(folder / "root.json"), str(folder / "own.npz")]  # fmt: skip
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(PROJECT)}
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
        start = time.monotonic()
        if kill_after is None:
            assert child.stdout.readline() == "done\n"
            assert child.wait(30) == 0
            return time.monotonic() - start
        time.sleep(kill_after)
        child.send_signal(signal.SIGKILL)
    return time.monotonic() - start


def active(fleet: Fleet) -> int:
    entry = Store.open(fleet.world.store.path).status().installed
    return 0 if entry is None or entry.release is None else entry.release
