"""The peak of memory is a process's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
MANY = 300 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is the system's own figure")
def test_a_small_process_of_a_large_one_is_small() -> None:
    held = np.ones(MANY, np.uint8)
    code = "from simulations.bench.resident import peak_bytes; print(peak_bytes())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 2**20 < int(done.stdout) < len(held) // 3
