"""Each phase of a round is answered once, also by processes that are at work at the same time.

Flower gives every message a process of its own with a copy of the context, and keeps the copy of
the process that ends last. A server that sends two messages at once, or a slow one before a quick
one, would so meet a session in the same phase twice: two updates under the same masks, of which
the difference is in the open, or both shares of a client. Of all processes of a device only one can
make a file, so each answer makes one, in a folder of the temporary directory that outlives them:

    TMP/fedlora-UID/DEVICE/DIGEST    empty; of run, round and phase

Nothing is in it. A file of a week ago is of no session that could still be open, and is deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

from fedlora.errors import ConfigError, PhaseOrderError

__all__ = ["answer_once", "answers_of"]

KEPT_SECONDS = 7 * 24 * 3600.0


def answers_of(identity: Path) -> Path:
    """Return the folder of the device with this signing key; it need not be there."""
    device = hashlib.sha256(str(identity.absolute()).encode()).hexdigest()[:16]
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"fedlora-{user}" / device


def answer_once(folder: Path, run: str, round: int, phase: str) -> None:
    """Note that a phase is answered.

    Raises `PhaseOrderError` where it was before, and `ConfigError` for a folder that another user
    could write in.
    """
    for part in (folder.parent, folder):
        part.mkdir(mode=0o700, exist_ok=True)
    found = folder.parent.lstat()
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o077):
        raise ConfigError(
            f"{folder.parent}: expected a folder of this user alone (0700), found another's; "
            "remove it, or set TMPDIR"
        )
    name = hashlib.sha256(json.dumps([run, round, phase]).encode()).hexdigest()
    try:
        os.close(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        raise PhaseOrderError(
            f"message from the server: expected the phase {phase!r} of round {round} once, found "
            "it answered by another process of this device"
        ) from None
    if phase == "keys":
        _forget_old(folder)


def _forget_old(folder: Path) -> None:
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may do the same
            if path.lstat().st_mtime < time.time() - KEPT_SECONDS:
                path.unlink()
