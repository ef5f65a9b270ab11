"""Devices' reports: counted, and taken in over HTTP into a file.

A report says {"version", "healthy", "metric"} (`fedlora.agent.report`); a file has one a line, as
it came. Nothing of a connection is kept: no address, no time, no header. Nobody proves who they
are, so whoever can reach the collector can stop a rollout, or lend it healthy voices; where that
matters, put a reverse proxy in front that asks devices for a certificate.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fedlora.errors import FormatError, PublishError
from fedlora.formats.strict_json import canonical_json, parse_json

__all__ = ["METRICS", "Counts", "collector", "count", "read_counts", "read_report"]

METRICS = frozenset({
    "much-better", "better", "same", "worse", "much-worse", "unknown", "broken",
})  # fmt: skip
MAX_BODY = 256  # bytes
MAX_FILE = 1 << 28  # bytes: some five million reports


@dataclass(frozen=True, slots=True)
class Counts:
    """Reports of one version."""

    healthy: int = 0
    failed: int = 0
    metrics: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All reports."""
        return self.healthy + self.failed


def read_report(data: bytes, where: str = "report") -> dict[str, Any]:
    """Return a report. Raises `FormatError` for anything else."""
    found = parse_json(data, where, max_depth=1) if len(data) <= MAX_BODY else None
    if (
        not isinstance(found, dict)
        or found.keys() != {"version", "healthy", "metric"}
        or type(found["version"]) is not int
        or not 0 < found["version"] < 1 << 53
        or type(found["healthy"]) is not bool
        or not isinstance(found["metric"], str)
        or found["metric"] not in METRICS
    ):
        raise FormatError(f"{where}: expected version, healthy and metric, found something else")
    return found


def count(lines: Iterable[bytes]) -> dict[int, Counts]:
    """Return the counts by version; lines that are no report are passed over."""
    found: dict[int, Counts] = {}
    for line, times in Counter(lines).items():  # there are few different ones: each is read once
        try:
            report = read_report(line)
        except FormatError:
            continue
        old, word = found.get(report["version"], Counts()), report["metric"]
        healthy = times if report["healthy"] else 0
        found[report["version"]] = Counts(
            old.healthy + healthy,
            old.failed + times - healthy,
            {**old.metrics, word: old.metrics.get(word, 0) + times},
        )
    return found


def read_counts(path: Path) -> dict[int, Counts]:
    """Count the reports of a file; a missing one has none. Raises `PublishError`."""
    try:
        with open(path, "rb") as file:
            return count(line.rstrip(b"\n") for line in file)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise PublishError(f"{path}: cannot be read: {error.strerror or error}") from None


def collector(path: Path, host: str = "127.0.0.1", port: int = 8078) -> ThreadingHTTPServer:
    """Return a server that appends POSTed reports to a file; port 0 takes a free one.

    Raises `PublishError` when the file or the address cannot be had.
    """
    lock = threading.Lock()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise PublishError(f"{path}: cannot be written: {error.strerror or error}") from None

    def append(report: dict[str, Any]) -> bool:
        with lock, open(path, "ab") as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE:
                return False
            file.write(canonical_json(report) + b"\n")
            return True

    class Handler(_Handler):
        take = staticmethod(append)

    try:
        found = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise PublishError(f"{host}:{port}: cannot be served: {error.strerror or error}") from None
    found.daemon_threads = True
    return found


class _Handler(BaseHTTPRequestHandler):
    timeout = 10.0  # seconds that a connection may be idle
    take: Any

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or len(length) > 6:
            self._answer(411)
        elif int(length) > MAX_BODY:
            self._answer(413)
        else:
            try:
                report = read_report(self.rfile.read(int(length)))
            except FormatError:
                self._answer(400)
            else:
                self._answer(204 if self.take(report) else 507)

    def version_string(self) -> str:
        return "fedlora"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: who reports is nobody's business."""

    def _answer(self, status: int) -> None:
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()
