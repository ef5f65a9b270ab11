"""What a device tells about a release, if its owner wants it to: three facts in one POST.

    {"healthy":true,"metric":"same","version":7}

No id, no time, no measured number: the version, whether the release was healthy here, and one of
seven words for how the held-out loss moved. The request has no header beyond those that HTTP needs.
A server still sees the address that a connection comes from, as it does when a release is fetched.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
from pathlib import Path
from urllib.parse import urlsplit

from fedlora.agent.health import BUCKETS, Bucket
from fedlora.errors import ConfigError, DownloadError, FormatError
from fedlora.files import write_atomic
from fedlora.formats.strict_json import canonical_json, parse_json

__all__ = ["check_report_url", "keep", "report_bytes", "send", "send_kept"]

TIMEOUT = 10.0  # seconds


def report_bytes(version: int, healthy: bool, metric: Bucket) -> bytes:
    """Return the body of a report.

    >>> report_bytes(7, True, "same")
    b'{"healthy":true,"metric":"same","version":7}'
    """
    return canonical_json({"version": version, "healthy": healthy, "metric": metric})


def check_report_url(url: str) -> str:
    """Return a URL that reports can be sent to. Raises `ConfigError`."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise ConfigError(
            f"report: expected a URL such as https://example.org/reports, found {url!r}"
        )
    return url


def send(url: str, body: bytes) -> None:
    """POST a report; a redirect is not followed. Raises `DownloadError`."""
    parts = urlsplit(check_report_url(url))
    assert parts.hostname is not None
    if parts.scheme == "https":
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=TIMEOUT, context=ssl.create_default_context()
        )
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection.putrequest("POST", target, skip_accept_encoding=True)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{url}: the report could not be sent: {error}") from None
    finally:
        connection.close()
    if not 200 <= status < 300:
        raise DownloadError(f"{url}: expected the report to be taken, found status {status}")


def send_kept(url: str, path: Path) -> bool:
    """Send the report that is kept in a file, and remove it; whether there was one.

    Only what `report_bytes` writes is ever sent, whatever is in the file. Raises `DownloadError`.
    """
    try:
        data = path.read_bytes()[:256]
    except OSError:
        return False
    with contextlib.suppress(FormatError):
        found = parse_json(data, str(path))
        if (
            isinstance(found, dict)
            and type(found.get("version")) is int
            and type(found.get("healthy")) is bool
            and found.get("metric") in BUCKETS
        ):
            send(url, report_bytes(found["version"], found["healthy"], found["metric"]))
    path.unlink(missing_ok=True)
    return True


def keep(path: Path, body: bytes) -> None:
    """Keep a report until it can be sent; the one before is replaced."""
    write_atomic(path, body, mode=0o600)
