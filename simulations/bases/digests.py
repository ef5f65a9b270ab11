"""SHA-256 of the files of a base, for its card."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

__all__ = ["digests"]


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the digest of each named file in `folder`."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
