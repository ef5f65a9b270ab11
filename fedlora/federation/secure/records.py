"""What the server and its clients say to each other in the phases of a secure sum.

    train.keys    down  "setup", "secure" (the terms, and this client's place)
                  up    "advertisement"                  its public keys of this round
    train.shares  down  "secure", "directory", "signers" the advertisements of its neighbors
                  up    "shares"                         sealed, one for each neighbor
    train.masked  down  "secure", "shares"               those that are for this client
                        and all of an ordinary training message (`fedlora.federation.records`)
                  up    "masked", "masked-digest"        its update under masks
    train.agree   down  "secure"                         who is in the sum, and who fell out
                  up    "tags"                           by which its neighbors see what it was told
    train.unmask  down  "secure", "tags"                 those that are for this client
                  up    "revealed"                       its part of what removes the masks

The model goes down with "train.masked" alone. Nothing else goes up: no loss, no count, no seconds.
Clients are named by their place in the round's cohort, from 0 on; in a record of bytes the place is
the key. Every phase says of which run and round it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedlora.errors import FederationError, FedloraError, ShapeMismatchError
from fedlora.federation.buffers import array_header
from fedlora.privacy.secure import Terms

__all__ = [
    "AGREE",
    "KEYS",
    "MASKED",
    "PHASES",
    "SECURE_RECORDS",
    "SHARES",
    "UNMASK",
    "KeysOrder",
    "PhaseOrder",
    "advertisement_content",
    "keys_content",
    "masked_record",
    "parts_record",
    "phase_record",
    "read_advertisement",
    "read_keys",
    "read_masked",
    "read_parts",
    "read_phase",
    "training_records",
]

KEYS, SHARES, MASKED = "train.keys", "train.shares", "train.masked"
AGREE, UNMASK = "train.agree", "train.unmask"
PHASES = (KEYS, SHARES, MASKED, AGREE, UNMASK)
SECURE_RECORDS = frozenset({"secure", "shares"})  # of a masked message, beside the ordinary ones
MOST_BYTES = 1 << 16  # of one client's part of a phase: an advertisement or a sealed share
_SERVER = "message from the server"


@dataclass(frozen=True, slots=True)
class KeysOrder:
    """What opens a round: its terms, and who the client is in it."""

    terms: Terms
    place: int


@dataclass(frozen=True, slots=True)
class PhaseOrder:
    """What every later phase says."""

    run: str
    round: int
    survivors: tuple[int, ...] = ()  # masked: of the sharing; agree: of the masking
    dropouts: tuple[int, ...] = ()  # agree: shared, and sent no update
    clipping_norm: float | None = None  # masked: the most that the update may be long; None: any


def keys_content(terms: Terms, place: int, setup: ConfigRecord) -> RecordDict:
    """Return the message that opens a round for the client at `place`."""
    plain = {key: value for key, value in terms.to_plain().items() if value is not None}
    record = ConfigRecord({**plain, "place": place})
    return RecordDict({"setup": setup.copy(), "secure": record})


def phase_record(order: PhaseOrder) -> ConfigRecord:
    """Return an order as the record "secure"; what is empty is left out."""
    record: dict[str, Any] = {"run": order.run, "round": order.round}
    for key in ("survivors", "dropouts"):
        if places := getattr(order, key):
            record[key] = list(places)
    if order.clipping_norm is not None:
        record["clipping_norm"] = order.clipping_norm
    return ConfigRecord(record)


def parts_record(parts: Mapping[int, bytes]) -> ConfigRecord:
    """Return parts by place as a record."""
    return ConfigRecord({str(place): part for place, part in sorted(parts.items())})


def read_keys(content: RecordDict) -> KeysOrder:
    """Read what opens a round. Raises `FederationError` and what `Terms` raises."""
    plain: dict[str, Any] = dict(_config(content, "secure", _SERVER).items())
    place = plain.pop("place", None)
    try:
        terms = Terms.from_plain({"neighbors": None, **plain})
    except FedloraError as error:
        raise FederationError(f"{_SERVER}, secure: {error}") from None
    if type(place) is not int or not 0 <= place < terms.clients:
        raise FederationError(
            f"{_SERVER}, secure: expected a place from 0 to {terms.clients - 1}, found {place!r}"
        )
    return KeysOrder(terms, place)


def read_phase(content: RecordDict) -> PhaseOrder:
    """Read what a later phase says. Raises `FederationError`."""
    found: dict[str, Any] = dict(_config(content, "secure", _SERVER).items())
    kinds: Mapping[str, type] = {
        "run": str, "round": int, "survivors": list, "dropouts": list, "clipping_norm": float,
    }  # fmt: skip
    known = all(type(value) is kinds.get(key) for key, value in found.items())
    if not known or not {"run", "round"} <= found.keys():
        raise FederationError(
            f"{_SERVER}, secure: expected run, round and some of survivors, dropouts and "
            "clipping_norm, found something else"
        )
    norm = found.get("clipping_norm")
    if norm is not None and not 0 < norm < float("inf"):
        raise FederationError(
            f"{_SERVER}, secure: expected a clipping_norm, a finite number > 0, found {norm!r}"
        )
    places = {key: _places(found.get(key, [])) for key in ("survivors", "dropouts")}
    return PhaseOrder(found["run"], found["round"], **places, clipping_norm=norm)


def read_parts(content: RecordDict, name: str, who: str) -> dict[int, bytes]:
    """Read a record of bytes by place. Raises `FederationError`, which opens with `who`."""
    parts = {}
    for key, part in _config(content, name, who).items():
        if not (key.isascii() and key.isdigit() and str(int(key)) == key and len(key) < 10):
            raise FederationError(f"{who}: {name}: expected places as keys, found {key[:20]!r}")
        if type(part) is not bytes or len(part) > MOST_BYTES:
            raise FederationError(
                f"{who}: {name}: expected up to {MOST_BYTES} bytes for place {key}, found others"
            )
        parts[int(key)] = part
    return parts


def advertisement_content(advertisement: bytes, signer: bytes | None) -> RecordDict:
    """Return a client's answer to what opens a round.

    signer: the SHA-256 of the public key that has signed it. It proves nothing: it says which of
    many trusted keys to check the signature with.
    """
    record = ConfigRecord({"bytes": advertisement})
    if signer is not None:
        record["signer"] = signer
    return RecordDict({"advertisement": record})


def read_advertisement(content: RecordDict, who: str) -> tuple[bytes, bytes | None]:
    """Read an advertisement and its signer. Raises `FederationError`, which opens with `who`."""
    record = dict(_config(content, "advertisement", who).items())
    data, signer = record.pop("bytes", None), record.pop("signer", None)
    if record or type(data) is not bytes or len(data) > MOST_BYTES:
        raise FederationError(f"{who}: expected an advertisement of up to {MOST_BYTES} bytes")
    if signer is not None and (type(signer) is not bytes or len(signer) != 32):
        raise FederationError(f"{who}: expected a signer of 32 bytes, found something else")
    return data, signer


def masked_record(row: np.ndarray, bits: int) -> RecordDict:
    """Return a masked update, ``(n,)`` of ``uint32`` or ``uint64``, as the records of a reply."""
    data = array_header(len(row), f"<u{bits // 8}") + row.astype(f"<u{bits // 8}").tobytes()
    array = FlowerArray(f"uint{bits}", (len(row),), "numpy.ndarray", data)
    digest = hashlib.sha256(data).hexdigest()
    return RecordDict(
        {"masked": ArrayRecord({"row": array}), "masked-digest": ConfigRecord({"digest": digest})}
    )


def read_masked(content: RecordDict, length: int, bits: int, who: str) -> np.ndarray:
    """Read a masked update, ``(length,)`` of ``uint32`` or ``uint64``.

    Its digest tells a damaged one. What a client lies about nobody can see in a sum.

    Raises `ShapeMismatchError` and `FederationError`, which open with `who`.
    """
    record = content.get("masked")
    if not isinstance(record, ArrayRecord) or list(record.keys()) != ["row"]:
        raise FederationError(f"{who}: expected one array 'row' in 'masked', found something else")
    array = record["row"]
    if tuple(array.shape) != (length,) or array.dtype != f"uint{bits}":
        raise ShapeMismatchError(
            f"{who}: expected a masked row of ({length},) uint{bits}, found "
            f"{tuple(array.shape)[:8]} {array.dtype[:20]}"
        )
    header, data = array_header(length, f"<u{bits // 8}"), array.data
    right = type(data) is bytes and data.startswith(header)
    if not right or len(data) != len(header) + length * bits // 8:
        raise FederationError(f"{who}: the row's bytes are not {length} uint{bits} numbers")
    told = _config(content, "masked-digest", who)
    if dict(told.items()) != {"digest": hashlib.sha256(data).hexdigest()}:
        raise FederationError(f"{who}: the masked row is not the one its digest was made of")
    return np.frombuffer(data, f"<u{bits // 8}", offset=len(header))


def training_records(content: RecordDict) -> RecordDict:
    """Return the ordinary training message in a masked one; the records are the same objects.

    Clients of a round share all of it, so that it is read once (`fedlora.federation.tasks`).
    """
    return RecordDict({k: record for k, record in content.items() if k not in SECURE_RECORDS})


def _config(content: RecordDict, name: str, who: str) -> ConfigRecord:
    record = content.get(name)
    if not isinstance(record, ConfigRecord):
        raise FederationError(f"{who}: expected a record {name!r}, found none")
    return record


def _places(found: Collection[Any]) -> tuple[int, ...]:
    if not all(type(place) is int and place >= 0 for place in found):
        raise FederationError(f"{_SERVER}, secure: expected places >= 0, found {list(found)[:5]}")
    if len(set(found)) != len(found):
        raise FederationError(f"{_SERVER}, secure: expected each place once, found one twice")
    return tuple(found)
