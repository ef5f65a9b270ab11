"""The folder of a federation: where everything is, and the one file that says what runs.

DIR/federation.json     what was started: processes, ports, nodes, the last run
DIR/certs/              ca.crt, ca.key, server.crt, server.key
DIR/keys/node-0(.pub)   node keys of `fedlora federation up`
DIR/home/               Flower's own state of the server's side, and its config.toml
DIR/link.db             the SuperLink's database
DIR/logs/               link.log, node-0.log, …
DIR/nodes/0/            of one node: home/ (Flower's) and state/ (personal adapters)
DIR/bundle/             the exported bundle, where none was named
DIR/out/                the run: experiment.toml, rounds.jsonl, checkpoint/, results
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from fedlora.errors import ConfigError, RunError
from fedlora.federation.deploy.certificates import Certificates
from fedlora.federation.deploy.processes import Process
from fedlora.files import write_atomic
from fedlora.plain import from_plain, to_plain

__all__ = ["Federation", "Link", "Node"]

VERSION = 1


@dataclass(frozen=True, slots=True)
class Link:
    """The SuperLink."""

    host: str  # that it listens on
    port: int
    process: Process | None = None

    @property
    def address(self) -> str:
        """HOST:PORT by which this host reaches it."""
        anywhere = {"0.0.0.0": "127.0.0.1", "::": "localhost"}
        host = anywhere.get(self.host, self.host)
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Node:
    """One SuperNode on this host."""

    number: int
    trainer: str
    bundle: str | None = None
    python: str | None = None  # the interpreter; None: the one that runs this
    port: int | None = None
    node_id: str | None = None  # that it was registered under
    process: Process | None = None

    @property
    def name(self) -> str:
        """As its files are called."""
        return f"node-{self.number}"


@dataclass(frozen=True, slots=True)
class Federation:
    """What federation.json holds; a changed one is written by `save`."""

    folder: Path  # absolute
    token: str = field(default_factory=lambda: uuid.uuid4().hex)  # in every mark of a process
    link: Link | None = None
    nodes: tuple[Node, ...] = ()

    @property
    def certificates(self) -> Certificates:
        """The files of certs/."""
        return Certificates.of(self.folder / "certs")

    @property
    def home(self) -> Path:
        """Flower's state of the server's side."""
        return self.folder / "home"

    @property
    def out(self) -> Path:
        """The run of `fedlora federation up`."""
        return self.folder / "out"

    def log(self, name: str) -> Path:
        """Return the log of link or node-0, node-1, …"""
        return self.folder / "logs" / f"{name}.log"

    def key(self, node: Node) -> Path:
        """Return the private key of a node."""
        return self.folder / "keys" / node.name

    def node_folder(self, node: Node) -> Path:
        """Return the folder with a node's home and state."""
        return self.folder / "nodes" / str(node.number)

    def mark(self, name: str) -> str:
        """Return the mark in the environment of link or node-0, …"""
        return f"{self.token}/{name}"

    def save(self) -> None:
        """Write federation.json."""
        table = to_plain(self) | {"version": VERSION}
        del table["folder"]
        data = json.dumps(table, indent=1).encode() + b"\n"
        write_atomic(self.folder / "federation.json", data, mode=0o600)

    @classmethod
    def there(cls, folder: Path) -> bool:
        """Whether a folder is a federation's."""
        return (folder / "federation.json").is_file()

    @classmethod
    def read(cls, folder: Path) -> Federation:
        """Read federation.json. Raises `RunError`."""
        folder = folder.absolute()
        path = folder / "federation.json"
        try:
            table = json.loads(path.read_bytes())
            if table.pop("version") != VERSION:
                raise ValueError(f"expected version {VERSION}")
            # JSON has no paths, and this one is where the file is.
            values = from_plain(_Table, table)
        except OSError as error:
            raise RunError(
                f"{path}: no federation here: {error.strerror}; begin with fedlora federation up "
                "or certs"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise RunError(f"{path}: not a federation of this version: {error}") from None
        return cls(folder, values.token, values.link, values.nodes)

    @classmethod
    def read_or_new(cls, folder: Path) -> Federation:
        """Read federation.json, or begin a new one."""
        return cls.read(folder) if cls.there(folder) else cls(folder.absolute())


@dataclass(frozen=True, slots=True)
class _Table:
    token: str
    link: Link | None = None
    nodes: tuple[Node, ...] = ()
