"""The small server: ranges, validators, and what it does not serve."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlora.errors import PublishError
from fedlora.ota.serve import server
from tests.matching import raises
from tests.ota.world import World, make_world

Ask = tuple[int, dict[str, str], bytes]


@pytest.fixture
def world(tmp_path: Path) -> World:
    found = make_world(tmp_path)
    found.publish(1)
    return found


@pytest.fixture
def port(world: World) -> Iterator[int]:
    found = server(world.repository, port=0)
    thread = threading.Thread(target=found.serve_forever, args=(0.02,))
    thread.start()
    yield found.server_address[1]
    found.shutdown()
    thread.join()
    found.server_close()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> Ask:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    response = connection.getresponse()
    found = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    connection.close()
    return found


def test_files_ranges_and_validators(world: World, port: int) -> None:
    file = next((world.repository / "targets" / "stable").iterdir())
    data, path = file.read_bytes(), f"/targets/stable/{file.name}"
    code, headers, body = ask(port, path)
    assert (code, body) == (200, data)
    assert headers["cache-control"] == "max-age=31536000, immutable"
    tag = headers["etag"]
    code, headers, body = ask(port, path, Range="bytes=100-", If_Range=tag)
    assert (code, body) == (206, data[100:])
    assert headers["content-range"] == f"bytes 100-{len(data) - 1}/{len(data)}"
    code, headers, body = ask(port, path, Range="bytes=5-9")
    assert (code, body, headers["content-range"]) == (206, data[5:10], f"bytes 5-9/{len(data)}")
    assert ask(port, path, Range="bytes=100-", If_Range='"other"')[::2] == (200, data)
    assert ask(port, path, Range="bytes=9-5")[::2] == (200, data)
    assert ask(port, path, Range="lines=1-2")[::2] == (200, data)
    code, headers, body = ask(port, path, Range=f"bytes={len(data)}-")
    assert (code, body, headers["content-range"]) == (416, b"", f"bytes */{len(data)}")
    code, headers, body = ask(port, path, "HEAD")
    assert (code, body, headers["content-length"]) == (200, b"", str(len(data)))
    assert ask(port, "/metadata/timestamp.json")[1]["cache-control"] == "no-cache"
    assert ask(port, path, "POST")[0] == 501


@pytest.mark.parametrize(
    "path",
    ["/", "/.lock", "/metadata", "/metadata/", "/metadata/../.lock", "/metadata/%2e%2e/.lock",
     "/metadata/.x", "/keys/root", "/targets/../../keys", "/metadata/link.json", "//etc/passwd",
     "/metadata/9.root.json"],
)  # fmt: skip
def test_what_is_not_of_the_repository_is_not_there(world: World, port: int, path: str) -> None:
    (world.repository / "metadata" / "link.json").symlink_to("/etc/hostname")
    (world.repository / "metadata" / ".x").write_bytes(b"hidden")
    assert ask(port, path)[::2] == (404, b"")


def test_no_repository_and_no_port_are_one_line(world: World, port: int, tmp_path: Path) -> None:
    with raises(PublishError, "fedlora ota init"):
        server(tmp_path / "bundle")
    with raises(PublishError, f"127.0.0.1:{port}: cannot be served"):
        server(world.repository, port=port)
