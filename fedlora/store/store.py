"""`Store`: the calls that read and change a device's state; see `fedlora.store`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlora.adapter import Adapter
from fedlora.errors import BaseMismatchError, FormatError, StoreError
from fedlora.files import lock_file, replace_folder, sync_folder, write_atomic
from fedlora.formats.packed import decode_packed, encode_packed
from fedlora.formats.tensors import MAX_FILE_BYTES, parse_tensors, read_bytes
from fedlora.store.bundle import (
    MANIFEST,
    MAX_JSON,
    check_bundle,
    check_digest,
    copy_bundle,
    read_file,
    read_manifest,
    write_new,
)
from fedlora.store.status import (
    BundleEntry,
    GlobalEntry,
    PersonalEntry,
    Status,
    read_status,
    status_bytes,
)

__all__ = ["Store"]

STATE, LOCK, ADAPTERS, BUNDLE, CACHE = "state.json", ".lock", "adapters", "bundle", "cache"
KEPT = "federation"  # what a client keeps of its runs: `fedlora.store.kept`


class Store:
    """A state folder, `path`. Made by `Store.create` and `Store.open`.

    Nothing is cached: every call reads `state.json`, since another process may have written it.

    Raises `FormatError` and `DigestMismatchError` when a file is not what was written, and
    `StoreError` when the folder cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._guard = threading.RLock()
        self._holds_lock = False

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], bundle: str | os.PathLike[str], *, in_place: bool = False
    ) -> Store:
        """Make a new state folder for a bundle, which is checked file by file, and copied.

        in_place: use the bundle where it is; it must stay there unchanged. The folder appears whole
        or not at all. Raises `StoreError` when there is something at `path` already, `FormatError`
        and `DigestMismatchError` for a bad bundle.
        """
        target = Path(path)
        _require_free(target)
        source = read_manifest(Path(bundle))
        place = os.path.abspath(source.folder) if in_place else None

        def build(folder: Path) -> None:
            if in_place:
                check_bundle(source)
            else:
                (folder / BUNDLE).mkdir(mode=0o700)
                copy_bundle(source, folder / BUNDLE)
            _write_first(folder, BundleEntry(source.digest, source.base, place))

        replace_folder(target, build, mode=0o700)
        return cls(target)

    @classmethod
    def create_without_bundle(cls, path: str | os.PathLike[str], base: str) -> Store:
        """Make a new state folder for a client that trains in torch on the base of a fingerprint.

        It keeps adapters as any other, and serves none: `bundle` is refused. Raises `StoreError` as
        `create` does.
        """
        target = Path(path)
        _require_free(target)
        entry = BundleEntry(None, base, None)
        replace_folder(target, lambda folder: _write_first(folder, entry), mode=0o700)
        return cls(target)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Store:
        """Open a state folder for reading; writing takes the lock when it is called for."""
        store = cls(Path(path))
        if store.status().bundle.digest is not None:
            _ = store.bundle
        return store

    def status(self) -> Status:
        """Return what is installed."""
        path = self.path / STATE
        if not path.is_file():
            raise StoreError(
                f"{self.path}: expected a device's state with {STATE}, found none; make one with "
                "fedlora device init"
            )
        return read_status(read_file(path, MAX_JSON), str(path))

    @property
    def bundle(self) -> Path:
        """The folder of the bundle. Its manifest is compared with the state, its files are not."""
        entry = self.status().bundle
        if entry.digest is None:
            raise StoreError(
                f"{self.path}: expected a state with a bundle, found that of a client that trains "
                "in torch; make one with fedlora device init"
            )
        folder = self.path / BUNDLE if entry.folder is None else Path(entry.folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise FormatError(f"{path}: expected the bundle of this state, found none; {_AGAIN}")
        check_digest(path, read_file(path, MAX_JSON), entry.digest, _AGAIN)
        return folder

    @property
    def cache(self) -> Path:
        """A folder for what is made of the owner's data; `forget` empties it."""
        folder = self.path / CACHE
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def global_adapter(self) -> Adapter | None:
        """Return the installed global adapter, None if there is none."""
        return self._load(lambda status: status.installed)

    def personal_adapter(self) -> Adapter | None:
        """Return the owner's adapter, None if there is none."""
        return self._load(lambda status: status.personal)

    def serving(self) -> Adapter | None:
        """Return the adapter to serve: the personal one, else the global one, else None (base)."""
        return self._load(lambda status: status.personal or status.installed)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing. Writing calls take it by themselves.

        Hold it over reading, training and committing, so that no other adapter is installed in
        between. May be nested; another thread of the same store waits for it. What a crash left
        over is removed. Raises `StoreError` at once when another process holds it.
        """
        with self._guard:
            if self._holds_lock:
                yield
                return
            self.status()  # before anything is made: a lock in a foreign folder
            with _locked(self.path):
                self._holds_lock = True
                try:
                    self._remove_others(self.status())
                    yield
                finally:
                    self._holds_lock = False

    def install_global(self, adapter: Adapter, provenance: Mapping[str, Any] | None = None) -> None:
        """Install a global adapter in the place of the one that is there.

        The personal adapter stays and is served on; it is marked as stale unless it started from
        this very adapter. Raises `BaseMismatchError` for an adapter of another base.
        """
        with self.lock():
            before = self.status()
            digest, num_bytes = self._add(adapter, before, provenance)
            entry = GlobalEntry(digest, num_bytes, adapter.fingerprint(), dict(provenance or {}))
            personal = before.personal
            if personal is not None and (
                before.installed is None or before.installed.fingerprint != entry.fingerprint
            ):
                stale = personal.started_from != entry.fingerprint
                personal = replace(personal, stale=stale)
            self._commit(replace(before, installed=entry, personal=personal))

    def commit_personal(
        self, adapter: Adapter, metrics: Mapping[str, Any], *, from_base: bool = False
    ) -> None:
        """Make an adapter the owner's, in the place of the one that is there.

        It is recorded as started from the installed global adapter, or from the base. `metrics` is
        anything that JSON holds. Raises `BaseMismatchError` for an adapter of another base.
        """
        with self.lock():
            before = self.status()
            started = None
            if before.installed is not None and not from_base:
                started = before.installed.fingerprint
            digest, num_bytes = self._add(adapter, before, {"global": started})
            entry = PersonalEntry(
                digest, num_bytes, adapter.fingerprint(), started, False, dict(metrics)
            )
            self._commit(replace(before, personal=entry))

    def install_both(
        self,
        adapter: Adapter,
        personal: Adapter | None,
        *,
        provenance: Mapping[str, Any],
        metrics: Mapping[str, Any],
    ) -> None:
        """Install a global adapter and the owner's made from it, in one commit.

        personal: None where the global adapter is to be served; an older personal one is then gone.
        Raises `BaseMismatchError` for an adapter of another base.
        """
        with self.lock():
            before = self.status()
            digest, num_bytes = self._add(adapter, before, provenance)
            started = adapter.fingerprint()
            installed = GlobalEntry(digest, num_bytes, started, dict(provenance))
            entry = None
            if personal is not None:
                digest, num_bytes = self._add(personal, before, {"global": started})
                entry = PersonalEntry(
                    digest, num_bytes, personal.fingerprint(), started, False, dict(metrics)
                )
            self._commit(replace(before, installed=installed, personal=entry))

    def forget(self) -> bool:
        """Erase the personal adapter, its metrics, the cache, and what was kept of federations.

        Returns whether there was anything.

        The global adapter and the bundle stay. When this returns, no file with the owner's data is
        left and the folders are on the disk; if it is interrupted, call it again.
        """
        with self.lock():
            before = self.status()
            had_cache = any([_empty(self.path / CACHE), _empty(self.path / KEPT)])
            if before.personal is not None:
                self._commit(replace(before, personal=None))
            return had_cache or before.personal is not None

    def _add(
        self, adapter: Adapter, status: Status, provenance: Mapping[str, Any] | None
    ) -> tuple[str, int]:
        """Write an adapter's file, and return its digest and size."""
        if adapter.base is not None and adapter.base != status.bundle.base:
            raise BaseMismatchError(
                f"{self.path}: expected an adapter of the base {status.bundle.base[:12]}…, found "
                f"one of {adapter.base[:12]}…; it only means something on its own base"
            )
        data = encode_packed(adapter, provenance=provenance)
        decode_packed(parse_tensors(data, "adapter"), "adapter")  # what cannot be read: refused
        digest = hashlib.sha256(data).hexdigest()
        write_atomic(self._file(digest), data, mode=0o600)
        return digest, len(data)

    def _commit(self, status: Status) -> None:
        status = replace(status, commits=status.commits + 1)
        data = status_bytes(status)
        read_status(data, STATE)  # metrics that could not be read again are not written
        write_atomic(self.path / STATE, data, mode=0o600)
        self._remove_others(status)

    def _remove_others(self, status: Status) -> None:
        """Remove what a commit replaced or a crash left over; only the lock's holder may."""
        named = {f"{digest}.safetensors" for digest in status.digests()}
        adapters = [p for p in (self.path / ADAPTERS).iterdir() if p.name not in named]
        leftovers = [p for p in self.path.iterdir() if p.name.startswith(f".{STATE}.")]
        try:
            if adapters or leftovers:
                # A killed commit may have renamed state.json without putting that on the disk; the
                # adapter that the older one names must not go before.
                sync_folder(self.path)
            for found in (adapters, leftovers):
                for path in found:
                    path.unlink()
                if found:
                    sync_folder(found[0].parent)
        except OSError as error:
            raise StoreError(f"{error.filename}: cannot be removed: {error.strerror}") from None

    def _load(self, pick: Callable[[Status], GlobalEntry | PersonalEntry | None]) -> Adapter | None:
        entry = pick(self.status())
        while entry is not None:
            path = self._file(entry.digest)
            try:
                data = read_bytes(path, MAX_FILE_BYTES)
            except (FormatError, OSError):
                # A commit of another process may have removed it just now, and named another.
                before, entry = entry, pick(self.status())
                if entry is not None and entry.digest == before.digest:
                    raise FormatError(
                        f"{path}: expected the adapter that {STATE} names, found none; "
                        f"{_what_to_do(entry)}"
                    ) from None
                continue
            check_digest(path, data, entry.digest, _what_to_do(entry))
            return decode_packed(parse_tensors(data, str(path)), str(path)).adapter
        return None

    def _file(self, digest: str) -> Path:
        return self.path / ADAPTERS / f"{digest}.safetensors"


_AGAIN = "put it back, or make a new state with fedlora device init"


def _what_to_do(entry: GlobalEntry | PersonalEntry) -> str:
    if isinstance(entry, PersonalEntry):
        return "erase it with fedlora device forget, and personalize again"
    return "install a global adapter again with fedlora device install"


def _require_free(target: Path) -> None:
    if (target / STATE).exists():
        raise StoreError(f"{target}: there is a device's state already; name another folder")
    if target.exists() and not (target.is_dir() and next(target.iterdir(), None) is None):
        raise StoreError(f"{target}: expected a new or empty folder, found something in it")


def _write_first(folder: Path, bundle: BundleEntry) -> None:
    (folder / ADAPTERS).mkdir(mode=0o700)
    write_new(folder / LOCK, b"")
    write_new(folder / STATE, status_bytes(Status(bundle)))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written: {error.strerror or error}") from None
    try:
        try:
            lock_file(descriptor)
        except OSError:
            raise StoreError(
                f"{folder}: another process is writing to this state; wait for it"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> bool:
    """Remove everything in a folder; whether there was anything."""
    found = list(folder.iterdir()) if folder.is_dir() else []
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if found:
        sync_folder(folder)
    return bool(found)
