"""The SuperLink: always with TLS, node keys and a database; and what the server asks of it."""

from __future__ import annotations

import json
import os
import re
import ssl
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from fedlora.errors import FederationError, RunError
from fedlora.federation.deploy import processes
from fedlora.federation.deploy.folder import Federation, Link
from fedlora.federation.deploy.keys import require_public_key
from fedlora.federation.flower_commands import (
    FlowerCommands,
    flower_command,
    flower_environment,
    last_line,
    write_connection,
)

__all__ = ["answers", "become_link", "link_commands", "online_nodes", "register", "start_link"]

START_SECONDS = 60.0  # for the SuperLink to answer


def start_link(federation: Federation, link: Link) -> Federation:
    """Start the SuperLink in the background and wait until it answers; record it.

    Raises `FederationError` with the last line of its log when it does not.
    """
    _require_certificates(federation)
    # What an earlier one, killed, has left would go on with its run beside the new one's.
    processes.stop_marked(federation.mark("link"))
    write_connection(federation.home, link.address, federation.certificates.ca)
    log = federation.log("link")
    process = processes.start(
        link_command(federation, link), _environment(federation), federation.mark("link"), log
    )
    federation = replace(federation, link=replace(link, process=process))
    federation.save()
    end = time.monotonic() + START_SECONDS
    while not answers(link.address, federation.certificates.ca):
        if time.monotonic() > end or not processes.is_running(process):
            text = log.read_text(encoding="utf-8", errors="replace")
            raise FederationError(
                f"the SuperLink did not start on {link.address}: {last_line(text)}; see {log}"
            )
        time.sleep(0.1)
    return federation


def become_link(federation: Federation, link: Link) -> NoReturn:
    """Turn this process into the SuperLink, for a terminal or a service manager."""
    _require_certificates(federation)
    old = federation.link.process if federation.link else None
    if old is not None and processes.is_running(old):
        raise RunError(
            f"{federation.folder}: its SuperLink runs already, process {old.pid}; stop it, or name "
            "another folder"
        )
    processes.stop_marked(federation.mark("link"))
    write_connection(federation.home, link.address, federation.certificates.ca)
    me = processes.describe(os.getpid(), federation.mark("link"))
    replace(federation, link=replace(link, process=me)).save()
    command = link_command(federation, link)
    sys.stdout.flush()
    sys.stderr.flush()
    environment = _environment(federation) | {processes.MARK: federation.mark("link")}
    os.execve(command[0], command, environment)


def link_command(federation: Federation, link: Link) -> list[str]:
    """Return the command line of the SuperLink."""
    files = federation.certificates
    return [
        flower_command("flower-superlink"),
        "--host", link.host, "--port", str(link.port),
        "--ssl-ca-certfile", str(files.ca),
        "--ssl-certfile", str(files.server),
        "--ssl-keyfile", str(files.server_key),
        "--enable-supernode-auth",
        "--database", str(federation.folder / "link.db"),
        "--isolation", "subprocess",
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip


def link_commands(federation: Federation) -> FlowerCommands:
    """Return ``flwr`` with the connection to this federation's SuperLink."""
    if federation.link is None:
        raise RunError(
            f"{federation.folder}: no SuperLink was started here; run fedlora federation start-link"
        )
    write_connection(federation.home, federation.link.address, federation.certificates.ca)
    return FlowerCommands(flower_environment(federation.home), "the federation's run")


def register(federation: Federation, public: Path) -> str:
    """Let the device with this public key take part; return the id of its node.

    Raises `FederationError` when the SuperLink refuses, also for a key that it has already.
    """
    require_public_key(public)
    output = link_commands(federation).flwr(
        "supernode", "register", str(public.absolute()), "--format", "json"
    )
    found = re.search(r'"node-id":\s*"?(\d+)', output)
    if found is None:
        raise FederationError(f"{public}: not registered: {_refusal(federation, output)}")
    return found.group(1)


def online_nodes(federation: Federation) -> dict[str, str]:
    """Return the SuperLink's word for each registered node (online, offline, …) by node id."""
    output = link_commands(federation).flwr("supernode", "list", "--format", "json")
    try:
        nodes = json.loads(output[output.index("{") :])["nodes"]
        return {str(node["node-id"]): str(node["status"]) for node in nodes}
    except (ValueError, KeyError, TypeError):
        return {}


def answers(address: str, ca: Path | None) -> bool:
    """Whether a SuperLink says over TLS that it is well."""
    context = ssl.create_default_context(cafile=None if ca is None else str(ca))
    try:
        with urllib.request.urlopen(f"https://{address}/health", timeout=2, context=context) as got:
            return bool(got.status == 200)
    except OSError:  # also of urllib and ssl: not there yet, or another server
        return False


def _environment(federation: Federation) -> dict[str, str]:
    return flower_environment(federation.home)


def _require_certificates(federation: Federation) -> None:
    for file in (federation.certificates.server, federation.certificates.server_key):
        if not file.is_file():
            raise RunError(f"{file}: no certificate; make one with fedlora federation certs")


def _refusal(federation: Federation, output: str) -> str:
    """Return why a device was not registered. Without a SuperLink flwr prints lines of JSON."""
    link = federation.link
    if link is not None and not answers(link.address, federation.certificates.ca):
        return f"no SuperLink answers at {link.address}: start it, or try again when it is up"
    return _reason(output)


def _reason(output: str) -> str:
    """Return what a flwr command complained of: the SuperLink's own words, or its last line."""
    found = re.search(r"\[code: \d+\] ([^\n\\\"]+)", output)
    return found.group(1) if found else last_line(output)
