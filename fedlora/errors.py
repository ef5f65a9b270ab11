"""Everything fedlora raises on purpose.

    FedloraError
    ├── UsageError                 the caller asked for something that cannot be; exit code 2
    │   ├── ConfigError            a config key or value makes no sense, alone or beside another
    │   ├── UnknownNameError       no such method, base or data set; names the nearest
    │   └── MissingExtraError      an optional dependency is not installed (also an ImportError)
    ├── AdapterError               an adapter is not valid, or two do not fit together
    │   ├── ShapeMismatchError     shapes or dtypes differ from what was expected
    │   ├── LayerMismatchError     layers are missing or too many
    │   ├── NonFiniteError         NaN or infinity
    │   ├── BaseMismatchError      made for another base
    │   └── UnsupportedError       mathematics that this operation does not cover
    ├── FormatError                a file is not what it should be
    │   └── DigestMismatchError    its bytes differ from their recorded digest
    ├── DataError                  a data set or one client's part of it cannot be used
    ├── FederationError            a round, a client's reply or a message is wrong
    │   ├── TooFewUpdatesError     a rule needs more clients than this round has left
    │   └── SecureAggregationError a secure sum was refused; nothing more is revealed of it
    │       ├── SecureTermsError   terms that promise too little, or a message under other terms
    │       ├── ForgedKeyError     a key is missing, twice there, or not signed by whom we trust
    │       ├── ShareError         a share is damaged, of another round or client, or too much
    │       ├── RevealError        lists that would unmask a client, or that changed
    │       ├── ThresholdError     too few clients are left: the round is given up
    │       ├── SecureSumError     the unmasked sum is not what its clients' messages promise
    │       └── PhaseOrderError    a message that this phase does not take
    ├── RunError                   a run folder cannot be written, or cannot be resumed
    ├── StoreError                 a device's state folder is missing, taken or in use
    └── UpdateError                over the air: a release cannot be published or fetched
        ├── PublishError           a key is missing, or the repository would not be accepted
        │   └── GateError          a run's adapter is not good or small enough to be released
        ├── MetadataError          signed metadata is refused
        │   ├── SignatureError     too few signatures of trusted keys
        │   ├── VersionError       older than, or not what, was seen or announced before
        │   └── ExpiryError        expired, or the clock is wrong
        ├── DownloadError          a server cannot be reached, answers wrongly or breaks off
        │   └── SlowDownloadError  slower than the minimum rate, or past the deadline
        └── ReleaseError           a release is not what was signed, or does not fit this device

A message is one line: where, what was expected, what was found, what to do. The command line prints
it and nothing else; `exit_code` says which code it ends with.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AdapterError",
    "BaseMismatchError",
    "ConfigError",
    "DataError",
    "DigestMismatchError",
    "DownloadError",
    "ExpiryError",
    "FederationError",
    "FedloraError",
    "ForgedKeyError",
    "FormatError",
    "GateError",
    "LayerMismatchError",
    "MetadataError",
    "MissingExtraError",
    "NonFiniteError",
    "PhaseOrderError",
    "PublishError",
    "ReleaseError",
    "RevealError",
    "RunError",
    "SecureAggregationError",
    "SecureSumError",
    "SecureTermsError",
    "ShapeMismatchError",
    "ShareError",
    "SignatureError",
    "SlowDownloadError",
    "StoreError",
    "ThresholdError",
    "TooFewUpdatesError",
    "UnknownNameError",
    "UnsupportedError",
    "UpdateError",
    "UsageError",
    "VersionError",
    "nearest",
    "unknown_name",
]


class FedloraError(Exception):
    """The root of the tree; `exit_code` is 1 (failed) or 2 (wrong usage)."""

    exit_code = 1


class UsageError(FedloraError):
    """The caller asked for something that cannot be."""

    exit_code = 2


class ConfigError(UsageError):
    """A config key or value makes no sense, alone or beside another."""


class UnknownNameError(UsageError):
    """No such method, base, data set or layer."""


class MissingExtraError(UsageError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs packages that are not installed: run pip install 'fedlora[{extra}]'"
        )


class AdapterError(FedloraError):
    """An adapter is not valid, or two do not fit together."""


class ShapeMismatchError(AdapterError):
    """Shapes or dtypes differ from what was expected."""


class LayerMismatchError(AdapterError):
    """Layers are missing or too many."""


class NonFiniteError(AdapterError):
    """A factor holds NaN or infinity."""


class BaseMismatchError(AdapterError):
    """An adapter was made for another base."""


class UnsupportedError(AdapterError):
    """An operation does not cover this kind of adapter."""


class FormatError(FedloraError):
    """A file is not what it should be."""


class DigestMismatchError(FormatError):
    """The bytes of a file differ from their recorded digest."""


class DataError(FedloraError):
    """A data set or one client's part of it cannot be used."""


class FederationError(FedloraError):
    """A round, a client's reply or a message is wrong."""


class TooFewUpdatesError(FederationError):
    """Too few clients are left for what a rule promises: the round is given up, not the run."""


class SecureAggregationError(FederationError):
    """A secure sum was refused: the round is given up, or one client is out of it."""


class SecureTermsError(SecureAggregationError):
    """The terms of a secure sum promise too little, or a message was made under other ones."""


class ForgedKeyError(SecureAggregationError):
    """A key is missing, is there twice, or is not signed by whom this device trusts."""


class ShareError(SecureAggregationError):
    """A share of a secret is damaged, missing, of another round or client, or too much."""


class RevealError(SecureAggregationError):
    """What would be revealed unmasks a single client, or is asked for a second time differently."""


class ThresholdError(SecureAggregationError):
    """Too few clients are left to take the masks off: the round is given up, not the run."""


class SecureSumError(SecureAggregationError):
    """The unmasked sum cannot be one of what its clients were to send."""


class PhaseOrderError(SecureAggregationError):
    """A secure sum's phase does not take this message, or not twice."""


class RunError(FedloraError):
    """A run folder cannot be written, or cannot be resumed."""


class StoreError(FedloraError):
    """The state folder of a device is missing, taken or in use."""


class UpdateError(FedloraError):
    """Over the air: a release cannot be published or fetched."""


class PublishError(UpdateError):
    """A key is missing, or the repository would not be accepted by its devices."""


class GateError(PublishError):
    """A run's adapter is not good, sound or small enough to be released."""


class MetadataError(UpdateError):
    """Signed metadata is refused; what is installed stays."""


class SignatureError(MetadataError):
    """Metadata has too few signatures of trusted keys."""


class VersionError(MetadataError):
    """Metadata is older than what was seen before, or not the one that was announced."""


class ExpiryError(MetadataError):
    """Metadata has expired, or the clock is wrong."""


class DownloadError(UpdateError):
    """A server cannot be reached, answers wrongly or breaks off."""


class SlowDownloadError(DownloadError):
    """A download is slower than its minimum rate, or past its deadline."""


class ReleaseError(UpdateError):
    """A release is not what was signed, or does not fit this device."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, else the list of all."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """Build the error for a name that no registry holds."""
    return UnknownNameError(f"unknown {kind} {name!r}{nearest(name, known)}")
