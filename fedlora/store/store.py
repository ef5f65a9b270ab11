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
from fedlora.errors import BaseMismatchError, FormatError, ReleaseError, StoreError
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
    MAX_REJECTED,
    BundleEntry,
    GlobalEntry,
    PersonalEntry,
    Status,
    read_status,
    status_bytes,
)

__all__ = ["MAX_TRIES", "Store"]

MAX_TRIES = 3  # trials of a staged release that are begun and not committed
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
            # Whoever installs by hand has the file; nothing is kept to go back to.
            self._commit(replace(_with_active(before, entry), previous=None))

    def stage(
        self,
        data: bytes,
        *,
        digest: str,
        channel: str,
        release: int,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Put the bytes of a release into the slot `pending`, in the place of what is there.

        data: a packed file with this SHA-256, whose metadata was verified by the caller. The file
        is kept as it is. Nothing that is served changes. Raises `DigestMismatchError`,
        `FormatError`, and `BaseMismatchError` unless it names this state's base.
        """
        check_digest(self.path / f"release {release}", data, digest, "fetch it again")
        where = f"release {release}"
        adapter = decode_packed(parse_tensors(data, where), where, verified=False).adapter
        with self.lock():
            before = self.status()
            self._require_base(adapter, before, exactly=True)
            self._write(digest, data)
            entry = GlobalEntry(
                digest, len(data), adapter.fingerprint(), dict(provenance or {}), channel, release
            )
            self._commit(replace(before, pending=entry, tries=0))

    def stage_again(self, digest: str, *, channel: str, release: int) -> bool:
        """Stage an adapter that is in a slot already, as another release; whether it was there."""
        with self.lock():
            before = self.status()
            for entry in (before.pending, before.installed, before.previous):
                if entry is not None and entry.digest == digest:
                    check_digest(self._file(digest), self._read(entry), digest, "fetch it again")
                    staged = replace(entry, channel=channel, release=release)
                    self._commit(replace(before, pending=staged, tries=0))
                    return True
            return False

    def pending_adapter(self) -> Adapter | None:
        """Return the staged adapter, None if there is none."""
        return self._load(lambda status: status.pending)

    def begin_trial(self) -> Adapter | None:
        """Count a trial of the staged adapter, and return it.

        The count is on the disk before the adapter is used, so that one that brings the process
        down is not tried for ever: after `MAX_TRIES` trials that did not end in `commit_pending`,
        the release is rejected, and this returns None.
        """
        with self.lock():
            before = self.status()
            if before.pending is None:
                return None
            if before.tries >= MAX_TRIES:
                self.reject_pending()
                return None
            self._commit(replace(before, tries=before.tries + 1))
            return self.pending_adapter()

    def commit_pending(self, release: int) -> None:
        """Make the staged release the one that is served; the one before is kept to go back to.

        Raises `ReleaseError` when another release is staged, or none, or when its file is damaged.
        """
        with self.lock():
            before = self.status()
            entry = before.pending
            if entry is None or entry.release != release:
                found = "none" if entry is None else str(entry.release)
                raise ReleaseError(
                    f"{self.path}: expected release {release} to be staged, found {found}; fetch "
                    "it again"
                )
            check_digest(self._file(entry.digest), self._read(entry), entry.digest, "fetch again")
            after = _with_active(before, entry)
            self._commit(replace(after, previous=before.installed, pending=None, tries=0))

    def reject_pending(self) -> bool:
        """Drop the staged release for good; whether there was one."""
        with self.lock():
            before = self.status()
            if before.pending is None:
                return False
            rejected = _rejected(before, before.pending.release)
            self._commit(replace(before, pending=None, tries=0, rejected=rejected))
            return True

    def reject(self, release: int) -> None:
        """Remember that a release is not for this device."""
        with self.lock():
            before = self.status()
            rejected = _rejected(before, release)
            if rejected != before.rejected:
                self._commit(replace(before, rejected=rejected))

    def drop_pending(self) -> bool:
        """Drop the staged release, which may be staged again; whether there was one."""
        with self.lock():
            before = self.status()
            if before.pending is not None:
                self._commit(replace(before, pending=None, tries=0))
            return before.pending is not None

    def revert(self) -> None:
        """Serve the adapter before the active one again, or the base; reject the active release.

        One step: after it there is nothing to go back to. A staged release stays. Raises
        `ReleaseError` when no global adapter is active, or the one before is damaged.
        """
        with self.lock():
            before = self.status()
            if before.installed is None:
                raise ReleaseError(f"{self.path}: expected a global adapter to revert, found none")
            if before.previous is not None:
                data = self._read(before.previous)
                check_digest(
                    self._file(before.previous.digest), data, before.previous.digest, "fetch again"
                )
            rejected = _rejected(before, before.installed.release)
            after = _with_active(before, before.previous)
            self._commit(replace(after, previous=None, rejected=rejected))

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
            # As when a file is installed by hand: nothing is kept to go back to.
            status = replace(_with_active(before, installed), previous=None)
            self._commit(replace(status, personal=entry))

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
        self._require_base(adapter, status)
        data = encode_packed(adapter, provenance=provenance)
        decode_packed(parse_tensors(data, "adapter"), "adapter")  # what cannot be read: refused
        digest = hashlib.sha256(data).hexdigest()
        self._write(digest, data)
        return digest, len(data)

    def _require_base(self, adapter: Adapter, status: Status, *, exactly: bool = False) -> None:
        """exactly: an adapter that names no base is refused too."""
        if adapter.base != status.bundle.base and (exactly or adapter.base is not None):
            found = "of no base" if adapter.base is None else f"of {adapter.base[:12]}…"
            raise BaseMismatchError(
                f"{self.path}: expected an adapter of the base {status.bundle.base[:12]}…, found "
                f"one {found}; it only means something on its own base"
            )

    def _write(self, digest: str, data: bytes) -> None:
        write_atomic(self._file(digest), data, mode=0o600)

    def _read(self, entry: GlobalEntry) -> bytes:
        """Return the bytes of a slot's file. Raises `ReleaseError`."""
        try:
            return read_bytes(self._file(entry.digest), MAX_FILE_BYTES)
        except (FormatError, OSError) as error:
            raise ReleaseError(
                f"{self._file(entry.digest)}: cannot be read ({error}): fetch it again"
            ) from None

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


def _with_active(status: Status, entry: GlobalEntry | None) -> Status:
    """Return a status with another active global adapter, and whether the personal one is stale."""
    personal = status.personal
    old = None if status.installed is None else status.installed.fingerprint
    new = None if entry is None else entry.fingerprint
    if personal is not None and old != new:
        personal = replace(personal, stale=personal.started_from != new)
    return replace(status, installed=entry, personal=personal)


def _rejected(status: Status, release: int | None) -> tuple[int, ...]:
    """Return the rejected versions, with another one among them."""
    found = set(status.rejected) | (set() if release is None else {release})
    return tuple(sorted(found)[-MAX_REJECTED:])


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
