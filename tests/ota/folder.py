"""A fetcher that reads a folder: no sockets, no threads, for tests of what is done with files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tuf.api.exceptions import DownloadHTTPError

from fedlora.ota import updater as updater_module
from fedlora.ota.fetcher import Answer, Fetcher
from fedlora.ota.limits import Limits, Pace

__all__ = ["URL", "read_from"]

URL = "http://folder.invalid"


def read_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let updaters of `URL` read a repository's folder."""

    class FromFolder(Fetcher):
        def __init__(self, limits: Limits | None = None) -> None:
            super().__init__(limits)

        @contextlib.contextmanager
        def get(
            self, url: str, pace: Pace, headers: Mapping[str, str] | None = None
        ) -> Iterator[Answer]:
            self.requests += 1
            path = folder / url.removeprefix(f"{URL}/")
            if not path.is_file():
                raise DownloadHTTPError(f"{url}: the server answered 404", 404)
            data = path.read_bytes()
            start = int((headers or {}).get("Range", "bytes=0-")[6:-1])
            about: dict[str, Any] = {}
            if start:
                about["content-range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            pieces = (data[at : at + 4096] for at in range(start, len(data), 4096))
            yield Answer(206 if start else 200, about, len(data) - start, pieces)

    monkeypatch.setattr(updater_module, "Fetcher", FromFolder)
