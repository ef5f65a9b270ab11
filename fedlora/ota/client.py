"""`Client`: python-tuf's client with our fetcher and our errors; the only module that drives it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from tuf.api import exceptions as tuf
from tuf.api.metadata import TargetFile
from tuf.ngclient import Updater, UpdaterConfig

from fedlora.errors import (
    DownloadError,
    ExpiryError,
    FedloraError,
    MetadataError,
    SignatureError,
    SlowDownloadError,
    StoreError,
    UpdateError,
    VersionError,
)
from fedlora.files import sync_folder
from fedlora.ota.download import download
from fedlora.ota.fetcher import Fetcher
from fedlora.ota.limits import Limits

__all__ = ["Client", "typed"]

# The most specific first; `tuf` is the authority on what is refused, this on what it is called.
_KINDS: tuple[tuple[type[Exception], type[UpdateError], str], ...] = (
    (tuf.ExpiredMetadataError, ExpiryError, "the repository must be refreshed, or this clock set"),
    (tuf.UnsignedMetadataError, SignatureError, "it was not signed by whom this device trusts"),
    (tuf.BadVersionNumberError, VersionError, "it is older than what was seen, or mixed up"),
    (tuf.RepositoryError, MetadataError, "it was damaged, or made up"),
    (tuf.SlowRetrievalError, SlowDownloadError, "what has come is kept; try again later"),
    (tuf.DownloadError, DownloadError, "what has come is kept; try again later"),
)
MAX_ROTATIONS = 256  # of the root, in one refresh
STRONG = {"sha256", "sha512"}  # one of them is there, whatever else a target has; releases: SHA-256
_HEX = re.compile(r"[0-9a-f]{1,128}")


class Client:
    """A trusted copy of a repository's metadata in `folder`, at one instant.

    bootstrap: the root that is trusted to begin with; None: the one in the folder. A client is
    made for each poll: its state of the repository does not change.
    """

    def __init__(
        self,
        folder: Path,
        url: str,
        *,
        bootstrap: bytes | None,
        fetcher: Fetcher,
        targets_url: str | None = None,
    ) -> None:
        self.folder, self.url, self.fetcher = folder, url, fetcher
        self._targets_url = targets_url
        config = UpdaterConfig(
            max_root_rotations=MAX_ROTATIONS, app_user_agent=None, max_delegations=32
        )
        with typed(url, folder):
            if bootstrap is not None:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._remove_leftovers()
            self._updater = Updater(
                str(folder), url, fetcher=fetcher, config=config, bootstrap=bootstrap
            )

    def refresh(self) -> None:
        """Bring the metadata up to date, and put it on the disk. Raises `UpdateError`."""
        timestamp = self.folder / "timestamp.json"
        with typed(self.url, self.folder):
            before = timestamp.read_bytes() if timestamp.exists() else None
            self._updater.refresh()
            if timestamp.read_bytes() != before:
                self._sync()

    def target(self, path: str) -> TargetFile | None:
        """Return what is signed of a target, None if nothing. Raises `UpdateError`."""
        with typed(self.url, self.folder):
            return self._updater.get_targetinfo(path)

    def is_at(self, target: TargetFile, path: Path) -> bool:
        """Whether a file is this target already."""
        return self._updater.find_cached_target(target, str(path)) is not None

    def download(self, target: TargetFile, parts: Path, limits: Limits) -> bytes:
        """Return a target's bytes, compared with what is signed; `parts` keeps what has come.

        Raises `UpdateError`, and `StoreError` where a file cannot be written.
        """
        # Digests become names of files, of the repository and of this device.
        digests = target.hashes.values()
        if not target.hashes.keys() & STRONG or not all(_HEX.fullmatch(text) for text in digests):
            raise MetadataError(
                f"{self.url}: expected a SHA-256 or SHA-512 of {target.path!r}, found none, or not "
                "in hex"
            )
        folder, slash, name = target.path.rpartition("/")
        # With consistent snapshots a target's file has its digest in its name.
        path = f"{folder}{slash}{next(iter(digests))}.{name}"
        url = f"{(self._targets_url or '').rstrip('/')}/{path}"
        with typed(url, parts):
            return download(self.fetcher, url, target, parts, limits)

    def _remove_leftovers(self) -> None:
        """Remove temporary files that a killed refresh left; all others end in .json."""
        for path in self.folder.iterdir():
            if not path.name.endswith(".json") and path.is_file():
                path.unlink()

    def _sync(self) -> None:
        for folder in (self.folder, self.folder / "root_history"):
            for path in folder.glob("*.json"):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            sync_folder(folder)

    @staticmethod
    def file_name(target: str) -> str:
        """Return a target path as the name of one file."""
        return quote(target, "")


@contextlib.contextmanager
def typed(url: str, folder: Path) -> Iterator[None]:
    """Turn python-tuf's errors, and those of hostile metadata, into our own."""
    try:
        yield
    except FedloraError:
        raise
    except OSError as error:
        raise StoreError(f"{folder}: cannot be used: {error.strerror or error}") from None
    except Exception as error:
        for kind, ours, todo in _KINDS:
            if isinstance(error, kind):
                text = _line(error)
                where = "" if url in text else f"{url}: "
                raise ours(f"{where}{text}; {todo}") from None
        # Whatever else a parser of JSON, keys and dates may say to what strangers send.
        raise MetadataError(f"{url}: not metadata of TUF: {_line(error)}") from None


def _line(error: BaseException) -> str:
    """Return an error's text, or that of its cause, in one line."""
    found: BaseException | None = error
    while found is not None:
        text = " ".join(str(found).split())
        if text:
            return text if len(text) <= 240 else f"{text[:239]}…"
        found = found.__cause__
    return type(error).__name__
