"""A process's largest resident memory."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

__all__ = ["peak_bytes"]

_STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """Return this process's largest resident memory so far.

    Where Linux tells it of the process's own memory, from there: `ru_maxrss` begins with that of
    the process which started this one, and a test's may have grown to gigabytes.
    """
    if _STATUS.is_file():
        lines = _STATUS.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
