"""A recorded process is recognized by more than its number, and ended with its children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.federation.deploy import processes

PARENT = (
    "import subprocess, sys, time\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print('ready', flush=True)\n"
    "time.sleep(600)\n"
)


@pytest.fixture
def process(tmp_path: Path):
    mark = f"{uuid.uuid4().hex}/x"
    log = tmp_path / "logs" / "x.log"
    started = processes.start([sys.executable, "-c", PARENT], dict(os.environ), mark, log)
    end = time.monotonic() + 60
    while "ready" not in log.read_text() and time.monotonic() < end:
        time.sleep(0.02)
    yield started
    processes.stop(started)


def test_a_process_is_ended_with_its_children(process: processes.Process) -> None:
    assert processes.is_running(process)
    assert len(processes.marked(process.mark)) == 2
    assert processes.stop(process)
    assert not processes.is_running(process)
    assert processes.marked(process.mark) == []
    assert not processes.stop(process)


@pytest.mark.skipif(sys.platform != "linux", reason="marks are read from /proc")
def test_children_of_a_killed_process_are_found(process: processes.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while processes.is_running(process) and time.monotonic() < end:
        time.sleep(0.02)
    assert not processes.is_running(process)
    assert len(processes.marked(process.mark)) == 1
    processes.stop_marked(process.mark)
    assert processes.marked(process.mark) == []


def test_a_number_that_was_given_out_again_is_left_alone(process: processes.Process) -> None:
    for stranger in (
        replace(process, started="1"),
        replace(process, mark=process.mark + "x"),
        processes.Process(os.getpid(), process.started, process.mark),
    ):
        assert not processes.is_running(stranger)
        assert not processes.stop(replace(stranger, mark="nobody's"))
    assert processes.is_running(process)


def test_a_process_that_nobody_has_reaped_does_not_run() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    recorded = processes.describe(child.pid, "x")
    end = time.monotonic() + 60
    while processes._started(child.pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not processes.is_running(recorded)
    child.wait()
