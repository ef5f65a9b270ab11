"""The files of a bundle and of a state: read, compared with their digests, and copied.

Only what a copy needs is read of a manifest here; `fedlora.device.manifest` checks the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedlora.errors import DigestMismatchError, FormatError
from fedlora.formats.strict_json import is_digest, is_text, parse_json, shown
from fedlora.formats.tensors import read_bytes

__all__ = [
    "MANIFEST",
    "MAX_JSON",
    "BundleFiles",
    "check_bundle",
    "check_digest",
    "copy_bundle",
    "read_file",
    "read_manifest",
    "write_new",
]

MANIFEST = "manifest.json"
MAX_JSON = 4 << 20  # bytes of a manifest or a state.json
_NAME = re.compile(r"\w[\w.-]{0,100}", re.ASCII)  # of a file in a bundle


@dataclass(frozen=True, slots=True)
class BundleFiles:
    """What a manifest says of its bundle's files."""

    folder: Path
    manifest: bytes
    base: str  # fingerprint
    files: Mapping[str, str]  # SHA-256 by name, without the manifest

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, and so of the whole bundle."""
        return hashlib.sha256(self.manifest).hexdigest()


def read_manifest(folder: Path) -> BundleFiles:
    """Read a manifest. Raises `FormatError`."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FormatError(
            f"{folder}: expected a bundle with {MANIFEST}, found none; make one with fedlora export"
        )
    data = read_file(path, MAX_JSON)
    record = parse_json(data, str(path))
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict) or not is_text(record.get("base")):
        raise FormatError(f"{path}: expected the manifest of a bundle, with its base and files")
    found = {}
    for name, about in files.items():
        digest = about.get("sha256") if isinstance(about, dict) else None
        if not _NAME.fullmatch(name) or name == MANIFEST or not is_digest(digest):
            raise FormatError(
                f"{path}: files: expected names of files with their SHA-256, found {shown(name)}"
            )
        found[name] = str(digest)
    return BundleFiles(folder, data, record["base"], found)


def check_bundle(bundle: BundleFiles) -> None:
    """Compare every file with its digest. Raises `FormatError` and `DigestMismatchError`."""
    for name in bundle.files:
        _check_or_copy(bundle, name, None)


def copy_bundle(bundle: BundleFiles, target: Path) -> None:
    """Copy a bundle into the folder `target`, files 0600; raises what `check_bundle` does.

    Copied and not linked: whoever changes the source in place would change the copy too.
    """
    for name in bundle.files:
        _check_or_copy(bundle, name, target / name)
    write_new(target / MANIFEST, bundle.manifest)


def check_digest(path: Path, data: bytes, digest: str, todo: str) -> None:
    """Raise `DigestMismatchError` unless `data`, read from `path`, has this SHA-256."""
    _compare(path, digest, hashlib.sha256(data).hexdigest(), todo)


def read_file(path: Path, limit: int) -> bytes:
    """Return a file of at most `limit` bytes. Raises `FormatError`."""
    try:
        return read_bytes(path, limit)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from None


def write_new(path: Path, data: bytes) -> None:
    """Write a file that is not there yet, 0600."""
    with os.fdopen(_create(path), "wb") as file:
        file.write(data)


def _check_or_copy(bundle: BundleFiles, name: str, copy: Path | None) -> None:
    source = bundle.folder / name
    if source.is_symlink() or not source.is_file():
        raise FormatError(f"{source}: expected a file of the bundle, found none or a link")
    found = hashlib.sha256()
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(open(source, "rb"))
        out = None if copy is None else opened.enter_context(os.fdopen(_create(copy), "wb"))
        while block := file.read(1 << 20):
            found.update(block)
            if out is not None:
                out.write(block)
    _compare(source, bundle.files[name], found.hexdigest(), "export or get the bundle again")


def _compare(path: Path, expected: str, found: str, todo: str) -> None:
    if found != expected:
        raise DigestMismatchError(
            f"{path}: expected SHA-256 {expected[:12]}…, found {found[:12]}…; it is damaged or was "
            f"changed: {todo}"
        )


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
