"""From a finished simulation to a device that serves the new adapter: the README's three commands.

The run, the bundle and the server are here, where torch is. The device is an environment without
torch, with the wheel and the extras device and ota.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_without_torch import NEVER, PROJECT, WINDOWS, install, installed, megabytes, run
from tests.e2e.test_without_torch import wheel as wheel  # a fixture

pytestmark = pytest.mark.slow
# Megabytes of a fresh environment: that of the extra device, and 22 for tuf with what it needs.
MOST = 320


def test_three_commands_from_a_run_to_a_device(wheel: Path, tmp_path: Path) -> None:
    here = os.environ | {"PYTHONPATH": str(PROJECT)}
    fedlora = (sys.executable, "-m", "fedlora")
    # What was there before: a run, a repository, and a device with its bundle.
    run(*fedlora, "simulate", "watch", "--out", "run", "--set", "federation.rounds=4",
        "--quiet", cwd=tmp_path, env=here)  # fmt: skip
    layers = "conv1,conv2,conv3,hidden,classifier"
    run(*fedlora, "export", "watch-cnn", "--out", "bundle", "--train", "16", "--target-modules",
        layers, cwd=tmp_path, env=here)  # fmt: skip
    run(*fedlora, "ota", "init", "--repository", "releases", "--keys", "keys", cwd=tmp_path,
        env=here)  # fmt: skip
    device = install(wheel, "device,ota", tmp_path / "venv")
    packages = installed(tmp_path / "venv")
    print("device,ota", megabytes(tmp_path / "venv"), "MB")
    assert not packages.keys() & set(NEVER)
    assert megabytes(tmp_path / "venv") <= MOST
    run(device, "device", "init", "--bundle", "bundle", "--state", "state", cwd=tmp_path)
    run(device.with_name("python"), "-c", WINDOWS, cwd=tmp_path)

    # 1. Publish.
    text = run(*fedlora, "ota", "publish", "--run", "run", "--repository", "releases", "--keys",
               "keys", cwd=tmp_path, env=here)  # fmt: skip
    print(text)
    # 2. Serve.
    server = subprocess.Popen(
        [*fedlora, "ota", "serve", "--repository", "releases", "--port", "0"],
        stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=here,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        # 3. Update, judged by the owner's own windows.
        found = json.loads(
            run(device, "device", "update", "--state", "state", "--url", url, "--root",
                "releases/metadata/1.root.json", "--data", "windows.npz", "--json", cwd=tmp_path)
        )  # fmt: skip
        print(found)
        assert (found["outcome"], found["active"], found["serving"]) == ("committed", 1, "global")
        assert found["health"]["loss_after"] < found["health"]["loss_before"]
        again = json.loads(
            run(device, "device", "update", "--state", "state", "--url", url, "--root",
                "releases/metadata/1.root.json", "--json", cwd=tmp_path)
        )  # fmt: skip
        assert (again["outcome"], again["requests"]) == ("nothing", 2)
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()
    predictions = json.loads(
        run(device, "device", "predict", "--state", "state", "--inputs", "windows.npz", "--json",
            cwd=tmp_path)
    )  # fmt: skip
    base = json.loads(
        run(device, "device", "predict", "--state", "state", "--inputs", "windows.npz", "--adapter",
            "base", "--json", cwd=tmp_path)
    )  # fmt: skip
    assert predictions != base
