"""Processes that outlive the command that started them: start, recognize and end them.

A number of a process says little: it is given out again. So what is recorded of a process is its
number, the moment of its start as the system tells it, and a mark in its environment. Nothing is
ever ended by its name, and nothing whose start or mark is another.

Flower's programs start children (a SuperExec, and a process for every message) that outlive a
parent which is killed. They inherit the mark, by which Linux finds them; elsewhere they are found
only as members of their parent's group, while it lives.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MARK", "Process", "is_running", "marked", "start", "stop", "stop_marked"]

MARK = "FEDLORA_FEDERATION"
STOP_SECONDS = 10.0  # to end by itself after SIGTERM


@dataclass(frozen=True, slots=True)
class Process:
    """What is recorded of a process."""

    pid: int
    started: str  # the system's word for when; "" where it tells none
    mark: str  # the value of MARK in its environment


def start(command: Sequence[str], environment: Mapping[str, str], mark: str, log: Path) -> Process:
    """Start a program in the background, its output added to `log`. It outlives this process."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as stream:
        process = subprocess.Popen(
            list(command),
            env={**environment, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    # The object would warn when it is collected before its process has ended, which is the plan.
    process.returncode = 0
    return describe(process.pid, mark)


def describe(pid: int, mark: str) -> Process:
    """Return the record of a process that runs now."""
    return Process(pid, _started(pid), mark)


def is_running(process: Process) -> bool:
    """Whether this very process still runs; one that has ended and waits to be noticed does not."""
    _reap(process.pid)
    started = _started(process.pid)
    if not started or started != process.started:
        return False
    on_linux = Path("/proc/self/environ").exists()
    return not on_linux or process.pid in marked(process.mark, [process.pid])


def stop(process: Process) -> bool:
    """End a process and its children; return whether it was running. Waits until it is gone."""
    running = is_running(process)
    if running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        end = time.monotonic() + STOP_SECONDS
        while time.monotonic() < end and is_running(process):
            time.sleep(0.1)
        if is_running(process):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
    stop_marked(process.mark)
    _reap(process.pid)
    return running


def stop_marked(mark: str, *, but: int | None = None) -> None:
    """Kill whatever still carries the mark (Linux; elsewhere nothing is found), except `but`."""
    for _ in range(50):
        left = [pid for pid in marked(mark) if pid != but]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            _reap(pid)
        time.sleep(0.1)


def marked(mark: str, pids: Sequence[int] | None = None) -> list[int]:
    """Return the running processes with this mark (of `pids`; None: of all). Never this one."""
    wanted = f"{MARK}={mark}".encode()
    folders = [Path("/proc") / str(pid) for pid in pids or ()]
    if pids is None:
        folders = list(Path("/proc").glob("[0-9]*"))
    found = []
    for folder in folders:
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return [pid for pid in found if pid != os.getpid()]


def _started(pid: int) -> str:
    """Return when a running process began, in the system's words; "" when there is none."""
    if Path("/proc/self/stat").exists():
        return _started_on_linux(pid)
    done = subprocess.run(
        ["ps", "-o", "lstart=,stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    words = done.stdout.split()
    return "" if not words or words[-1].startswith("Z") else " ".join(words[:-1])


def _started_on_linux(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # After the name in parentheses, which may hold anything: state, 18 more, then the start in
    # clock ticks since boot (proc_pid_stat(5), field 22).
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError, OSError):
        os.waitpid(pid, os.WNOHANG)
