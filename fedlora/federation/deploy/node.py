"""A SuperNode: what a device is told by its owner, how it is started, and why it was refused.

Flower's own node retries for ever when the certificate is wrong, or when one side speaks TLS and
the other does not. So the server is looked at first, by a handshake of our own. Whether a key is
registered only the SuperLink knows: Flower's node ends then, and its log is read.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedlora.errors import ConfigError, FederationError
from fedlora.federation.deploy import processes
from fedlora.federation.deploy.keys import fingerprint, public_path, require_private_key
from fedlora.federation.deploy.supernode import supernode_command
from fedlora.federation.flower_commands import (
    flower_command,
    flower_environment,
    last_line,
    toml_value,
    without_colors,
)

__all__ = [
    "NodeOptions",
    "is_activated",
    "node_command",
    "node_config",
    "node_refusal",
    "not_activated",
    "probe",
    "run_node",
]

PROBE_SECONDS = 5.0  # for one handshake
REJOIN_SECONDS = 75.0  # a SuperLink misses a node after two heartbeats of 30 s
AGAIN_SECONDS = 10.0  # between two tries in this time
LINES = 200  # of the log are kept, to find the reason of an end


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """How one SuperNode is started."""

    link: str  # HOST:PORT
    key: Path | None
    port: int  # of its own runtime API, on the loopback
    home: Path  # of Flower's state
    ca: Path | None = None  # None: the authorities that this system trusts
    insecure: bool = False  # plain HTTP: for a SuperLink without TLS, which ours never are
    config: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    python: Path | None = None  # None: the one that runs this

    def __post_init__(self) -> None:
        split_address(self.link)
        if self.insecure and self.ca is not None:
            raise ConfigError("--insecure: expected no --ca beside it; there is no TLS to check")
        if not self.insecure and self.key is None:
            raise ConfigError("--key: expected the file of this node's private key, found none")


def node_config(values: Mapping[str, bool | int | float | str]) -> str:
    """Return a node config as Flower reads it. Raises `ConfigError` for what is no key.

    >>> print(node_config({"trainer": "onnx", "partition-id": 0, "bundle": "/data/my bundle"}))
    trainer="onnx" partition-id=0 bundle="/data/my bundle"
    """
    for key in values:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", key):
            raise ConfigError(
                f"node config: expected keys of letters, digits, - and _, found {key!r}"
            )
    return " ".join(f"{key}={toml_value(value)}" for key, value in values.items())


def node_command(options: NodeOptions) -> list[str]:
    """Return the command line of a SuperNode. Raises `MissingExtraError` without Flower."""
    flower_command("flower-supernode", "client", options.python)  # ours is built on it
    command = [
        *supernode_command(options.python),
        "--superlink", options.link,
        "--host", "127.0.0.1", "--port", str(options.port),
    ]  # fmt: skip
    if options.insecure:
        command += ["--insecure"]
    elif options.ca is not None:
        command += ["--root-certificates", str(options.ca.absolute())]
    if options.key is not None and not options.insecure:
        command += ["--auth-supernode-private-key", str(options.key.absolute())]
    if options.config:
        command += ["--node-config", node_config(options.config)]
    return command


def probe(options: NodeOptions) -> None:
    """Look at the server once, as this node would see it.

    Raises `FederationError`, which says whether the certificate is wrong or which side is plain,
    and `ConnectionError` when nobody answers.
    """
    host, port = split_address(options.link)
    try:
        with socket.create_connection((host, port), PROBE_SECONDS) as plain:
            if options.insecure:
                _probe_plain(plain, options.link)
                return
            context = ssl.create_default_context(
                cafile=None if options.ca is None else str(options.ca)
            )
            with context.wrap_socket(plain, server_hostname=host):
                return
    except ssl.SSLCertVerificationError as error:
        authority = "this system's authorities" if options.ca is None else str(options.ca)
        raise FederationError(
            f"{options.link}: wrong certificate: the server's is not one that {authority} vouches "
            f"for ({error.verify_message}); take ca.crt and the name from whoever runs the server"
        ) from None
    except ssl.SSLError as error:
        raise FederationError(
            f"{options.link}: plain connection: the server does not speak TLS "
            f"({error.reason or error}), and this node sends nothing without it"
        ) from None
    except OSError as error:
        raise ConnectionError(f"{options.link}: {error.strerror or error}") from None


def run_node(options: NodeOptions, *, wait: float = 60.0, say: Callable[[str], None]) -> None:
    """Be a SuperNode until a signal ends it; its log goes to `say`, line by line.

    wait: seconds for the server to be there. Raises `FederationError` when the server refuses this
    node: a key that is not registered, a wrong certificate, or a plain connection.
    """
    if options.key is not None:
        require_private_key(options.key)
    _wait_for_server(options, wait)
    end = time.monotonic() + REJOIN_SECONDS
    while True:
        asked_to_stop, code, text = _run_once(options, say)
        if asked_to_stop:
            return
        if not not_activated(text) or time.monotonic() > end:
            raise FederationError(
                node_refusal(text, options.link, options.key)
                or f"{options.link}: the SuperNode ended with code {code}: {last_line(text)}"
            )
        say(f"{options.link}: not accepted; trying again for {REJOIN_SECONDS:g} s")
        time.sleep(AGAIN_SECONDS)


def _run_once(options: NodeOptions, say: Callable[[str], None]) -> tuple[bool, int, str]:
    """Run Flower's SuperNode; return whether we were asked to stop, its exit code and its log."""
    command = node_command(options)
    mark = f"{uuid.uuid4().hex}/node"
    environment = flower_environment(options.home, options.python) | {processes.MARK: mark}
    options.home.mkdir(parents=True, exist_ok=True)
    asked_to_stop = False
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    def forward(number: int, frame: object) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    lines: deque[str] = deque(maxlen=LINES)

    def read() -> None:
        if process.stdout is not None:
            for line in process.stdout:
                lines.append(line)
                say(line.rstrip("\n"))

    # A thread, since the node's children hold the pipe open for some time after it has ended.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:
            process.kill()
            process.wait()
        processes.stop_marked(mark)
        reader.join(PROBE_SECONDS)
        if process.stdout is not None:
            process.stdout.close()
    return asked_to_stop, code, "".join(lines)


def not_activated(log: str) -> bool:
    """Whether the SuperLink did not take a node.

    Its code 2004 is for a key that it does not know, and also for one whose node it believes to be
    connected: one that was killed is, for a minute. So it is worth trying again for so long.
    """
    return "[code: 2004]" in log.rpartition("Starting Flower SuperNode")[2]


def is_activated(log: str) -> bool:
    """Whether the SuperLink has taken a node in its latest start."""
    return "SuperNode ID:" in log.rpartition("Starting Flower SuperNode")[2]


def node_refusal(log: str, link: str, key: Path | None) -> str | None:
    """Return one line if a SuperNode's log says that the SuperLink refused it, else None."""
    text = without_colors(log)
    who = "this node"
    if key is not None and public_path(key).is_file():
        who = f"the key {fingerprint(public_path(key))}"
    if not_activated(text):
        return (
            f"{link}: unregistered node: the server does not know {who}; have it registered with "
            "fedlora federation register KEY.pub, on the server"
        )
    # A request is signed with the time: up to 5 s ahead and 305 s behind are taken.
    if "401 Unauthorized" in text:
        return (
            f"{link}: the server does not accept the signature of {who}: either this device's clock"
            " is wrong (set it by NTP), or its registration was taken back"
        )
    return None


def split_address(address: str) -> tuple[str, int]:
    """Split HOST:PORT. Raises `ConfigError`."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--link {address}: expected HOST:PORT without a scheme, as fl.example.org:443"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def _probe_plain(connection: socket.socket, link: str) -> None:
    """Ask for /health without TLS; a server that speaks it answers nothing that is HTTP, or 400."""
    connection.settimeout(PROBE_SECONDS)
    try:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: link\r\nConnection: close\r\n\r\n")
        answer = connection.recv(64)
    except OSError:
        answer = b""
    if not answer.startswith(b"HTTP/") or b" 400 " in answer:
        raise FederationError(
            f"{link}: plain connection: the server speaks TLS only; leave out --insecure, and name "
            "its authority with --ca"
        )


def _wait_for_server(options: NodeOptions, wait: float) -> None:
    end = time.monotonic() + wait
    while True:
        try:
            probe(options)
            return
        except ConnectionError as error:
            if time.monotonic() >= end:
                raise FederationError(
                    f"no server answers at {error} (within {wait:g} s); check the address, and "
                    "that the SuperLink runs"
                ) from None
            print(f"waiting for {error}", file=sys.stderr, flush=True)
            time.sleep(min(5.0, max(0.1, end - time.monotonic())))
