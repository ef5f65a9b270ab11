"""A web server that serves a folder, and misbehaves where it is told to; it counts every byte."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

__all__ = ["Request", "Web", "cut_after", "drip", "endless", "ignore_range", "stall", "status"]


class Request(BaseHTTPRequestHandler):
    """One request, as a behaviour sees it: `data` is what an honest server would send."""

    protocol_version = "HTTP/1.1"
    timeout = 10.0
    web: Web
    data: bytes

    def setup(self) -> None:
        super().setup()
        with self.web.lock:
            self.web.connections += 1

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        web = self.web
        with web.lock:
            web.log.append((path, self.headers.get("Range")))
            web.received += len(self.raw_requestline) + len(str(self.headers).encode())
        for pattern, change in list(web.rules.items()):
            if re.fullmatch(pattern, path):
                if isinstance(change, bytes):
                    self.data = change
                    self.answer(change)
                    return
                file = web.folder / path
                self.data = file.read_bytes() if file.is_file() else b""
                change(self)
                return
        file = web.folder / path
        if ".." in path or not file.is_file():
            self.answer(b"", 404)
        else:
            self.answer(file.read_bytes())

    def answer(self, data: bytes, code: int = 200, *, ranges: bool = True) -> None:
        """Answer as an honest server does."""
        start = self.begin(data, code, ranges=ranges)
        self.send(data[start:])

    def answer_honestly(self) -> None:
        self.answer(self.data)

    def begin(self, data: bytes, code: int = 200, *, ranges: bool = True) -> int:
        """Send the headers of `data`, or of the part that is asked for; return its start."""
        tag = f'"{hash(data) & 0xFFFFFFFF:x}"'
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match and ranges and code == 200 else 0
        if self.headers.get("If-Range", tag) != tag:
            start = 0
        self.send_response(206 if start else code)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if code == 200:
            self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(data) - start))
        self.flushed_headers()
        return start

    def flushed_headers(self) -> None:
        with self.web.lock:
            self.web.sent += sum(map(len, getattr(self, "_headers_buffer", [])))
        self.end_headers()

    def send(self, data: bytes) -> None:
        try:
            self.wfile.write(data)
            with self.web.lock:
                self.web.sent += len(data)
        except OSError:
            self.close_connection = True

    def cut(self) -> None:
        """End the connection here; what was written still arrives."""
        self.close_connection = True
        try:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def version_string(self) -> str:
        return "w"

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """A device that hangs up is no news."""


Behaviour = Callable[[Request], None]


class Web:
    """A server of `folder` on a free port; `rules`: a pattern of paths, and what is done instead.

    log: (path, Range) of the requests. sent, received: bytes, with their headers. connections: how
    many were opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rules: dict[str, bytes | Behaviour] = {}
        self.log: list[tuple[str, str | None]] = []
        self.sent = self.received = self.connections = 0
        self.lock = threading.Lock()
        handler = type("Handler", (Request,), {"web": self})
        self._server = _Quiet(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def forget(self) -> None:
        self.log.clear()
        self.sent = self.received = self.connections = 0

    def paths(self) -> list[str]:
        return [path for path, _ in self.log]

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Web:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cut_after(num_bytes: int) -> Behaviour:
    """Send so many bytes of each answer, and end the connection."""

    def do(request: Request) -> None:
        start = request.begin(request.data)
        request.send(request.data[start : start + num_bytes])
        if start + num_bytes < len(request.data):
            request.cut()

    return do


def drip(pieces: int, pause: float) -> Behaviour:
    """Send the answer in pieces with a pause before each."""

    def do(request: Request) -> None:
        start = request.begin(request.data)
        size = -(-(len(request.data) - start) // pieces)
        for at in range(start, len(request.data), size):
            time.sleep(pause)
            request.send(request.data[at : at + size])
            if request.close_connection:
                return

    return do


def stall(seconds: float, *, after: int = 0) -> Behaviour:
    """Send so many bytes, and then nothing."""

    def do(request: Request) -> None:
        start = request.begin(request.data)
        request.send(request.data[start : start + after])
        time.sleep(seconds)
        request.cut()

    return do


def endless(*, announced: bool = False) -> Behaviour:
    """Never stop sending; announced: say so in Content-Length."""

    def do(request: Request) -> None:
        request.send_response(200)
        if announced:
            request.send_header("Content-Length", str(1 << 40))
        else:
            request.send_header("Connection", "close")
        request.end_headers()
        request.close_connection = True
        request.send(request.data)
        for _ in range(2000):
            request.send(b" " * 65536)
            if request.web.sent > 1 << 27:
                return

    return do


def status(code: int) -> Behaviour:
    """Answer with a status and nothing else."""
    return lambda request: request.answer(b"", code)


def ignore_range(request: Request) -> None:
    """Send the whole file whatever is asked for."""
    request.answer(request.data, ranges=False)
