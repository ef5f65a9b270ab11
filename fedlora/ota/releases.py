"""What a release says, which devices it is for, and how both stand in TUF metadata.

A release is one packed adapter, a target named ``CHANNEL/VERSION.safetensors``. What it says is
signed with the offline targets key. How far it is rolled out is in the target
``rollout/CHANNEL.json`` of the delegated role ``rollout``, signed with an online key: that role can
only offer what the targets key has signed, and no further than that allows (`Release.limit`,
`Release.withdrawn`). Everything is in the targets' ``custom`` field, so that a device needs no
further request for it. TUF's canonical JSON has no fractions: percentages are whole hundredths
there, and the provenance is a text.

Versions count over all channels of a repository, so that a device which changes its channel
cannot be given something older either.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fedlora.errors import ConfigError, FormatError, ReleaseError
from fedlora.formats.strict_json import canonical_json, is_digest, is_text, parse_json, shown

__all__ = [
    "MAX_LISTED",
    "ROLLOUT_ROLE",
    "Device",
    "Release",
    "Rollout",
    "Stage",
    "check_channel",
    "choose",
    "is_at_least",
    "release_path",
    "rollout_path",
    "share_of",
]

FORMAT = 1
ROLLOUT_ROLE = "rollout"
MAX_LISTED = 32  # releases of a channel that its rollout names, the newest
MAX_VERSION = 1 << 53  # what every reader of JSON holds exactly
MAX_NOTES = 2000  # characters
MAX_PROVENANCE = 8192  # bytes of canonical JSON
_CHANNEL = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_NUMBERS = re.compile(r"(\d{1,6})(?:\.(\d{1,6}))?(?:\.(\d{1,6}))?.{0,32}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Release:
    """One version of a channel.

    base: fingerprint of the base that its adapter is for. bundle: SHA-256 of the only bundle's
    manifest that it may run on; minimum_bundle: version of fedlora that must have exported it.
    limit: percent of the devices that its rollout may reach. withdrawn: it is offered to none.
    """

    channel: str
    version: int
    digest: str  # SHA-256 of the packed file
    num_bytes: int
    base: str
    bundle: str | None = None
    minimum_bundle: str | None = None
    minimum_fedlora: str | None = None
    notes: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)  # run, round, method, epsilon, …
    limit: float = 100.0
    withdrawn: bool = False

    def __post_init__(self) -> None:
        check_channel(self.channel)
        for name, (expected, fits) in _FITS.items():
            value = getattr(self, name)
            if not fits(value):
                raise ConfigError(f"release: {name}: expected {expected}, found {shown(value)}")

    def custom(self) -> dict[str, Any]:
        """Return what the targets role signs beside digest and length."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("digest", "num_bytes")}
        provenance = canonical_json(dict(self.provenance)).decode()
        return {"fedlora": FORMAT, **kept, "provenance": provenance, "limit": _steps(self.limit)}

    @classmethod
    def from_custom(cls, custom: Any, *, path: str, digest: Any, num_bytes: Any) -> Release:
        """Read what `custom` gave. Raises `ReleaseError`."""
        names = cls.__dataclass_fields__.keys() - {"digest", "num_bytes"}
        record = _record(custom, names, path)
        record["limit"] = _percent(record["limit"])
        try:
            text = record["provenance"]
            record["provenance"] = parse_json(text.encode() if isinstance(text, str) else b"", path)
            found = cls(**record, digest=digest, num_bytes=num_bytes)
        except (ConfigError, FormatError) as error:
            raise ReleaseError(f"target {shown(path)}: {error}") from None
        if path != release_path(found.channel, found.version):
            raise ReleaseError(
                f"target {shown(path)}: expected release {found.version} of channel "
                f"{found.channel} as {release_path(found.channel, found.version)}"
            )
        return found


@dataclass(frozen=True, slots=True)
class Stage:
    """How far one release is rolled out."""

    version: int
    percent: float = 100.0
    halted: bool = False

    def __post_init__(self) -> None:
        if not _is_version(self.version):
            raise ConfigError(f"rollout: expected a version, found {shown(self.version)}")
        if not _is_percent(self.percent):
            raise ConfigError(
                f"rollout of release {self.version}: expected 0 to 100 percent in steps of "
                f"0.01, found {shown(self.percent)}"
            )
        if not isinstance(self.halted, bool):
            raise ConfigError(f"rollout: halted: expected a boolean, found {shown(self.halted)}")


@dataclass(frozen=True, slots=True)
class Rollout:
    """The releases of a channel that are offered, oldest first."""

    channel: str
    stages: tuple[Stage, ...] = ()

    def stage(self, version: int) -> Stage | None:
        """Return a release's stage, None when it is not listed."""
        return next((stage for stage in self.stages if stage.version == version), None)

    def with_stage(self, stage: Stage) -> Rollout:
        """Return a rollout in which a release has this stage; the oldest ones may drop out."""
        others = [old for old in self.stages if old.version != stage.version]
        stages = sorted([*others, stage], key=lambda found: found.version)
        return replace(self, stages=tuple(stages[-MAX_LISTED:]))

    def custom(self) -> dict[str, Any]:
        """Return what the rollout role signs."""
        stages = [{**asdict(stage), "percent": _steps(stage.percent)} for stage in self.stages]
        return {"fedlora": FORMAT, "channel": self.channel, "stages": stages}

    @classmethod
    def from_custom(cls, custom: Any, channel: str) -> Rollout:
        """Read what `custom` gave. Raises `ReleaseError`."""
        path = rollout_path(channel)
        record = _record(custom, {"channel", "stages"}, path)
        stages = record["stages"]
        if record["channel"] != channel or not isinstance(stages, list):
            raise ReleaseError(f"target {path}: expected the stages of channel {channel}")
        if len(stages) > MAX_LISTED:
            raise ReleaseError(
                f"target {path}: expected at most {MAX_LISTED} releases, found {len(stages)}"
            )
        found = []
        for stage in stages:
            if not isinstance(stage, dict) or stage.keys() != Stage.__dataclass_fields__.keys():
                raise ReleaseError(f"target {path}: unexpected stage {shown(stage)}")
            try:
                found.append(Stage(**{**stage, "percent": _percent(stage["percent"])}))
            except ConfigError as error:
                raise ReleaseError(f"target {path}: {error}") from None
        return cls(channel, tuple(sorted(found, key=lambda stage: stage.version)))


@dataclass(frozen=True, slots=True)
class Device:
    """What decides about a release on a device."""

    id: str  # random, never sent
    base: str  # fingerprint
    bundle: str  # SHA-256 of the manifest
    bundle_version: str | None  # of the fedlora that exported it
    fedlora: str
    active: int | None = None  # version of the release that is served
    rejected: frozenset[int] = frozenset()
    max_bytes: int = 1 << 26


def choose(
    rollout: Rollout, find: Callable[[int], Release | None], device: Device
) -> tuple[Release | None, dict[int, str]]:
    """Return the newest release for a device, and why each newer one is not for it.

    find: returns a release by its version; where it raises `ReleaseError`, as for a release of a
    later format, the next one is looked at. A release that is not newer than the active one is
    never chosen, and neither is what this device has rejected.
    """
    reasons: dict[int, str] = {}
    for stage in reversed(rollout.stages):
        if device.active is not None and stage.version <= device.active:
            break
        try:
            release = find(stage.version)
        except ReleaseError as error:
            reasons[stage.version] = str(error)
            continue
        if release is None:
            reasons[stage.version] = "not signed by the targets role"
            continue
        reason = _reason_against(release, stage, device)
        if reason is None:
            return release, reasons
        reasons[stage.version] = reason
    return None, reasons


def _reason_against(release: Release, stage: Stage, device: Device) -> str | None:
    if stage.halted or release.withdrawn:
        return "halted"
    if release.version in device.rejected:
        return "rejected on this device"
    if release.base != device.base:
        return f"for another base, {release.base[:12]}"
    if release.bundle is not None and release.bundle != device.bundle:
        return f"for another bundle, {release.bundle[:12]}"
    need = release.minimum_bundle
    if need is not None and not is_at_least(device.bundle_version, need):
        return f"needs a bundle exported by fedlora {need} or newer"
    need = release.minimum_fedlora
    if need is not None and not is_at_least(device.fedlora, need):
        return f"needs fedlora {need} or newer"
    if release.num_bytes > device.max_bytes:
        return f"has {release.num_bytes:,} bytes, this device takes {device.max_bytes:,}"
    share = share_of(device.id, release.channel, release.version)
    if share >= min(stage.percent, release.limit):
        return "not yet rolled out to this device"
    return None


def share_of(device_id: str, channel: str, version: int) -> float:
    """Return where in a release's rollout a device stands: 0 (first) to below 100.

    The same for ever, so a device that is in at 1 % is in at 10 %; and independent between
    releases, so that it is not always the same devices that go first.

    >>> round(share_of("a", "stable", 7), 3)
    73.588
    """
    words = hashlib.sha256(canonical_json([device_id, channel, version])).digest()
    return int.from_bytes(words[:8], "big") / 2**64 * 100


def is_at_least(found: str | None, needed: str) -> bool:
    """Whether a version such as "0.2.1" is not older than another; an unknown one is older.

    >>> is_at_least("0.10", "0.9.3")
    True
    """
    return found is not None and _numbers(found) >= _numbers(needed)


def check_channel(name: Any) -> str:
    """Return a channel's name. Raises `ConfigError` for what cannot be one."""
    if not isinstance(name, str) or not _CHANNEL.fullmatch(name) or name == ROLLOUT_ROLE:
        raise ConfigError(
            f"channel: expected up to 32 small letters, digits and hyphens, such as 'stable', "
            f"found {shown(name)}"
        )
    return name


def release_path(channel: str, version: int) -> str:
    """Return a release's target path."""
    return f"{check_channel(channel)}/{version}.safetensors"


def rollout_path(channel: str) -> str:
    """Return the target path of a channel's rollout."""
    return f"{ROLLOUT_ROLE}/{check_channel(channel)}.json"


def _record(custom: Any, names: Any, path: str) -> dict[str, Any]:
    if not isinstance(custom, dict) or custom.get("fedlora") != FORMAT:
        raise ReleaseError(
            f"target {shown(path)}: expected a release of format {FORMAT}; update fedlora"
        )
    record = {key: value for key, value in custom.items() if key != "fedlora"}
    if record.keys() != set(names):
        odd = sorted(map(str, record.keys() ^ set(names)))[0]
        raise ReleaseError(f"target {shown(path)}: missing or unknown key {odd[:80]!r}")
    return record


def _numbers(version: str) -> tuple[int, ...]:
    match = _NUMBERS.fullmatch(version)
    return tuple(int(part or 0) for part in match.groups()) if match else (-1,)


def _is_version(value: Any) -> bool:
    return type(value) is int and 0 < value < MAX_VERSION


def _is_percent(value: Any) -> bool:
    """0.01 is the smallest step: a hundred devices in a million."""
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value <= 100:
        return False
    return bool(abs(value * 100 - round(value * 100)) < 1e-6)


def _steps(percent: float) -> int:
    return round(percent * 100)


def _percent(steps: Any) -> Any:
    """Return what `_steps` was given; what is no whole number gives None, which is refused."""
    return steps / 100 if type(steps) is int else None


def _is_needed_version(value: Any) -> bool:
    return value is None or (isinstance(value, str) and _NUMBERS.fullmatch(value) is not None)


_FITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "version": ("a whole number from 1", _is_version),
    "digest": ("a SHA-256", is_digest),
    "num_bytes": ("a whole number", lambda value: type(value) is int and value > 0),
    "base": ("a fingerprint", is_text),
    "bundle": ("a SHA-256 or none", lambda value: value is None or is_digest(value)),
    "minimum_bundle": ("a version such as 0.1.0", _is_needed_version),
    "minimum_fedlora": ("a version such as 0.1.0", _is_needed_version),
    "notes": (
        f"at most {MAX_NOTES} characters",
        lambda value: isinstance(value, str) and len(value) <= MAX_NOTES,
    ),
    "provenance": (
        f"an object of at most {MAX_PROVENANCE} bytes",
        lambda value: (
            isinstance(value, Mapping) and len(canonical_json(dict(value))) <= MAX_PROVENANCE
        ),
    ),
    "limit": ("0 to 100 percent in steps of 0.01", _is_percent),
    "withdrawn": ("a boolean", lambda value: isinstance(value, bool)),
}
