"""The client under test of The Update Framework's conformance suite, over our own client.

    python -m fedlora.ota.conformance --metadata-dir D init ROOT
    python -m fedlora.ota.conformance --metadata-dir D --metadata-url U refresh
    python -m fedlora.ota.conformance --metadata-dir D --metadata-url U --target-name NAME \\
        --target-base-url T --target-dir F download

https://github.com/theupdateframework/tuf-conformance, CLIENT-CLI.md. Exit code 0: done; 1: refused.
A target is kept in F as one file, named by its quoted path, and not downloaded again while it fits.
With several ``--target-name`` one client takes them in their order, up to the first that fails.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from fedlora.errors import FedloraError, ReleaseError
from fedlora.files import write_atomic
from fedlora.ota.client import Client
from fedlora.ota.fetcher import Fetcher
from fedlora.ota.limits import Limits

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code."""
    given = _parser().parse_args(arguments)
    try:
        if given.command == "init":
            shutil.copyfile(given.root, given.metadata_dir / "root.json")
        else:
            _update(given)
    except (FedloraError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _update(given: argparse.Namespace) -> None:
    limits = Limits()
    fetcher = Fetcher(limits)
    try:
        client = Client(
            given.metadata_dir,
            given.metadata_url,
            bootstrap=None,
            fetcher=fetcher,
            targets_url=given.target_base_url,
        )
        client.refresh()
        if given.command == "download":
            for name in given.target_name or [""]:  # no name is refused as an unknown one is
                _download(client, name, given.target_dir, limits)
    finally:
        fetcher.close()


def _download(client: Client, name: str, folder: Path, limits: Limits) -> None:
    target = client.target(name)
    if target is None:
        raise ReleaseError(f"expected the target {name!r}, found none")
    path = folder / client.file_name(name)
    if client.is_at(target, path):
        return
    with tempfile.TemporaryDirectory() as parts:
        write_atomic(path, client.download(target, Path(parts), limits))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fedlora.ota.conformance")
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url")
    parser.add_argument("--target-name", action="append")
    parser.add_argument("--target-base-url")
    parser.add_argument("--target-dir", type=Path)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    return parser


if __name__ == "__main__":
    sys.exit(main())
