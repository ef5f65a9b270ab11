"""A node's config and command line, and which refusal is which."""

from __future__ import annotations

import http.server
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import parse_config_args
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import ConfigError, FederationError
from fedlora.federation.deploy.certificates import make_certificates
from fedlora.federation.deploy.keys import fingerprint, make_node_key, public_path
from fedlora.federation.deploy.node import (
    NodeOptions,
    node_command,
    node_config,
    node_refusal,
    probe,
    run_node,
    split_address,
)
from fedlora.federation.flower_commands import free_port
from tests.matching import raises

# TOML and Flower's own reader both take any text but surrogates.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.one_of(st.booleans(), st.integers(-(2**62), 2**62), TEXTS)


@given(st.dictionaries(st.from_regex(r"[A-Za-z0-9_-]+", fullmatch=True), VALUES, max_size=4))
def test_flower_reads_the_node_config_that_was_meant(values: dict[str, Any]) -> None:
    text = node_config(values)
    read = parse_config_args([text]) if text else {}
    assert read == values
    assert [type(value) for value in read.values()] == [type(value) for value in values.values()]


@pytest.mark.parametrize("key", ["a b", "a=b", "", "a.b", "ü"])
def test_a_key_that_flower_would_misread_is_refused(key: str) -> None:
    with raises(ConfigError, "node config: expected keys of letters, digits, - and _"):
        node_config({key: 1})


def test_the_command_names_files_absolutely(tmp_path: Path) -> None:
    options = NodeOptions(
        link="fl.example.org:443", key=Path("node.key"), port=9100, home=tmp_path,
        ca=Path("ca.crt"), config={"trainer": "onnx"},
    )  # fmt: skip
    command = node_command(options)
    assert command[:4] == [sys.executable, "-P", "-m", "fedlora.federation.deploy.supernode"]
    pairs = dict(zip(command[4::2], command[5::2], strict=True))
    assert pairs == {
        "--superlink": "fl.example.org:443",
        "--host": "127.0.0.1",
        "--port": "9100",
        "--root-certificates": str(Path("ca.crt").absolute()),
        "--auth-supernode-private-key": str(Path("node.key").absolute()),
        "--node-config": 'trainer="onnx"',
    }


@pytest.mark.parametrize("address", ["host", "host:", ":1", "https://h:1", "h:0", "h:70000", "h:x"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with raises(ConfigError, f"--link {address}: expected HOST:PORT without a scheme"):
        split_address(address)


def test_addresses() -> None:
    assert split_address("fl.example.org:443") == ("fl.example.org", 443)
    assert split_address("[::1]:8000") == ("::1", 8000)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a refused handshake is what is tested


@contextmanager
def server(context: ssl.SSLContext | None) -> Iterator[str]:
    found = Server(("127.0.0.1", 0), Handler)
    if context is not None:
        found.socket = context.wrap_socket(found.socket, server_side=True)
    thread = threading.Thread(target=found.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"127.0.0.1:{found.server_address[1]}"
    finally:
        found.shutdown()
        thread.join()
        found.server_close()


def options(tmp_path: Path, link: str, ca: Path | None, insecure: bool = False) -> NodeOptions:
    key = tmp_path / "node"
    if not key.exists():
        make_node_key(key)
    return NodeOptions(
        link=link, key=key, port=free_port(), home=tmp_path / "home", ca=ca, insecure=insecure
    )


def test_the_probe_says_which_refusal_it_is(tmp_path: Path) -> None:
    files = make_certificates(tmp_path / "certs")
    other = make_certificates(tmp_path / "other")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.server, files.server_key)
    with server(context) as link:
        probe(options(tmp_path, link, files.ca))
        with raises(FederationError, f"{link}: wrong certificate", str(other.ca), "(unable to get"):
            probe(options(tmp_path, link, other.ca))
        with raises(FederationError, f"{link}: wrong certificate", "this system's authorities"):
            probe(options(tmp_path, link, None))
        with raises(FederationError, f"{link}: plain connection: the server speaks TLS only"):
            probe(options(tmp_path, link, None, insecure=True))
    with server(None) as link:
        probe(options(tmp_path, link, None, insecure=True))
        with raises(FederationError, f"{link}: plain connection: the server does not speak TLS"):
            probe(options(tmp_path, link, files.ca))


def test_a_server_that_is_not_there_is_waited_for_and_then_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = f"127.0.0.1:{free_port()}"
    found = options(tmp_path, link, None)
    with pytest.raises(ConnectionError):
        probe(found)
    with raises(FederationError, f"no server answers at {link}: Connection refused (within 0.2 s)"):
        run_node(found, wait=0.2, say=lambda line: None)
    assert f"waiting for {link}" in capsys.readouterr().err


LOG = """INFO :      Starting Flower SuperNode
\x1b[91mERROR \x1b[0m:     Exit Code: 305
Failed to initialize the connection to the SuperLink.
[code: 2004] Failed to activate SuperNode.
The SuperNode could not establish a connection to the SuperLink.
"""


def test_an_unregistered_key_is_read_from_the_log(tmp_path: Path) -> None:
    key = tmp_path / "node"
    make_node_key(key)
    text = node_refusal(LOG, "h:1", key)
    assert text is not None
    assert text.startswith("h:1: unregistered node: the server does not know the key SHA256:")
    assert fingerprint(public_path(key)) in text
    assert "does not know this node" in str(node_refusal(LOG, "h:1", None))
    clock = LOG.replace("[code: 2004] Failed", "Client error '401 Unauthorized' for url")
    assert "either this device's clock is wrong" in str(node_refusal(clock, "h:1", key))
    assert node_refusal(LOG.replace("2004", "1010"), "h:1", key) is None


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with raises(ConfigError, "--insecure: expected no --ca beside it"):
        NodeOptions(
            link="h:1", key=None, port=1, home=tmp_path, ca=tmp_path / "ca.crt", insecure=True
        )
    with raises(ConfigError, "--key: expected the file of this node's private key, found none"):
        NodeOptions(link="h:1", key=None, port=1, home=tmp_path)
