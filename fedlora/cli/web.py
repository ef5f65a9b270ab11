"""`fedlora web`: the page that learns in the browser, served on this machine."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from fedlora.errors import UsageError

__all__ = ["web"]


def web(
    bundle: Annotated[
        list[Path],
        typer.Option(
            "--bundle",
            help="A folder of `fedlora export --web`; a second one may be for the other page.",
            show_default=False,
        ),
    ],
    adapter: Annotated[
        Path | None,
        typer.Option(help="The global adapter of the first bundle: a PEFT folder or a file."),
    ] = None,
    client: Annotated[
        str | None,
        typer.Option(help="Whose movements the watch replays. [default: the first of the data]"),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8080,
    runtime: Annotated[
        Path | None,
        typer.Option(help="Folder of onnxruntime-web's files, where fedlora came without them."),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Serve the page that learns as you type: everything is computed in the browser alone.

    Only the page's and the bundle's files are served, on this machine, until interrupted.

    Examples:

        fedlora web --bundle bundle/ --open

        fedlora web --bundle bundle/ --adapter global.safetensors --bundle watch-bundle/
    """
    from fedlora.formats import load_adapter
    from fedlora.web import Bundle, make_site, server

    if not 1 <= len(bundle) <= 2:
        raise UsageError(f"--bundle: expected one or two, found {len(bundle)}")
    loaded = None if adapter is None else load_adapter(adapter)
    bundles = [Bundle(folder, loaded if folder is bundle[0] else None, client) for folder in bundle]
    site = make_site(bundles, runtime=runtime)
    found = server(site, host, port)
    with found:
        address = f"http://{f'[{host}]' if ':' in host else host}:{found.server_address[1]}/"
        typer.echo(address)
        if open_page:
            webbrowser.open(address)
        found.serve_forever()
