"""The signed metadata of a repository's folder: read, changed, signed, written.

    REPOSITORY/metadata/N.root.json  N.targets.json  N.rollout.json  N.snapshot.json
                        timestamp.json
    REPOSITORY/targets/CHANNEL/DIGEST.VERSION.safetensors

Names carry versions ("consistent snapshots"), so that nothing a device may be reading is ever
overwritten but ``timestamp.json``, which is written last: until then, devices see what was there
before. After a crash at any instant the folder is the old repository with files that nothing
names, or the new one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from securesystemslib.signer import Key
from tuf.api.exceptions import RepositoryError, StorageError, UnsignedMetadataError
from tuf.api.metadata import (
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    Targets,
    Timestamp,
)
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from fedlora.errors import PublishError
from fedlora.files import write_atomic
from fedlora.ota.keys import Keys
from fedlora.ota.releases import ROLLOUT_ROLE

__all__ = ["LIFETIMES", "ONLINE", "Clock", "Roles", "now"]

# A replayed timestamp is accepted until it expires: a day is the longest that devices can be kept
# from news by whoever is between them and the repository.
LIFETIMES = {
    "root": timedelta(days=365),
    "targets": timedelta(days=365),
    "rollout": timedelta(days=7),
    "snapshot": timedelta(days=7),
    "timestamp": timedelta(days=1),
}
ONLINE = ("rollout", "snapshot", "timestamp")
_FILE = re.compile(r"(\d{1,16})\.(\w+)\.json")
_S = TypeVar("_S", Root, Targets, Snapshot, Timestamp)
Clock = Callable[[], datetime]


def now() -> datetime:
    """Return the time, in whole seconds of UTC, as metadata has it."""
    return datetime.now(UTC).replace(microsecond=0)


@dataclass(frozen=True)
class Roles:
    """The metadata in a folder. Whoever writes holds the publisher's lock."""

    folder: Path  # …/metadata
    keys: Keys
    clock: Clock = now

    def root(self) -> Root:
        """Return the newest root."""
        return self._newest("root", Root)

    def targets(self) -> Targets:
        """Return the newest targets."""
        return self._newest("targets", Targets)

    def rollout(self) -> Targets:
        """Return the newest metadata of the role that offers releases."""
        return self._newest("rollout", Targets)

    def snapshot(self) -> Snapshot:
        """Return the newest snapshot."""
        return self._newest("snapshot", Snapshot)

    def timestamp(self) -> Timestamp:
        """Return the timestamp."""
        return self._newest("timestamp", Timestamp)

    def exists(self) -> bool:
        """Whether there is a repository."""
        return self.folder.is_dir() and self._path("root") is not None

    def public(self, role: str, root: Root | None = None) -> tuple[list[Key], int]:
        """Return the public keys of a role and how many must sign. root: instead of the newest."""
        if role == ROLLOUT_ROLE:
            delegations = self._delegations()
            named = delegations.roles or {}
            return [delegations.keys[k] for k in named[role].keyids], named[role].threshold
        root = root or self.root()
        about = root.roles[role]
        return [root.keys[keyid] for keyid in about.keyids], about.threshold

    def can_sign(self, *roles: str) -> bool:
        """Whether enough private keys of these roles are here."""
        return all(self.keys.has(role, *self.public(role)) for role in roles)

    def require_keys(self, *roles: str) -> None:
        """Raise `PublishError` unless `can_sign`: for before anything is written."""
        for role in roles:
            self.keys.signers(role, *self.public(role))

    def write(self, role: str, signed: Signed, *, also: list[Key] | None = None) -> None:
        """Give metadata a new version and expiry, sign it, and write it, for any role but root.

        also: public keys of the role that is about to get them; it signs with them too. Raises
        `PublishError` when fewer keys are here than must sign.
        """
        public, threshold = self.public(role)
        signers = self.keys.signers(role, public, threshold)
        if also:
            signers += self.keys.signers(role, also, len(also))
        if self._path(role) is not None:
            signed.version += 1
        self.write_signed(role, signed, [signer.public_key for signer in signers])

    def write_signed(self, role: str, signed: Signed, public: list[Key]) -> None:
        """Sign with exactly these keys, and write."""
        signed.expires = self.clock() + LIFETIMES[role]
        metadata: Metadata[Any] = Metadata(signed)
        for signer in self.keys.signers(role, public, len(public)):
            metadata.sign(signer, append=True)
        name = "timestamp.json" if role == "timestamp" else f"{signed.version}.{role}.json"
        write_atomic(self.folder / name, _bytes(metadata), mode=0o644)

    def write_root(self, new: Root, old: Root | None) -> None:
        """Sign a root with its own keys and those of the one before, and write it.

        Raises `PublishError` unless both accept it.
        """
        new.expires = self.clock() + LIFETIMES["root"]
        metadata = Metadata(new)
        for root in (old, new):
            if root is None:
                continue
            for signer in self.keys.signers("root", *self.public("root", root)):
                metadata.sign(signer, append=True)
        try:
            for root in (old, new):
                if root is not None:
                    root.verify_delegate("root", metadata.signed_bytes, metadata.signatures)
        except UnsignedMetadataError as error:
            raise PublishError(f"{self.folder}: the new root is not signed: {error}") from None
        write_atomic(self.folder / f"{new.version}.root.json", _bytes(metadata), mode=0o644)

    def write_snapshot(self, *, also: list[Key] | None = None) -> None:
        """Write a snapshot of the newest targets and rollout."""
        snapshot = self.snapshot() if self._path("snapshot") else Snapshot(1)
        for role in ("targets", "rollout"):
            snapshot.meta[f"{role}.json"] = self._meta(role)
        self.write("snapshot", snapshot, also=also)

    def write_timestamp(self, *, also: list[Key] | None = None) -> None:
        """Write a timestamp of the newest snapshot; from then on devices see it."""
        timestamp = self.timestamp() if self._path("timestamp") else Timestamp(1)
        timestamp.snapshot_meta = self._meta("snapshot")
        self.write("timestamp", timestamp, also=also)

    def is_accepted(self, role: str) -> bool:
        """Whether a role's newest metadata is signed by its newest keys: not so after a crash in
        the middle of their replacement."""
        path = self._path(role)
        if path is None:
            return False
        metadata = self._read(path)
        delegator = self.targets() if role == ROLLOUT_ROLE else self.root()
        try:
            delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except UnsignedMetadataError:
            return False
        return True

    def is_published(self) -> bool:
        """Whether devices see the newest targets and rollout."""
        if self._path("timestamp") is None:
            return False
        seen, newest = self.timestamp().snapshot_meta.version, self.snapshot()
        return seen == newest.version and all(
            newest.meta[f"{role}.json"].version == self._newest(role, Targets).version
            for role in ("targets", "rollout")
        )

    def _meta(self, role: str) -> MetaFile:
        path = self._path(role)
        assert path is not None
        data = path.read_bytes()
        version = int(path.name.partition(".")[0])
        return MetaFile.from_data(version, data, ["sha256"])

    def _delegations(self) -> Delegations:
        delegations = self.targets().delegations
        if delegations is None or ROLLOUT_ROLE not in (delegations.roles or {}):
            raise PublishError(f"{self.folder}: the targets role delegates no {ROLLOUT_ROLE!r}")
        return delegations

    def _newest(self, role: str, kind: type[_S]) -> _S:
        path = self._path(role)
        if path is None:
            raise PublishError(
                f"{self.folder}: expected metadata of the role {role}, found none; make a "
                "repository with fedlora ota init"
            )
        signed = self._read(path).signed
        if not isinstance(signed, kind):
            raise PublishError(f"{path}: expected the role {role}, found {signed.type}")
        return signed

    def _read(self, path: Path) -> Metadata[Any]:
        try:
            return Metadata.from_file(str(path))
        except (DeserializationError, RepositoryError, StorageError, OSError) as error:
            raise PublishError(f"{path}: cannot be read: {error}") from None

    def _path(self, role: str) -> Path | None:
        """Return the newest file of a role."""
        if role == "timestamp":
            path = self.folder / "timestamp.json"
            return path if path.exists() else None
        found = [(int(m[1]), p) for p in self.folder.iterdir() if (m := _FILE.fullmatch(p.name))
                 if m[2] == role]  # fmt: skip
        return max(found)[1] if found else None


def _bytes(metadata: Metadata[Any]) -> bytes:
    return metadata.to_bytes(JSONSerializer(compact=True))
