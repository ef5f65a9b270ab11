"""What state.json says, as values and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from fedlora.errors import FormatError
from fedlora.formats.strict_json import is_digest, is_text, parse_json, pretty_json, shown

__all__ = [
    "BundleEntry",
    "GlobalEntry",
    "PersonalEntry",
    "Status",
    "read_status",
    "status_bytes",
]

VERSION = 1
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
    """The installed global adapter."""

    digest: str  # SHA-256 of its file
    num_bytes: int
    fingerprint: str  # `Adapter.fingerprint`
    provenance: Mapping[str, Any]  # run, round, method, …


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
    installed: GlobalEntry | None = None
    personal: PersonalEntry | None = None
    commits: int = 0  # since the state was made

    def digests(self) -> frozenset[str]:
        """Return the digests of all adapters that are named here."""
        return frozenset(e.digest for e in (self.installed, self.personal) if e is not None)


T = TypeVar("T", BundleEntry, GlobalEntry, PersonalEntry)


def status_bytes(status: Status) -> bytes:
    """Return a status as the content of state.json. Raises `FormatError` where JSON cannot."""
    return pretty_json(
        {
            "version": VERSION,
            "commits": status.commits,
            "bundle": asdict(status.bundle),
            "global": None if status.installed is None else asdict(status.installed),
            "personal": None if status.personal is None else asdict(status.personal),
        }
    )


def read_status(data: bytes, where: str) -> Status:
    """Read what `status_bytes` gave. Raises `FormatError` for anything else."""
    record = parse_json(data, where)
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise FormatError(
            f"{where}: expected a device's state of version {VERSION}; update fedlora, or make a "
            "new state with fedlora device init"
        )
    if record.keys() != {"version", "commits", "bundle", "global", "personal"}:
        raise FormatError(f"{where}: missing or unknown keys: {_AGAIN}")
    if not _is_count(record["commits"]):
        raise FormatError(f"{where}: commits: expected a whole number: {_AGAIN}")
    return Status(
        _entry(BundleEntry, record["bundle"], f"{where}: bundle"),
        None
        if record["global"] is None
        else _entry(GlobalEntry, record["global"], f"{where}: global"),
        None
        if record["personal"] is None
        else _entry(PersonalEntry, record["personal"], f"{where}: personal"),
        record["commits"],
    )


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
    "started_from": lambda value: value is None or is_digest(value),
    "stale": lambda value: isinstance(value, bool),
    "metrics": _is_object,
}
