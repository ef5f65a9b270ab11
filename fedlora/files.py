"""Write files and folders so that a crash leaves the old or the new one, never half of one.

A file is written beside its target, flushed to the disk, and renamed over it, which POSIX makes
atomic. A folder cannot be renamed over a full one, so `replace_folder` takes two steps: the old one
is renamed to ``.NAME.old``, then the new one takes its place. A crash between the two leaves no
NAME, but the whole old one as ``.NAME.old``. The next `replace_folder` puts it back first; by hand:
``mv .NAME.old NAME``. There is one writer at a time for a target; `lock_file` keeps others out.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from fedlora.errors import RunError

__all__ = [
    "interrupted_folder",
    "lock_file",
    "replace_folder",
    "require_replaceable",
    "sync_folder",
    "write_atomic",
]


def write_atomic(path: str | os.PathLike[str], data: bytes, *, mode: int | None = None) -> None:
    """Write `data` to `path`, whose folder is made if need be; an old file stays until it is done.

    mode: permissions such as 0o600; None: those of the old file, else what the umask leaves.

    Raises `RunError` when the file system refuses.
    """
    target = Path(os.path.realpath(path))
    with _named_errors(target):
        if target.is_dir():
            raise RunError(f"{target}: expected a file to write, found a folder; name a file in it")
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, _file_mode(target) if mode is None else mode)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(target.parent)


def replace_folder(
    target: str | os.PathLike[str],
    build: Callable[[Path], None],
    *,
    owned: Collection[str] = (),
    mode: int | None = None,
) -> None:
    """Let ``build(folder)`` fill a new folder, and put it in the place of `target`.

    A target that exists is only replaced when nothing is lost that was not ours: each of its
    entries must be a plain file that the new folder has too, or match a pattern of `owned`.
    mode: permissions of the new folder, such as 0o700; None: what the umask leaves.

    Raises `RunError` otherwise, and when the file system refuses.
    """
    target = Path(os.path.realpath(target))  # not the link, but what it points to
    with _named_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _recover(target)
        _require_folder(target)
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
        try:
            build(fresh)
            require_replaceable(target, {entry.name for entry in fresh.iterdir()}, owned)
            _sync_tree(fresh)
            fresh.chmod(0o777 & ~_umask() if mode is None else mode)
            old = interrupted_folder(target)
            if target.exists():
                os.rename(target, old)
            os.rename(fresh, target)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            _recover(target)
            raise
        sync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def require_replaceable(
    target: str | os.PathLike[str], names: Collection[str], owned: Collection[str] = ()
) -> None:
    """Raise the `RunError` with which `replace_folder` refuses to lose what is in `target`.

    names: of the new folder's entries. For who has long work before it.
    """
    target = Path(target)
    _require_folder(target)
    for entry in sorted(target.iterdir()) if target.exists() else ():
        known = entry.name in names and entry.is_file() and not entry.is_symlink()
        if not known and not any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in owned):
            raise RunError(
                f"{target}: expected a new or empty folder, or one with only "
                f"{', '.join(sorted(names))}, found {entry.name!r}, which would be lost; "
                "write to another folder or move it away"
            )


def interrupted_folder(target: str | os.PathLike[str]) -> Path:
    """Return where an interrupted `replace_folder` keeps the old folder."""
    target = Path(target)
    return target.with_name(f".{target.name}.old")


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk: what was created, renamed and removed in it."""
    if os.name == "nt":  # a folder cannot be opened there, and renames are flushed by the system
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock_file(descriptor: int) -> None:
    """Lock an open file for this process alone, or raise `OSError` at once.

    The lock ends when the file is closed, so also with the process, however that ends.
    """
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _recover(target: Path) -> None:
    for entry in target.parent.iterdir():
        if entry.name.startswith(f".{target.name}.new-"):
            shutil.rmtree(entry, ignore_errors=True)
    old = interrupted_folder(target)
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, target)


def _require_folder(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise RunError(f"{target}: expected a folder to write, found a file; name another path")


@contextlib.contextmanager
def _named_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{target}: cannot be written: {error.strerror or error}") from error


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            with open(os.path.join(parent, name), "r+b") as file:
                os.fsync(file.fileno())
        sync_folder(Path(parent))


def _file_mode(target: Path) -> int:
    return target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()


def _umask() -> int:
    # There is no call that only reads it.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
