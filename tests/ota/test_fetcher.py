"""HTTP as the updater speaks it: connections kept and lost, TLS, proxies."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tuf.api.exceptions import (
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    SlowRetrievalError,
)

from fedlora.ota.fetcher import Fetcher
from fedlora.ota.limits import Limits
from tests.ota.web import Request, Web, drip

LIMITS = Limits(gap=0.5, metadata_deadline=2.0, deadline=2.0)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a").write_bytes(b"a" * 1000)
    with Web(tmp_path / "files") as found:
        yield found


@pytest.fixture
def fetcher() -> Iterator[Fetcher]:
    found = Fetcher(LIMITS)
    yield found
    found.close()


def test_one_connection_serves_several_files_and_refusals(web: Web, fetcher: Fetcher) -> None:
    for _ in range(2):
        with pytest.raises(DownloadHTTPError) as caught:
            fetcher.download_bytes(f"{web.url}/none", 10)
        assert caught.value.status_code == 404
        assert fetcher.download_bytes(f"{web.url}/a", 1000) == b"a" * 1000
    assert (web.connections, fetcher.requests, fetcher.received) == (1, 4, 2000)


def test_a_kept_connection_that_the_server_closed_is_opened_again(
    web: Web, fetcher: Fetcher
) -> None:
    def once(request: Request) -> None:
        request.answer(b"x")
        request.cut()  # without having said so

    web.rules["x"] = once
    for _ in range(3):
        assert fetcher.download_bytes(f"{web.url}/x", 10) == b"x"
    assert (web.connections, fetcher.requests) == (3, 3)


def test_too_long_a_file_is_not_read(web: Web, fetcher: Fetcher) -> None:
    with pytest.raises(DownloadLengthMismatchError, match="expected at most 999 bytes"):
        fetcher.download_bytes(f"{web.url}/a", 999)
    assert fetcher.received == 0
    assert fetcher.download_bytes(f"{web.url}/a", 1000) == b"a" * 1000


def test_chunked_answers_are_read_and_a_cut_in_one_is_seen(web: Web, fetcher: Fetcher) -> None:
    def chunked(request: Request) -> None:
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        request.send(b"3\r\nabc\r\n5\r\ndefgh\r\n")
        if request.path == "/whole":
            request.send(b"0\r\n\r\n")
        else:
            request.cut()

    web.rules["whole|half"] = chunked
    assert fetcher.download_bytes(f"{web.url}/whole", 10) == b"abcdefgh"
    with pytest.raises(DownloadError):
        fetcher.download_bytes(f"{web.url}/half", 10)


def test_python_tufs_own_way_of_fetching_works_too(web: Web, fetcher: Fetcher) -> None:
    assert b"".join(fetcher.fetch(f"{web.url}/a")) == b"a" * 1000
    with fetcher.download_file(f"{web.url}/a", 1000) as file:
        assert file.read() == b"a" * 1000
    web.rules["slow"] = drip(100, 0.02)
    (web.folder / "slow").write_bytes(b"s" * 100)
    slow = Fetcher(Limits(gap=0.5, deadline=0.2))
    with pytest.raises(SlowRetrievalError, match=r"not done after 0\.2 s"):
        b"".join(slow.fetch(f"{web.url}/slow"))


def test_nobody_answers(fetcher: Fetcher) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(SlowRetrievalError, match=r"nothing came for 0\.5 s"):
            fetcher.download_bytes(f"http://127.0.0.1:{silent.getsockname()[1]}/a", 10)
    with pytest.raises(DownloadError, match=r"nowhere\.invalid/a: "):
        fetcher.download_bytes("http://nowhere.invalid/a", 10)


def test_names_are_quoted_and_never_end_a_line(web: Web, fetcher: Fetcher) -> None:
    (web.folder / "b").write_bytes(b"b")
    web.rules[".*%.*"] = lambda request: request.answer(request.path.encode())
    found = fetcher.download_bytes(f"{web.url}/a b\x7fü%2F", 100)
    assert found == b"/a%20b%7F%C3%BC%2F"
    # urlsplit removes line ends, so that no second request can be smuggled in.
    assert fetcher.download_bytes(f"{web.url}/a\r\nX: y", 1000)[:1] in (b"/", b"a")


def certificate(folder: Path) -> Path:
    """Write a certificate for 127.0.0.1, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    today = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = folder / "server.pem"
    path.write_bytes(private + made.public_bytes(pem))
    return path


def test_tls_is_verified(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    web._server.socket = context.wrap_socket(web._server.socket, server_side=True)
    url = web.url.replace("http:", "https:")
    fetcher = Fetcher(LIMITS)
    with pytest.raises(DownloadError, match="certificate"):
        fetcher.download_bytes(f"{url}/a", 1000)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    assert fetcher.download_bytes(f"{url}/a", 1000) == b"a" * 1000
    assert fetcher.download_bytes(f"{url}/a", 1000) == b"a" * 1000
    fetcher.close()


def test_proxies_of_the_environment_are_used(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def note(request: Request) -> None:
        asked.append(request.path)
        request.answer(b"through")

    web.rules[".*"] = note
    monkeypatch.setenv("http_proxy", web.url)
    monkeypatch.setenv("no_proxy", "inside.invalid")
    fetcher = Fetcher(LIMITS)
    assert fetcher.download_bytes("http://cdn.invalid/x/a b", 100) == b"through"
    assert asked == ["http://cdn.invalid/x/a%20b"]
    with pytest.raises(DownloadError):
        fetcher.download_bytes("http://inside.invalid/a", 100)
    fetcher.close()


def test_a_login_is_sent_to_a_proxy_in_a_tunnel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            data = b""
            while b"\r\n\r\n" not in data:
                data += connection.recv(4096)
            seen.append(data)
            connection.sendall(b"HTTP/1.1 407 No\r\n\r\n")

    thread = threading.Thread(target=answer)
    thread.start()
    port = listener.getsockname()[1]
    monkeypatch.setenv("https_proxy", f"http://me:s%40cret@127.0.0.1:{port}")
    fetcher = Fetcher(LIMITS)
    with pytest.raises(DownloadError, match="407"):
        fetcher.download_bytes("https://cdn.invalid/a", 100)
    thread.join()
    listener.close()
    fetcher.close()
    assert seen[0].startswith(b"CONNECT cdn.invalid:443 ")
    assert b"Proxy-Authorization: Basic bWU6c0BjcmV0" in seen[0]
