"""`Publisher`: makes and changes the TUF repository from which devices update; see `fedlora.ota`.

Every change follows one order: the packed file, the targets that name it, the rollout that offers
it, the snapshot of both, and the timestamp last (`fedlora.ota.roles`). The first two need the
offline targets key, the others the online keys alone. Where a machine has only some of the keys, it
does its part, and `refresh` on the machine with the online keys makes it visible.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from securesystemslib.signer import Key
from tuf.api.metadata import DelegatedRole, Delegations, Root, TargetFile, Targets

from fedlora.errors import FedloraError, FormatError, PublishError
from fedlora.files import lock_file, sync_folder, write_atomic
from fedlora.formats.packed import decode_packed
from fedlora.formats.tensors import MAX_FILE_BYTES, parse_tensors, read_bytes
from fedlora.ota.keys import FOLDERS, Keys
from fedlora.ota.releases import (
    ROLLOUT_ROLE,
    Release,
    Rollout,
    Stage,
    check_channel,
    release_path,
    rollout_path,
)
from fedlora.ota.roles import LIFETIMES, ONLINE, Clock, Roles, now

__all__ = ["Publisher", "Thresholds"]

LISTED = 64  # releases that the targets name, the newest; devices read all of it with each news
KEPT = 16  # versions of each online role's metadata; devices that are mid-poll need the last few
_RELEASE = re.compile(r"([a-z0-9-]+)/(\d+)\.safetensors")
_METADATA = re.compile(r"(\d+)\.(snapshot|rollout)\.json")
Thresholds = Mapping[str, tuple[int, int]]  # of a role: how many keys, and how many must sign
DEFAULT_KEYS: Thresholds = {
    "root": (3, 2), "targets": (1, 1), "rollout": (1, 1), "snapshot": (1, 1), "timestamp": (1, 1),
}  # fmt: skip


class Publisher:
    """A repository in the folder `path`; `keys` may hold some of its private keys only.

    Raises `PublishError` when a key is missing, `RunError` when a file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], keys: Keys, *, clock: Clock = now) -> None:
        self.path = Path(path)
        if keys.folder.resolve().is_relative_to(self.path.resolve()):
            raise PublishError(
                f"{keys.folder}: expected the private keys outside of the repository {self.path}, "
                "which is published; name another folder"
            )
        self.keys = keys
        self._clock = clock
        self.roles = Roles(self.path / "metadata", keys, clock)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        keys: Keys,
        *,
        thresholds: Thresholds | None = None,
        clock: Clock = now,
    ) -> Publisher:
        """Make a repository and its keys; by default 2 of 3 root keys, and one of each other.

        ``PATH/metadata/1.root.json`` is what devices are shipped with.
        """
        self = cls(path, keys, clock=clock)
        if self.roles.exists():
            raise PublishError(f"{self.path}: there is a repository already; name another folder")
        counts = {**DEFAULT_KEYS, **(thresholds or {})}
        for role, (count, threshold) in counts.items():
            if role not in FOLDERS or not 1 <= threshold <= count:
                raise PublishError(
                    f"role {role!r}: expected 1 <= threshold <= keys, found {threshold} of {count}"
                )
        for folder in ("metadata", "targets"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        with self._lock():
            public = {r: [keys.generate(r) for _ in range(n)] for r, (n, _) in counts.items()}
            root = Root(version=1, consistent_snapshot=True)
            for role in root.roles:
                root.roles[role].threshold = counts[role][1]
                for key in public[role]:
                    root.add_key(key, role)
            online = public[ROLLOUT_ROLE]
            delegated = DelegatedRole(
                ROLLOUT_ROLE, [key.keyid for key in online], counts[ROLLOUT_ROLE][1], True,
                [f"{ROLLOUT_ROLE}/*"],
            )  # fmt: skip
            targets = Targets(
                1, delegations=Delegations({k.keyid: k for k in online}, {ROLLOUT_ROLE: delegated})
            )
            # Until there is a root, `create` may be called again; after that, `refresh` completes
            # what a crash has left out.
            self.roles.write_signed("targets", targets, list(public["targets"]))
            self.roles.write_signed("rollout", Targets(1), list(online))
            self.roles.write_root(root, None)
            self.roles.write_snapshot()
            self.roles.write_timestamp()
        return self

    def publish(
        self,
        file: str | os.PathLike[str],
        *,
        channel: str = "stable",
        rollout: float = 100.0,
        bundle: str | None = None,
        minimum_bundle: str | None = None,
        minimum_fedlora: str | None = None,
        notes: str = "",
        provenance: Mapping[str, Any] | None = None,
        limit: float = 100.0,
    ) -> Release:
        """Publish a packed file as the next version, offered to `rollout` percent of the devices.

        provenance: beside what the file says of itself. limit: percent that the rollout may never
        pass, since the targets key signs it. Without the online keys the release is signed, but
        not offered until `set_rollout` is called where they are.
        """
        path = Path(file)
        data = _read(path)
        packed = decode_packed(parse_tensors(data, str(path)), str(path))
        if packed.adapter.base is None:
            raise PublishError(
                f"{path}: expected an adapter that names its base, found none; a device could not "
                "tell whether it fits"
            )
        with self._lock():
            self.roles.require_keys("targets")
            release = Release(
                channel=check_channel(channel),
                version=self._next_version(),
                digest=hashlib.sha256(data).hexdigest(),
                num_bytes=len(data),
                base=packed.adapter.base,
                bundle=bundle,
                minimum_bundle=minimum_bundle,
                minimum_fedlora=minimum_fedlora,
                notes=notes,
                provenance={**packed.provenance, **(provenance or {})},
                limit=limit,
            )
            return self._release(release, data, rollout)

    def republish(
        self, version: int, *, channel: str | None = None, rollout: float = 100.0, notes: str = ""
    ) -> Release:
        """Publish a release's file again as the newest version: how all devices go back to it.

        channel: another one, to promote a release from one channel to the next.
        """
        with self._lock():
            old = self._find(version)
            self.roles.require_keys("targets")
            data = _read(self._file(old))
            if hashlib.sha256(data).hexdigest() != old.digest:
                raise PublishError(
                    f"{self._file(old)}: expected the file that was signed as release {version}, "
                    "found another; get it from a copy of the repository"
                )
            release = replace(
                old,
                channel=check_channel(channel or old.channel),
                version=self._next_version(),
                notes=notes or f"release {version} again",
                withdrawn=False,
            )
            return self._release(release, data, rollout)

    def set_rollout(self, version: int, percent: float) -> Stage:
        """Offer a release to this share of the devices; needs the online keys only."""
        return self._stage(version, lambda _: Stage(version, percent))

    def halt(self, version: int, *, withdraw: bool = False) -> Stage:
        """Offer a release to nobody any more; devices that have it keep it.

        withdraw: sign that with the targets key too, so that whoever holds the online keys cannot
        offer it again. To bring back devices that have it, `republish` the one before.
        """
        if withdraw:
            with self._lock():
                release = self._find(version)
                self.roles.require_keys("targets")
                targets = self.roles.targets()
                self._add(targets, replace(release, withdrawn=True))
                self.roles.write("targets", targets)
                self._make_visible(required=False)
            if not self.roles.can_sign(*ONLINE):
                return Stage(version, 0.0, True)
        return self._stage(version, lambda old: replace(old, halted=True))

    def refresh(self) -> None:
        """Renew the timestamp, and what else of the online roles is half way to its expiry.

        Makes visible what was signed elsewhere. To be called more often than once a day.
        """
        with self._lock():
            self.roles.require_keys(*ONLINE)
            self._remove_leftovers()
            if not self.roles.is_accepted("targets"):  # their keys were being replaced
                self.roles.write("targets", self.roles.targets())
            if not self.roles.is_accepted("rollout") or self._is_half_over("rollout"):
                self.roles.write("rollout", self.roles.rollout())
            self._make_visible(required=True)
            self._remove_old_metadata()

    def renew(self, role: str) -> None:
        """Sign root or targets again with a later expiry; needs that role's offline keys."""
        with self._lock():
            if role == "root":
                self._replace_root(lambda root: None)
            elif role == "targets":
                self.roles.write("targets", self.roles.targets())
                self._make_visible(required=False)
            else:
                raise PublishError(f"expected the role root or targets, found {role!r}")

    def rotate(self, role: str, *, count: int = 1, threshold: int | None = None) -> list[str]:
        """Replace all keys of a role by `count` new ones; return the new keys' ids.

        A new root is signed with the old root keys and the new ones, so devices follow. Whatever
        else has to be signed with the new keys is first signed with both, old and new, where the
        old ones are here: then no device is ever refused in between. Needs the root keys; for the
        role "rollout" the targets key.
        """
        if role not in FOLDERS:
            raise PublishError(f"expected a role of {', '.join(FOLDERS)}, found {role!r}")
        old, old_threshold = self.roles.public(role)
        needed = old_threshold if threshold is None else threshold
        if not 1 <= needed <= count:
            raise PublishError(
                f"role {role!r}: expected 1 <= threshold <= keys, found {needed} of {count}"
            )
        with self._lock():
            self.roles.require_keys("targets" if role == ROLLOUT_ROLE else "root")
            if role != "root":
                self.roles.require_keys(*(r for r in ONLINE if r != role))
            new: list[Key] = [self.keys.generate(role) for _ in range(count)]
            if role == ROLLOUT_ROLE:
                self._rotate_rollout(old, new, needed)
            else:
                self._rotate_top_level(role, old, new, needed)
        return [key.keyid for key in new]

    def status(self) -> dict[str, Any]:
        """Return versions, expiries and keys of the roles, and all channels' releases."""
        roles = {}
        for role in FOLDERS:
            signed = self.roles.root() if role == "root" else getattr(self.roles, role)()
            public, threshold = self.roles.public(role)
            roles[role] = {
                "version": signed.version,
                "expires": signed.expires.isoformat(),
                "hours_left": round((signed.expires - self._clock()).total_seconds() / 3600, 1),
                "keys": len(public),
                "threshold": threshold,
                "can_sign": self.roles.can_sign(role),
            }
        channels: dict[str, list[dict[str, Any]]] = {}
        for release in self.releases():
            stage = self.channel(release.channel).stage(release.version)
            offered = None if stage is None else {"percent": stage.percent, "halted": stage.halted}
            channels.setdefault(release.channel, []).append({**asdict(release), "rollout": offered})
        return {"published": self.roles.is_published(), "roles": roles, "channels": channels}

    def releases(self) -> list[Release]:
        """Return all releases, oldest first."""
        targets = self.roles.targets().targets.items()
        found = [_release_of(target) for path, target in targets if _RELEASE.fullmatch(path)]
        return sorted(found, key=lambda release: release.version)

    def channel(self, name: str) -> Rollout:
        """Return how far a channel's releases are rolled out."""
        target = self.roles.rollout().targets.get(rollout_path(name))
        return Rollout(name) if target is None else Rollout.from_custom(target.custom, name)

    def _release(self, release: Release, data: bytes, percent: float) -> Release:
        stage = Stage(release.version, percent)
        online = self.roles.can_sign(*ONLINE)
        self._remove_leftovers()
        write_atomic(self._file(release), data, mode=0o644)
        targets = self.roles.targets()
        self._add(targets, release)
        self.roles.write("targets", targets)
        if online:
            self._write_stage(release.channel, stage)
        return release

    def _stage(self, version: int, change: Any) -> Stage:
        with self._lock():
            self.roles.require_keys(*ONLINE)
            release = self._find(version)
            old = self.channel(release.channel).stage(version) or Stage(version, 0.0)
            stage: Stage = change(old)
            if stage.percent > release.limit:
                raise PublishError(
                    f"release {version}: expected at most {release.limit:g} percent, which the "
                    f"targets key signed, found {stage.percent:g}"
                )
            self._write_stage(release.channel, stage)
            return stage

    def _write_stage(self, channel: str, stage: Stage) -> None:
        rollout = self.channel(channel).with_stage(stage)
        signed = self.roles.rollout()
        path, custom = rollout_path(channel), rollout.custom()
        # No file: all is in `custom`. Length and digest are those of the empty file.
        empty = hashlib.sha256(b"").hexdigest()
        signed.targets[path] = TargetFile(0, {"sha256": empty}, path, {"custom": custom})
        self.roles.write("rollout", signed)
        self._make_visible(required=True)

    def _make_visible(self, *, required: bool) -> None:
        """Write snapshot and timestamp. required: raise where their keys are not here."""
        if not required and not self.roles.can_sign("snapshot", "timestamp"):
            return
        published = self.roles.is_published() and self.roles.is_accepted("snapshot")
        if not published or self._is_half_over("snapshot"):
            self.roles.write_snapshot()
        self.roles.write_timestamp()

    def _is_half_over(self, role: str) -> bool:
        expires = getattr(self.roles, role)().expires
        return bool(expires - self._clock() < LIFETIMES[role] / 2)

    def _rotate_top_level(self, role: str, old: list[Key], new: list[Key], threshold: int) -> None:
        def change(root: Root) -> None:
            for key in old:
                root.revoke_key(key.keyid, role)
            for key in new:
                root.add_key(key, role)
            root.roles[role].threshold = threshold

        # Signed with both first; then with the new root, whose devices ask for the new keys only.
        planned = role != "root" and self.roles.can_sign(role)
        if planned:
            self._sign_from(role, also=new)
        self._replace_root(change)
        if not planned and role != "root":
            self._sign_from(role, also=None)

    def _sign_from(self, role: str, *, also: list[Key] | None) -> None:
        """Sign a role again and all that then has to change."""
        if role == "targets":
            self.roles.write("targets", self.roles.targets(), also=also)
        if role in ("targets", "snapshot"):
            self.roles.write_snapshot(also=also if role == "snapshot" else None)
        self.roles.write_timestamp(also=also if role == "timestamp" else None)

    def _rotate_rollout(self, old: list[Key], new: list[Key], threshold: int) -> None:
        """The delegation is in the targets, so one timestamp changes both at once."""
        planned = self.roles.can_sign(ROLLOUT_ROLE)
        if planned:  # what a crash leaves is then accepted with either targets
            self.roles.write("rollout", self.roles.rollout(), also=new)
        targets = self.roles.targets()
        delegations = targets.delegations
        assert delegations is not None
        assert delegations.roles is not None
        role = delegations.roles[ROLLOUT_ROLE]
        for key in old:
            targets.revoke_key(key.keyid, ROLLOUT_ROLE)
        for key in new:
            targets.add_key(key, ROLLOUT_ROLE)
        role.threshold = threshold
        self.roles.write("targets", targets)
        if not planned:
            self.roles.write("rollout", self.roles.rollout())
        self._make_visible(required=True)

    def _replace_root(self, change: Any) -> None:
        old, new = self.roles.root(), self.roles.root()
        change(new)
        new.version += 1
        self.roles.write_root(new, old)

    def _add(self, targets: Targets, release: Release) -> None:
        path = release_path(release.channel, release.version)
        targets.targets[path] = TargetFile(
            release.num_bytes, {"sha256": release.digest}, path, {"custom": release.custom()}
        )
        named = sorted((int(m[2]), m[0]) for p in targets.targets if (m := _RELEASE.fullmatch(p)))
        for _, path in named[:-LISTED]:
            del targets.targets[path]

    def _find(self, version: int) -> Release:
        found = {release.version: release for release in self.releases()}
        if version not in found:
            known = ", ".join(map(str, found)) or "none"
            raise PublishError(f"expected a release of this repository, found {version}; known: "
                               f"{known}")  # fmt: skip
        return found[version]

    def _next_version(self) -> int:
        return max((release.version for release in self.releases()), default=0) + 1

    def _file(self, release: Release) -> Path:
        name = f"{release.digest}.{release.version}.safetensors"
        return self.path / "targets" / release.channel / name

    def _remove_leftovers(self) -> None:
        """Remove what killed writes left: temporary files, which begin with a full stop."""
        for folder in (self.path / "metadata", *(self.path / "targets").iterdir()):
            for path in folder.glob(".*") if folder.is_dir() else ():
                path.unlink()

    def _remove_old_metadata(self) -> None:
        folder = self.path / "metadata"
        versions: dict[str, list[tuple[int, Path]]] = {}
        for path in folder.iterdir():
            if match := _METADATA.fullmatch(path.name):
                versions.setdefault(match[2], []).append((int(match[1]), path))
        for found in versions.values():
            for _, path in sorted(found)[:-KEPT]:
                path.unlink()
        sync_folder(folder)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise PublishError(
                f"{self.path}: cannot be written: {error.strerror or error}; make a repository "
                "with fedlora ota init"
            ) from None
        try:
            try:
                lock_file(descriptor)
            except OSError:
                raise PublishError(f"{self.path}: another process is publishing here") from None
            yield
        finally:
            os.close(descriptor)


def _release_of(target: TargetFile) -> Release:
    try:
        return Release.from_custom(
            target.custom,
            path=target.path,
            digest=target.hashes.get("sha256"),
            num_bytes=target.length,
        )
    except FedloraError as error:
        raise PublishError(f"the repository's targets: {error}") from None


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, MAX_FILE_BYTES)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from None
