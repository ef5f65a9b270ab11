"""What state.json says, as values and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from fedlora.errors import FormatError
from fedlora.formats.strict_json import is_digest, is_text, parse_json, pretty_json, shown

__all__ = [
    "MAX_REJECTED",
    "BundleEntry",
    "GlobalEntry",
    "PersonalEntry",
    "Status",
    "read_status",
    "status_bytes",
]

VERSION = 2  # 1 had one global adapter and no slots
MAX_REJECTED = 64  # versions that are remembered; the oldest are forgotten
_AGAIN = "it was changed or damaged; make a new state with fedlora device init"


@dataclass(frozen=True, slots=True)
class BundleEntry:
    """The bundle of a state."""

    # SHA-256 of its manifest.json, which has those of its other files; None: there is no bundle,
    # the state is of a client that trains in torch.
    digest: str | None
    base: str  # fingerprint
    folder: str | None  # absolute; None: copied into the state


@dataclass(frozen=True, slots=True)
class GlobalEntry:
    """A global adapter in one of the slots."""

    digest: str  # SHA-256 of its file
    num_bytes: int
    fingerprint: str  # `Adapter.fingerprint`
    provenance: Mapping[str, Any]  # run, round, method, …
    channel: str | None = None  # of the release that it came as; None: installed by hand
    release: int | None = None  # its version


@dataclass(frozen=True, slots=True)
class PersonalEntry:
    """The adapter that was trained on the owner's data."""

    digest: str
    num_bytes: int
    fingerprint: str
    started_from: str | None  # fingerprint of the global adapter; None: from the base
    stale: bool  # another global adapter has been installed since
    metrics: Mapping[str, Any]  # local: nothing sends them anywhere


@dataclass(frozen=True, slots=True)
class Status:
    """What state.json says."""

    bundle: BundleEntry
    installed: GlobalEntry | None = None  # the active slot: what is served
    personal: PersonalEntry | None = None
    commits: int = 0  # since the state was made
    previous: GlobalEntry | None = None  # what `installed` replaced, for going back
    pending: GlobalEntry | None = None  # verified, not yet found to be healthy, never served
    tries: int = 0  # how often a trial of `pending` was begun
    rejected: tuple[int, ...] = ()  # versions of releases that were not healthy here

    def digests(self) -> frozenset[str]:
        """Return the digests of all adapters that are named here."""
        named = (self.installed, self.personal, self.previous, self.pending)
        return frozenset(entry.digest for entry in named if entry is not None)


T = TypeVar("T", BundleEntry, GlobalEntry, PersonalEntry)


def status_bytes(status: Status) -> bytes:
    """Return a status as the content of state.json. Raises `FormatError` where JSON cannot."""
    slots = {key: getattr(status, name) for key, name in _SLOTS.items()}
    return pretty_json(
        {
            "version": VERSION,
            "commits": status.commits,
            "bundle": asdict(status.bundle),
            "tries": status.tries,
            "rejected": list(status.rejected),
            "personal": None if status.personal is None else asdict(status.personal),
            **{key: None if entry is None else asdict(entry) for key, entry in slots.items()},
        }
    )


def read_status(data: bytes, where: str) -> Status:
    """Read what `status_bytes` gave, or version 1. Raises `FormatError` for anything else."""
    record = parse_json(data, where)
    if isinstance(record, dict) and record.get("version") == 1:
        record = _from_version_1(record, where)
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise FormatError(
            f"{where}: expected a device's state of version 1 or {VERSION}; update fedlora, or "
            "make a new state with fedlora device init"
        )
    if record.keys() != {"version", "commits", "bundle", "tries", "rejected", "personal", *_SLOTS}:
        raise FormatError(f"{where}: missing or unknown keys: {_AGAIN}")
    for name in ("commits", "tries"):
        if not _is_count(record[name]):
            raise FormatError(f"{where}: {name}: expected a whole number: {_AGAIN}")
    rejected = record["rejected"]
    if not isinstance(rejected, list) or not all(map(_is_count, rejected)):
        raise FormatError(f"{where}: rejected: expected a list of versions: {_AGAIN}")
    slots = {
        name: None if record[key] is None else _entry(GlobalEntry, record[key], f"{where}: {key}")
        for key, name in _SLOTS.items()
    }
    return Status(
        bundle=_entry(BundleEntry, record["bundle"], f"{where}: bundle"),
        personal=None
        if record["personal"] is None
        else _entry(PersonalEntry, record["personal"], f"{where}: personal"),
        commits=record["commits"],
        tries=record["tries"],
        rejected=tuple(rejected),
        **slots,
    )


# Keys of state.json and the fields of `Status`.
_SLOTS = {"active": "installed", "previous": "previous", "pending": "pending"}


def _from_version_1(record: dict[str, Any], where: str) -> dict[str, Any]:
    if record.keys() != {"version", "commits", "bundle", "global", "personal"}:
        raise FormatError(f"{where}: missing or unknown keys: {_AGAIN}")
    active = record["global"]
    if isinstance(active, dict):
        active = {**active, "channel": None, "release": None}
    new = {"active": active, "previous": None, "pending": None, "tries": 0, "rejected": []}
    kept = {name: record[name] for name in ("commits", "bundle", "personal")}
    return {"version": VERSION, **kept, **new}


def _entry(kind: type[T], value: Any, where: str) -> T:
    names = kind.__dataclass_fields__.keys()
    if not isinstance(value, dict) or value.keys() != names:
        raise FormatError(f"{where}: expected an object with {', '.join(names)}: {_AGAIN}")
    for name, about in value.items():
        absent = kind is BundleEntry and name == "digest" and about is None
        if not absent and not _FITS[name](about):
            raise FormatError(f"{where}: {name}: unexpected value {shown(about)}: {_AGAIN}")
    return kind(**value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


_FITS: dict[str, Callable[[Any], bool]] = {
    "digest": is_digest,
    "base": is_text,
    "folder": lambda value: value is None or (isinstance(value, str) and bool(value)),
    "num_bytes": _is_count,
    "fingerprint": is_digest,
    "provenance": _is_object,
    "channel": lambda value: value is None or is_text(value),
    "release": lambda value: value is None or _is_count(value),
    "started_from": lambda value: value is None or is_digest(value),
    "stale": lambda value: isinstance(value, bool),
    "metrics": _is_object,
}
