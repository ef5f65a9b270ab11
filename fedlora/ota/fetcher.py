"""`Fetcher`: HTTP for an updater, with deadlines, and with no errors but python-tuf's own.

On `http.client` and not on ngclient's own fetcher: there a connection that is cut in mid-stream
raises errors of its HTTP library, bytes that had already come are lost with it, and a server that
sends a byte now and then is waited for without end. Here a timer closes the socket at the deadline,
whatever is being waited for, headers included.

Redirects are not followed: the owner's configuration names the server, and a device must not be
led to fetch from its own network. Proxies are those of the environment (``https_proxy``, …).
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import ssl
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, unquote, urlsplit

from tuf.api.exceptions import (
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    SlowRetrievalError,
)
from tuf.ngclient import FetcherInterface

from fedlora import __version__
from fedlora.errors import ConfigError
from fedlora.ota.limits import Limits, Pace

__all__ = ["Answer", "Fetcher", "check_url"]

CHUNK = 1 << 16  # bytes
_SAFE = "/%!$&'()*+,;=:@~"
_BROKEN = (OSError, http.client.HTTPException, ValueError)


@dataclass(frozen=True, slots=True)
class Answer:
    """A response whose body is still to come, `length` bytes if the server says so."""

    status: int
    headers: Mapping[str, str]  # names in small letters
    length: int | None
    body: Iterator[bytes]


class Fetcher(FetcherInterface):
    """Fetches one file after another, over one connection where the server keeps it.

    `requests` and `received` (bytes of bodies) count since it was made. Not for several threads.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.requests = 0
        self.received = 0
        self._connection: http.client.HTTPConnection | None = None
        self._place: tuple[str, str] | None = None
        self._absolute = False

    def close(self) -> None:
        """Close the connection, if one is open."""
        if self._connection is not None:
            self._connection.close()
        self._connection, self._place = None, None

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Return a file of at most `max_length` bytes, all in memory.

        Raises `DownloadError` and its kinds, nothing else.
        """
        data = bytearray()
        with self.get(url, Pace(self.limits, self.limits.metadata_deadline)) as answer:
            _require_length(url, answer.length, max_length)
            for chunk in answer.body:
                data += chunk
                _require_length(url, len(data), max_length)
        return bytes(data)

    def _fetch(self, url: str) -> Iterator[bytes]:
        with self.get(url, Pace(self.limits, self.limits.deadline)) as answer:
            yield from answer.body

    @contextlib.contextmanager
    def get(
        self, url: str, pace: Pace, headers: Mapping[str, str] | None = None
    ) -> Iterator[Answer]:
        """Ask for a file; the body must be read within the block.

        Raises `DownloadHTTPError` for any status but 200 and 206, `SlowRetrievalError`, and
        `DownloadError` for all else, a body that is shorter than announced included.
        """
        late = threading.Event()
        timer: threading.Timer | None = None
        keep = False  # the connection, over an error
        self.requests += 1
        try:
            connection, sock, reused = self._connected(url, pace)

            def expire() -> None:
                late.set()
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

            timer = threading.Timer(pace.left(), expire)
            timer.daemon = True
            timer.start()
            try:
                response = self._ask(connection, url, headers)
            except (http.client.RemoteDisconnected, ConnectionError):
                if not reused or late.is_set():
                    raise
                timer.cancel()  # the server had closed a connection that it had kept open
                self.close()
                self.requests -= 1
                with self.get(url, pace, headers) as answer:
                    yield answer
                return
            with response:
                if (refusal := _refusal(url, response)) is not None:
                    # The usual answer to the question for the next root: read to its end, so that
                    # the connection, and its handshake, serve for the timestamp too.
                    keep = _is_short(response) and not response.will_close
                    if keep:
                        response.read()
                    raise refusal
                length = None if response.chunked else response.length
                headers_in = {name.lower(): value for name, value in response.getheaders()}
                body = self._body(response, pace)
                yield Answer(response.status, headers_in, length, body)
            if response.will_close:
                self.close()
        except BaseException as error:
            if not keep:
                self.close()
            if late.is_set() and isinstance(error, (*_BROKEN, DownloadError)):
                raise pace.late() from None
            if isinstance(error, TimeoutError):
                raise SlowRetrievalError(f"{url}: nothing came for {self.limits.gap:g} s") from None
            if isinstance(error, _BROKEN):
                raise DownloadError(f"{url}: {_line(error)}") from None
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _body(self, response: http.client.HTTPResponse, pace: Pace) -> Iterator[bytes]:
        # Counted here, since read1 does not do so in every version of Python.
        left = None if response.chunked else response.length
        while left is None or left > 0:
            chunk = response.read1(CHUNK if left is None else min(CHUNK, left))
            if not chunk:
                break
            left = None if left is None else left - len(chunk)
            self.received += len(chunk)
            pace.add(len(chunk))
            yield chunk
        if left:
            raise DownloadError(f"the connection was cut {left:,} bytes before the end")

    def _ask(
        self, connection: http.client.HTTPConnection, url: str, headers: Mapping[str, str] | None
    ) -> http.client.HTTPResponse:
        parts = urlsplit(url)
        target = quote(parts.path or "/", safe=_SAFE)
        if parts.query:
            target += f"?{quote(parts.query, safe=_SAFE + '?')}"
        if self._absolute:
            target = f"{parts.scheme}://{parts.netloc}{target}"
        own = {"User-Agent": f"fedlora/{__version__}", "Accept-Encoding": "identity"}
        connection.request("GET", target, headers={**own, **(headers or {})})
        return connection.getresponse()

    def _connected(
        self, url: str, pace: Pace
    ) -> tuple[http.client.HTTPConnection, socket.socket, bool]:
        """Return a connection, its socket, and whether it has been used before."""
        parts = check_url(url)
        place = (parts.scheme, parts.netloc)
        if self._place != place:
            self.close()
        reused = self._connection is not None and self._connection.sock is not None
        if self._connection is None:
            self._connection, self._absolute = _connection(parts)
            self._place = place
        self._connection.timeout = min(self.limits.gap, pace.left())
        if self._connection.sock is None:
            self._connection.connect()
        sock: socket.socket = self._connection.sock
        sock.settimeout(min(self.limits.gap, pace.left()))
        return self._connection, sock, reused


def check_url(url: str) -> SplitResult:
    """Return the parts of a URL. Raises `ConfigError` unless it is one of HTTP."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits:
        raise ConfigError(f"expected a URL that begins with https:// or http://, found {url!r}")
    return parts


def _connection(parts: SplitResult) -> tuple[http.client.HTTPConnection, bool]:
    """Return a connection that is not open yet, and whether requests name the whole URL."""
    host, port = str(parts.hostname), parts.port
    secure = parts.scheme == "https"
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy is not None and urllib.request.proxy_bypass(host):
        proxy = None
    if proxy is None:
        if secure:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, port, context=context), False
        return http.client.HTTPConnection(host, port), False
    via = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    login = {}
    if via.username is not None:
        pair = f"{unquote(via.username)}:{unquote(via.password or '')}".encode()
        login["Proxy-Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
    if secure:
        context = ssl.create_default_context()
        tunnel = http.client.HTTPSConnection(str(via.hostname), via.port or 80, context=context)
        tunnel.set_tunnel(host, port, login)
        return tunnel, False
    # A proxy that asks for a login sees it only in tunnels: plain HTTP would show it to everyone.
    return http.client.HTTPConnection(str(via.hostname), via.port or 80), True


def _refusal(url: str, response: http.client.HTTPResponse) -> DownloadError | None:
    """Return why an answer is not taken."""
    status = response.status
    if 300 <= status < 400:
        return DownloadHTTPError(f"{url}: redirected ({status}), which is not followed", status)
    if status not in (200, 206):
        return DownloadHTTPError(f"{url}: the server answered {status}", status)
    if (response.getheader("Content-Encoding") or "identity") != "identity":
        return DownloadError(f"{url}: the server compressed what was asked for as it is")
    return None


def _is_short(response: http.client.HTTPResponse) -> bool:
    return not response.chunked and response.length is not None and response.length <= CHUNK


def _require_length(url: str, found: int | None, most: int) -> None:
    if found is not None and found > most:
        raise DownloadLengthMismatchError(
            f"{url}: expected at most {most:,} bytes, found {found:,} or more"
        )


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return text or type(error).__name__
