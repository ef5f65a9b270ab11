"""`DeviceUpdater`: from a repository to a verified, staged release; see `fedlora.ota`.

    STATE/ota/
      device-id        random, made once, 0600, never sent: decides the device's place in rollouts
      latest-time      of the last successful poll: a clock that was set back is noticed
      metadata/        python-tuf's trusted copies
      partial/         what has come of the release that is being fetched
      .lock            one updater at a time

A poll takes python-tuf's requests: the next root, which is not there, and the timestamp; only where
that has changed, snapshot, targets and rollout. Nothing that is served changes before `commit`.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tuf.api.metadata import TargetFile

from fedlora import __version__
from fedlora.device.fit import check_adapter
from fedlora.device.manifest import read_manifest
from fedlora.errors import (
    AdapterError,
    ExpiryError,
    FormatError,
    MetadataError,
    ReleaseError,
    StoreError,
)
from fedlora.files import lock_file, write_atomic
from fedlora.formats.packed import decode_packed
from fedlora.formats.tensors import parse_tensors
from fedlora.ota.client import Client
from fedlora.ota.download import clear
from fedlora.ota.fetcher import Fetcher, check_url
from fedlora.ota.limits import Limits
from fedlora.ota.releases import (
    Device,
    Release,
    Rollout,
    check_channel,
    choose,
    release_path,
    rollout_path,
)
from fedlora.store import Store

__all__ = ["DeviceUpdater", "Poll"]

# Seconds that a clock may go back between two polls: daylight, a new battery, a time server's word.
CLOCK_TOLERANCE = 86_400.0
_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Poll:
    """What one `fetch` did, for a device's own log."""

    release: Release | None
    passed_over: dict[int, str]  # newer releases that were not chosen, and why
    requests: int
    received: int  # bytes of bodies
    downloaded: bool  # rather than found in a slot
    active_halted: bool = False  # what is served here is not offered to anyone any more


class DeviceUpdater:
    """Updates the device in the state folder `state` from the repository at `url`.

    url: of the folder that holds ``metadata/`` and ``targets/``. bootstrap: the bytes of the root
    that this device was shipped with, ``metadata/1.root.json`` or a later one. clock: seconds since
    1970, for tests; expiry is judged by the system's clock.

    Every error is a `FedloraError`: `UpdateError` and its kinds for what the network brings,
    `StoreError` and `RunError` for the device's own disk. After any of them, what was served is
    served on, and the next `fetch` starts from what was left.
    """

    def __init__(
        self,
        url: str,
        state: Store | str | os.PathLike[str],
        *,
        bootstrap: bytes,
        channel: str = "stable",
        limits: Limits | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        check_url(url)
        self.url = url.rstrip("/")
        self.store = state if isinstance(state, Store) else Store.open(state)
        self.channel = check_channel(channel)
        self.limits = limits or Limits()
        self.last_poll: Poll | None = None
        self._active_halted = False
        self._bootstrap = bootstrap
        self._clock = clock
        self._folder = self.store.path / "ota"

    def fetch(self) -> Release | None:
        """Return the release to try next, verified and staged, or None where there is none.

        The same release is returned, without a download, until it is committed or reverted. One
        that is no longer offered, since it was halted, is dropped again.
        """
        with self._alone():
            self._require_plausible_clock()
            fetcher = Fetcher(self.limits)
            try:
                client = self._client(fetcher)
                client.refresh()
                self._note_time()
                release, reasons = self._chosen(client)
                downloaded = False
                if release is None:
                    self.store.drop_pending()
                else:
                    downloaded = self._stage(client, release)
                clear(self._folder / "partial")
            finally:
                fetcher.close()
            self.last_poll = Poll(
                release,
                reasons,
                fetcher.requests,
                fetcher.received,
                downloaded,
                self._active_halted,
            )
            return release

    def commit(self, release: Release) -> None:
        """Serve a fetched release; the one before is kept for `revert`.

        Raises `ReleaseError` when it is not the one that is staged.
        """
        self.store.commit_pending(release.version)

    def revert(self, release: Release) -> None:
        """Drop a fetched release, or go back from a committed one; it is not fetched again.

        Nothing happens to one that is rejected already. Raises `ReleaseError` when it is neither
        staged nor served.
        """
        with self.store.lock():
            status = self.store.status()
            if status.pending is not None and status.pending.release == release.version:
                self.store.reject_pending()
            elif status.installed is not None and status.installed.release == release.version:
                self.store.revert()
            elif release.version not in status.rejected:  # else it is done: trials ran out
                raise ReleaseError(
                    f"{self.store.path}: release {release.version} is neither staged nor served; "
                    "there is nothing to revert"
                )

    def device(self) -> Device:
        """Return what decides about releases here; makes the device's id if there is none."""
        status = self.store.status()
        manifest = read_manifest(self.store.bundle)  # raises for a state without a bundle
        return Device(
            id=self._device_id(),
            base=status.bundle.base,
            bundle=status.bundle.digest or "",
            bundle_version=manifest.made_by.get("fedlora"),
            fedlora=__version__,
            active=None if status.installed is None else status.installed.release,
            rejected=frozenset(status.rejected),
            max_bytes=self.limits.max_bytes,
        )

    def _client(self, fetcher: Fetcher) -> Client:
        return Client(
            self._folder / "metadata",
            f"{self.url}/metadata",
            bootstrap=self._bootstrap,
            fetcher=fetcher,
            targets_url=f"{self.url}/targets",
        )

    def _chosen(self, client: Client) -> tuple[Release | None, dict[int, str]]:
        found = client.target(rollout_path(self.channel))
        self._active_halted = False
        if found is None:
            return None, {}
        rollout = Rollout.from_custom(_custom(found), self.channel)

        def find(version: int) -> Release | None:
            target = client.target(release_path(self.channel, version))
            return None if target is None else _release(target)

        device = self.device()
        active = None if device.active is None else rollout.stage(device.active)
        self._active_halted = active is not None and active.halted
        return choose(rollout, find, device)

    def _stage(self, client: Client, release: Release) -> bool:
        """Stage a release that is not staged yet; whether it had to be downloaded."""
        with contextlib.suppress(FormatError, ReleaseError):  # a slot's file is damaged: fetch it
            pending = self.store.status().pending
            staged = None if pending is None else (pending.release, pending.digest)
            if staged == (release.version, release.digest):
                self.store.pending_adapter()  # its file is whole
                return False
            if self.store.stage_again(
                release.digest, channel=release.channel, release=release.version
            ):
                return False
        target = client.target(release_path(release.channel, release.version))
        assert target is not None
        partial = self._folder / "partial"
        data = client.download(target, partial, self.limits)
        try:
            adapter = decode_packed(parse_tensors(data, "the file"), "the file").adapter
            if adapter.base != release.base:
                raise FormatError("its adapter is of another base than the release says")
            check_adapter(adapter, read_manifest(self.store.bundle))
        except (FormatError, AdapterError) as error:
            self.store.reject(release.version)
            clear(partial)
            raise ReleaseError(
                f"{self.url}: release {release.version} does not fit this device: {error}; it is "
                "not fetched again"
            ) from None
        self.store.stage(
            data,
            digest=release.digest,
            channel=release.channel,
            release=release.version,
            provenance=release.provenance,
        )
        return True

    def _device_id(self) -> str:
        path = self._folder / "device-id"
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if _ID.fullmatch(text := path.read_text("ascii").strip()):
                return text
        text = secrets.token_hex(32)
        write_atomic(path, text.encode(), mode=0o600)
        return text

    def _require_plausible_clock(self) -> None:
        """Metadata that has expired would be accepted again on a clock that was set back."""
        latest = self._latest_time()
        back = latest - self._clock()
        if back > CLOCK_TOLERANCE:
            raise ExpiryError(
                f"{self.store.path}: the clock is {back / 86_400:.1f} days behind the last update; "
                "set it, and update again"
            )

    def _latest_time(self) -> float:
        try:
            return float(int((self._folder / "latest-time").read_bytes()[:20]))
        except (OSError, ValueError):
            return 0.0

    def _note_time(self) -> None:
        """Keep the time of a poll that found everything in date, once an hour at most."""
        found = self._clock()
        if found > self._latest_time() + 3600:
            write_atomic(self._folder / "latest-time", str(int(found)).encode(), mode=0o600)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the updater's own lock: a download is long, and the store's is for commits."""
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreError(
                f"{self._folder}: cannot be written: {error.strerror or error}"
            ) from None
        try:
            try:
                lock_file(descriptor)
            except OSError:
                raise StoreError(
                    f"{self._folder}: another process is updating this device; wait for it"
                ) from None
            for path in self._folder.glob(".*.*"):  # what killed writes left
                with contextlib.suppress(OSError):
                    path.unlink()
            yield
        finally:
            os.close(descriptor)


def _release(target: TargetFile) -> Release:
    return Release.from_custom(
        _custom(target),
        path=target.path,
        digest=target.hashes.get("sha256"),
        num_bytes=target.length,
    )


def _custom(target: TargetFile) -> object:
    """Return what is signed beside a target's digest. Raises `MetadataError`."""
    if len(target.hashes) != 1:
        raise MetadataError(f"target {target.path!r}: expected one digest, a SHA-256")
    return target.custom
