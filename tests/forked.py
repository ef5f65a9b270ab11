"""fedlora's commands in processes that can be killed, without importing torch for each of them.

One clean process with a single thread has imported everything; each command is a fork of it. That
``python -m fedlora`` starts is shown in `tests.cli.test_main`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# torch._dynamo: what torch's optimizers import at their first step.
IMPORTED = ["tests.forked", "fedlora.cli.main", "fedlora.simulation", "torch._dynamo"]


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), before)))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def start(
    function: Callable[..., Any], *arguments: Any, out: Path | None = None
) -> ForkServerProcess:
    """Start ``function(*arguments)``, both of which can be pickled, in a process of its own.

    Its environment and folder are those of this process; `out` takes its stdout.
    """
    process = _context().Process(
        target=_child, args=(function, arguments, dict(os.environ), out), daemon=True
    )
    process.start()
    return process


def start_command(*arguments: object, out: Path | None = None) -> ForkServerProcess:
    """Start ``fedlora`` with these arguments; it draws no report at the end."""
    return start(_command, *map(str, arguments), out=out)


def _child(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: Mapping[str, str],
    out: Path | None,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    streams = {1: out or Path(os.devnull), 2: Path(os.devnull)}
    for number, path in streams.items():
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(file, number)
        os.close(file)
    function(*arguments)


def _command(*arguments: str) -> None:
    import fedlora.report
    from fedlora.cli.main import main

    # As in the tests' own processes: a report takes longer than most runs.
    fedlora.report.report_at_end = lambda folder: None
    sys.argv = ["fedlora", *arguments]
    main()
