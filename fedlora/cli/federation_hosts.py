"""`fedlora federation certs|key|register|start-link|start-node`: the steps on real hosts.

Certificates and the SuperLink are the server's, keys and SuperNodes the devices'.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fedlora.cli.federation import DEFAULT_DIR, AsJson, Dir, app, say
from fedlora.errors import ConfigError, UsageError
from fedlora.experiment import parse_override

__all__: list[str] = []


@app.command()
def certs(
    folder: Dir = DEFAULT_DIR,
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name or address by which devices call the server."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="Validity of the server's certificate.")] = 397,
    as_json: AsJson = False,
) -> None:
    """Make the authority and the server's certificate, or only a new one of the latter.

    An authority that is there stays: run it again before the certificate ends, and devices need
    nothing new.

    Examples:

        fedlora federation certs --host fl.example.org --dir /var/lib/fedlora
    """
    from fedlora.federation.deploy.certificates import make_certificates
    from fedlora.federation.deploy.folder import Federation

    federation = Federation.read_or_new(folder)
    files = make_certificates(federation.certificates.ca.parent, host or [], days=days)
    if not Federation.there(folder):
        federation.save()
    if as_json:
        names = {"ca": files.ca, "server": files.server, "server_key": files.server_key}
        typer.echo(json.dumps({name: str(path) for name, path in names.items()}))
        return
    typer.echo(f"{files.server}: for {', '.join([*(host or []), 'localhost', '127.0.0.1'])}")
    typer.echo(f"give {files.ca} to every device; keep {files.ca_key} off the network")


@app.command()
def key(
    path: Annotated[
        Path, typer.Argument(help="The private key's file; the public one is FILE.pub.")
    ],
    as_json: AsJson = False,
) -> None:
    """Make a node key, on the device whose key it is.

    The private half stays there; FILE.pub goes to the server, which registers it.

    Examples:

        fedlora federation key node.key
    """
    from fedlora.federation.deploy.keys import fingerprint, make_node_key

    public = make_node_key(path)
    if as_json:
        found = {"key": str(path), "public": str(public), "fingerprint": fingerprint(public)}
        typer.echo(json.dumps(found))
        return
    typer.echo(f"{public}: {fingerprint(public)}; have it registered on the server")


@app.command()
def register(
    public: Annotated[Path, typer.Argument(metavar="KEY.pub", help="A device's public key.")],
    folder: Dir = DEFAULT_DIR,
    as_json: AsJson = False,
) -> None:
    """Let the device with this key take part; run it on the server, while its SuperLink is up.

    Examples:

        fedlora federation register node.key.pub --dir /var/lib/fedlora
    """
    from fedlora.federation.deploy.folder import Federation
    from fedlora.federation.deploy.keys import fingerprint
    from fedlora.federation.deploy.link import register as register_key

    node_id = register_key(Federation.read(folder), public)
    if as_json:
        typer.echo(json.dumps({"node_id": node_id, "fingerprint": fingerprint(public)}))
    else:
        typer.echo(f"registered: node {node_id}, {fingerprint(public)}")


@app.command("start-link")
def start_link(
    folder: Dir = DEFAULT_DIR,
    host: Annotated[str, typer.Option(help="To listen on; keep it behind a proxy.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> None:
    """Be the SuperLink, until a signal: TLS, registered keys only, a database in the folder.

    Its Control API has no login: whoever reaches it can run code on every node. Listen on the
    loopback and let a proxy show /v1/fleet/ and /health alone; docs/deployment.md has one.

    Examples:

        fedlora federation start-link --dir /var/lib/fedlora --port 8000
    """
    from fedlora.federation.deploy.folder import Federation, Link
    from fedlora.federation.deploy.link import become_link

    become_link(Federation.read_or_new(folder), Link(host, port))


@app.command("start-node")
def start_node(
    link: Annotated[str, typer.Option(metavar="HOST:PORT", help="Of the server.")],
    node_key: Annotated[
        Path | None, typer.Option("--key", help="This node's private key, of `federation key`.")
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(help="The server's ca.crt. [default: the authorities this system trusts]"),
    ] = None,
    trainer: Annotated[
        str | None, typer.Option(help="onnx or torch. [default: torch where it is installed]")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="The device bundle that an onnx node trains with.")
    ] = None,
    client: Annotated[
        str | None, typer.Option(help="Whose part of the data is here; or --partition.")
    ] = None,
    partition: Annotated[
        int | None, typer.Option(min=0, help="The same by its number, as in a simulation.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Where the device keeps what is its own.")
    ] = None,
    node_config: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Another key of the node config, as data=…"),
    ] = None,
    home: Annotated[Path, typer.Option(help="Of Flower's own files on this device.")] = Path(
        "flower-home"
    ),
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="On the loopback. [default: a free one]")
    ] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds for the server to be there.")] = 60.0,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without TLS; a SuperLink of fedlora refuses it.")
    ] = False,
) -> None:
    """Be a SuperNode, until a signal. What a device opens is named here, and never by the server.

    Ends with one line when the server refuses it: an unregistered key, a wrong certificate, or a
    plain connection.

    Examples:

        fedlora federation start-node --link fl.example.org:443 --ca ca.crt --key node.key \\
            --trainer onnx --bundle bundle/ --client 1_left --state state/
    """
    from fedlora.federation.deploy.node import NodeOptions, run_node
    from fedlora.federation.flower_commands import free_port

    if trainer not in (None, "onnx", "torch"):
        raise UsageError(f"--trainer: expected onnx or torch, found {trainer!r}")
    if client is not None and partition is not None:
        raise UsageError("--client and --partition: expected one of them")
    named: dict[str, str | int | None] = {
        "trainer": trainer,
        "bundle": None if bundle is None else str(bundle.absolute()),
        "client": client,
        "partition-id": partition,
        "state": None if state is None else str(state.absolute()),
    }
    config = _node_values(node_config or []) | {
        name: value for name, value in named.items() if value is not None
    }
    options = NodeOptions(
        link=link,
        key=node_key,
        port=port or free_port(),
        home=home.absolute(),
        ca=ca,
        insecure=insecure,
        config=config,
    )
    if ca is not None and not ca.is_file():
        raise ConfigError(f"--ca {ca}: no such file")
    run_node(options, wait=wait, say=say)


def _node_values(texts: Sequence[str]) -> dict[str, bool | int | float | str]:
    """Numbers and true or false as such; all else, also what else TOML would read, is text."""
    values: dict[str, bool | int | float | str] = {}
    for text in texts:
        name, equals, raw = text.partition("=")
        if not equals:
            raise UsageError(f"--node-config {text}: expected KEY=VALUE, such as min-battery=30")
        _, value = parse_override(text)
        values[name.strip()] = value if isinstance(value, bool | int | float | str) else raw
    return values
