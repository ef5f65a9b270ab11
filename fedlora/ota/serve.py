"""A small static HTTP server for trials: a repository's ``metadata/`` and ``targets/``, no more.

In production any web server or CDN serves the same files. What it has to do is what this one does:
answer 404 for what is not there, honour ``Range`` with ``If-Range``, and not cache
``timestamp.json``; everything else never changes under its name.
"""

from __future__ import annotations

import os
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from fedlora.errors import PublishError

__all__ = ["server"]

CHUNK = 1 << 16
_RANGE = re.compile(r"bytes=(\d{1,15})-(\d{0,15})")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # no hidden files, no parent folders


def server(folder: Path, host: str = "127.0.0.1", port: int = 8077) -> ThreadingHTTPServer:
    """Return a server of a repository; port 0 takes a free one. Raises `PublishError`."""
    root = Path(folder)
    if not (root / "metadata" / "timestamp.json").is_file():
        raise PublishError(
            f"{root}: expected a repository with metadata/timestamp.json, found none; make one "
            "with fedlora ota init"
        )

    class Handler(_Handler):
        repository = root

    try:
        found = _Server((host, port), Handler)
    except OSError as error:
        raise PublishError(f"{host}:{port}: cannot be served: {error.strerror or error}") from None
    return found


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A device that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60.0  # seconds that an idle connection is kept
    repository: Path

    def do_GET(self) -> None:
        self._serve(body=True)

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def version_string(self) -> str:
        return "fedlora"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the command counts, and devices are nobody's business."""

    def _serve(self, *, body: bool) -> None:
        path = self._path()
        if path is None:
            self._head(404, {"Content-Length": "0"})
            return
        with open(path, "rb") as file:
            about = os.fstat(file.fileno())
            tag = f'"{about.st_mtime_ns:x}-{about.st_size:x}"'
            size = about.st_size
            start, end = self._range(size, tag)
            headers = {"ETag": tag, "Accept-Ranges": "bytes"}
            fixed = path.name != "timestamp.json"
            headers["Cache-Control"] = "max-age=31536000, immutable" if fixed else "no-cache"
            if start >= size > 0:
                self._head(416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
                return
            headers["Content-Length"] = str(end - start)
            if end - start < size:
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
            self._head(206 if end - start < size else 200, headers)
            file.seek(start)
            while body and start < end:
                chunk = file.read(min(CHUNK, end - start))
                if not chunk:
                    break
                self.wfile.write(chunk)
                start += len(chunk)

    def _range(self, size: int, tag: str) -> tuple[int, int]:
        """Return the first and the last byte but one that are asked for."""
        match = _RANGE.fullmatch(self.headers.get("Range", ""))
        if match is None or self.headers.get("If-Range", tag) != tag:
            return 0, size
        start, last = int(match[1]), int(match[2] or size - 1)
        return (start, min(last + 1, size)) if start <= last or start >= size else (0, size)

    def _path(self) -> Path | None:
        parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
        if parts[0] not in ("metadata", "targets") or not all(map(_PART.fullmatch, parts)):
            return None
        path = self.repository.joinpath(*parts)
        return path if path.is_file() and not path.is_symlink() else None

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
