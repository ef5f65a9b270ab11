"""The agent's log: one JSON object a line, on the device only, and never large.

When the file is full, its older half is dropped. A line is cut off by a power cut at worst; who
reads the log passes over what is no JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedlora.errors import StoreError
from fedlora.files import write_atomic

__all__ = ["Log"]

MAX_TEXT = 500  # characters of one text


class Log:
    """A log in the file `path`, of at most `max_bytes`; clock: seconds since 1970."""

    def __init__(
        self, path: Path, *, max_bytes: int = 1 << 18, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self._clock = clock

    def add(self, event: str, **about: Any) -> None:
        """Append an event with its time in UTC. Raises `StoreError` when it cannot be written."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._clock()))
        row = {"time": when, "event": event, **{key: _cut(value) for key, value in about.items()}}
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        try:
            self._make_room(len(line))
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(handle, "ab") as file:
                file.write(line)
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be written: {error.strerror or error}") from None

    def read(self, last: int | None = None) -> list[dict[str, Any]]:
        """Return the newest events, oldest first; an empty list where there are none."""
        rows = []
        for line in self._lines()[-last if last else 0 :]:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
        return rows

    def _make_room(self, needed: int) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        data = self.path.read_bytes() if self.path.exists() else b""
        if len(data) + needed > self.max_bytes:
            kept = data[len(data) - self.max_bytes // 2 :]
            write_atomic(self.path, kept[kept.find(b"\n") + 1 :], mode=0o600)
        elif data and not data.endswith(b"\n"):  # a power cut's
            write_atomic(self.path, data + b"\n", mode=0o600)

    def _lines(self) -> list[bytes]:
        try:
            return self.path.read_bytes().splitlines()
        except OSError:
            return []


def _cut(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return value[: MAX_TEXT - 1] + "…"
    return value
