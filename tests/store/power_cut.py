"""A disk that forgets: what a power cut leaves of a folder, whatever was not flushed being lost.

`Disk` watches the calls of `os` that change files under a folder. They work as ever, while it keeps
a second account, of what is safely on the disk: a file's bytes since its last fsync, a folder's
entries since the folder's. After a cut a folder has the entries of its last fsync and then any
number of the changes since, in their order; a file that was not flushed has any part of its bytes.
That is more than any one file system does to a program, and all that POSIX allows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

__all__ = ["Disk", "PowerCut"]


class PowerCut(BaseException):
    """The process is gone: no `except Exception` sees it, and no later call does anything."""


@dataclass(eq=False)
class Node:
    """A file or a folder."""

    flushed: bytes | None = None  # a file's bytes on the disk
    entries: dict[str, Node] | None = None  # a folder's entries on the disk
    changes: list[tuple[str, str | None, Node | None]] = field(default_factory=list)

    def live(self, kept: int | None = None) -> dict[str, Node]:
        """Return a folder's entries after the first `kept` changes, all of them by default."""
        found = dict(self.entries or {})
        for gone, name, node in self.changes[:kept]:
            found.pop(gone, None)
            if name is not None and node is not None:
                found[name] = node
        return found


class Disk:
    """What is on the disk of everything under `root`; `calls` lists what was done to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, Path]] = []
        self.tree = self._scan(root)
        self._stop: int | None = None
        self._forgiven: Callable[[str, Path], bool] = lambda name, path: False

    @contextmanager
    def watched(
        self, stop: int | None = None, *, not_flushed: Callable[[str, Path], bool] | None = None
    ) -> Iterator[None]:
        """Watch; raise `PowerCut` in the place of call number `stop`, 0 being the first.

        not_flushed: which fsync ("file" or "folder", path) is left out, as by a program with a bug.
        """
        self.calls, self._stop = [], stop
        self._forgiven = not_flushed or (lambda name, path: False)
        with mock.patch.multiple(
            os,
            open=self._open(os.open),
            fdopen=self._fdopen(os.fdopen),
            fsync=self._fsync,
            replace=self._rename(os.replace),
            rename=self._rename(os.rename),
            unlink=self._remove(os.unlink),
            remove=self._remove(os.remove),
            rmdir=self._remove(os.rmdir),
            mkdir=self._mkdir(os.mkdir),
            chmod=self._plain("chmod", os.chmod),
        ):
            yield

    def after_cut(self, target: Path, how: str | np.random.Generator) -> Path:
        """Write what a power cut now would leave to `target`.

        how: "forgets" all that was not flushed; "renames first": has all changes of folders and no
        byte that was not flushed; a generator: any of what can be.
        """
        self._write(self.tree, self.root, target, how)
        return target

    def _write(self, node: Node, at: Path, target: Path, how: str | np.random.Generator) -> None:
        target.mkdir()
        most = len(node.changes)
        kept = {"forgets": 0, "renames first": most}.get(how) if isinstance(how, str) else None
        if not isinstance(how, str):
            kept = int(how.integers(most + 1))
        where = {child: at / name for name, child in node.live().items()}
        for name, child in node.live(kept).items():
            if child.entries is not None:
                self._write(child, where.get(child, at / "gone"), target / name, how)
            elif child.flushed is not None:
                (target / name).write_bytes(child.flushed)
            else:
                place = where.get(child)
                data = place.read_bytes() if place is not None and place.is_file() else b""
                length = 0 if isinstance(how, str) else int(how.integers(len(data) + 1))
                (target / name).write_bytes(data[:length])

    def _scan(self, path: Path) -> Node:
        if path.is_dir():
            return Node(entries={child.name: self._scan(child) for child in path.iterdir()})
        return Node(flushed=path.read_bytes())

    def _node(self, path: Path) -> Node | None:
        """Return what is at a path now; None outside of the root."""
        if not path.is_relative_to(self.root):
            return None
        node = self.tree
        for name in path.relative_to(self.root).parts:
            node = node.live()[name]
        return node

    def _step(self, what: str, path: Any) -> bool:
        """Count a call; whether it is about something under the root."""
        path = Path(os.path.abspath(path))
        if not path.is_relative_to(self.root):
            return False
        if self._stop is not None and len(self.calls) >= self._stop:
            raise PowerCut
        self.calls.append((what, path))
        return True

    def _changed(self, path: Any, name: str | None, node: Node | None) -> None:
        path = Path(os.path.abspath(path))
        parent = self._node(path.parent)
        if parent is not None:
            parent.changes.append((path.name, name, node))

    def _open(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *rest: Any, **options: Any) -> int:
            new = bool(flags & os.O_CREAT) and not os.path.exists(path)
            if new and self._step("create", path):
                descriptor = real(path, flags, *rest, **options)
                self._changed(path, Path(path).name, Node())
                return descriptor
            return real(path, flags, *rest, **options)

        return call

    def _fdopen(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, *rest: Any, **options: Any) -> Any:
            path = self._path(descriptor)
            file = real(descriptor, *rest, **options)
            return file if path is None else _Written(file, path, self._step)

        return call

    def _fsync(self, descriptor: int) -> None:
        path = self._path(descriptor)
        if path is None:
            return
        node = self._node(path)
        assert node is not None
        kind = "file" if node.entries is None else "folder"
        self._step(f"fsync {kind}", path)
        if self._forgiven(kind, path):
            return
        if node.entries is None:
            node.flushed = path.read_bytes()
        else:
            node.entries, node.changes = node.live(), []

    def _rename(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any) -> None:
            inside = self._step("rename", target)
            real(source, target)
            if inside:
                start, end = (Path(os.path.abspath(path)) for path in (source, target))
                node = self._node(start)
                if start.parent == end.parent:
                    self._changed(start, end.name, node)
                else:  # two changes, of which a cut may keep either
                    self._changed(end, end.name, node)
                    self._changed(start, None, None)

        return call

    def _remove(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(path: Any, **options: Any) -> None:
            inside = self._step("remove", path)
            real(path, **options)
            if inside:
                self._changed(path, None, None)

        return call

    def _mkdir(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(path: Any, *rest: Any) -> None:
            if os.path.exists(path):  # the "exist_ok" of Path.mkdir
                real(path, *rest)
            inside = self._step("mkdir", path)
            real(path, *rest)
            if inside:
                self._changed(path, Path(path).name, Node(entries={}))

        return call

    def _plain(self, name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(path: Any, *rest: Any, **options: Any) -> None:
            self._step(name, path)
            real(path, *rest, **options)

        return call

    def _path(self, descriptor: int) -> Path | None:
        """Return where under the root an open file is."""
        about = os.fstat(descriptor)

        def find(node: Node, at: Path) -> Path | None:
            found = os.stat(at)
            if (found.st_dev, found.st_ino) == (about.st_dev, about.st_ino):
                return at
            if node.entries is None:
                return None
            inner = (find(child, at / name) for name, child in node.live().items())
            return next((path for path in inner if path is not None), None)

        return find(self.tree, self.root)


class _Written:
    """An open file whose writes count as calls."""

    def __init__(self, file: Any, path: Path, step: Callable[[str, Path], bool]) -> None:
        self._file, self._path, self._step = file, path, step

    def write(self, data: bytes) -> int:
        self._step("write", self._path)
        return int(self._file.write(data))

    def flush(self) -> None:
        self._step("flush", self._path)
        self._file.flush()

    def fileno(self) -> int:
        return int(self._file.fileno())

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
