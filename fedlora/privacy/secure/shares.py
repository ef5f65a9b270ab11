"""The two shares that one client gives to another: sealed on the way, checkable when revealed.

A message is two digests, which the server reads too, and the two shares encrypted for the
recipient with AES-256-GCM; the digests, the terms (run and round are in them), sender and recipient
are authenticated with it. With the digests the server knows a wrong share from a right one, without
knowing a share: each is a uniform number of 256 bits.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedlora.errors import RevealError, ShareError
from fedlora.privacy.secure.shamir import SHARE_BYTES
from fedlora.privacy.secure.terms import Terms

__all__ = ["KEY", "MESSAGE_BYTES", "SELF", "Digests", "PairOfShares", "digests_in", "open_shares",
           "pack_revealed", "seal_shares", "share_digest", "unpack_revealed"]  # fmt: skip

SELF, KEY = 0, 1  # which of a client's two secrets: the own mask's seed, the pairwise masks' key
_DIGESTS, _NONCE = 64, 12
MESSAGE_BYTES = _DIGESTS + _NONCE + 2 * SHARE_BYTES + 16
Digests = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class PairOfShares:
    """A holder's shares (33 bytes each) of both secrets of one client."""

    self_mask: bytes = field(repr=False)
    mask_key: bytes = field(repr=False)

    def of(self, kind: int) -> bytes:
        """Return the share of one of the two."""
        return self.self_mask if kind == SELF else self.mask_key


def seal_shares(
    terms: Terms, key: bytes, sender: int, recipient: int, shares: PairOfShares
) -> bytes:
    """Return the message that carries two shares. key: `keys.channel_key`, for this message only.

    >>> MESSAGE_BYTES
    158
    """
    digests = b"".join(
        share_digest(terms, sender, recipient, kind, shares.of(kind)) for kind in (SELF, KEY)
    )
    nonce = os.urandom(_NONCE)
    sealed = AESGCM(key).encrypt(
        nonce, shares.self_mask + shares.mask_key, _context(terms, sender, recipient) + digests
    )
    return digests + nonce + sealed


def open_shares(
    terms: Terms, key: bytes, sender: int, recipient: int, message: bytes
) -> PairOfShares:
    """Return the two shares in a message.

    Raises `ShareError` when it is damaged, of another round, or between other clients.
    """
    digests = digests_in(sender, recipient, message)
    try:
        plain = AESGCM(key).decrypt(
            message[_DIGESTS : _DIGESTS + _NONCE],
            message[_DIGESTS + _NONCE :],
            _context(terms, sender, recipient) + digests[SELF] + digests[KEY],
        )
    except InvalidTag:
        raise ShareError(
            f"shares of client {sender} for {recipient}: expected a message of round "
            f"{terms.round} between these two, found a damaged, older or exchanged one"
        ) from None
    shares = PairOfShares(plain[:SHARE_BYTES], plain[SHARE_BYTES:])
    for kind in (SELF, KEY):
        if share_digest(terms, sender, recipient, kind, shares.of(kind)) != digests[kind]:
            raise ShareError(
                f"shares of client {sender} for {recipient}: expected those of its digests, found "
                "others; the sender is wrong"
            )
    return shares


def digests_in(sender: int, recipient: int, message: bytes) -> Digests:
    """Return a message's digests, by secret; raises `ShareError` for another length."""
    if len(message) != MESSAGE_BYTES:
        raise ShareError(
            f"shares of client {sender} for {recipient}: expected {MESSAGE_BYTES} bytes, found "
            f"{len(message)}"
        )
    return bytes(message[: _DIGESTS // 2]), bytes(message[_DIGESTS // 2 : _DIGESTS])


def share_digest(terms: Terms, owner: int, holder: int, kind: int, share: bytes) -> bytes:
    """Return the digest (32 bytes) of `holder`'s share of one of `owner`'s secrets."""
    head = b"fedlora secure aggregation share 1\n" + bytes([kind])
    return hashlib.sha256(head + _context(terms, owner, holder) + share).digest()


def pack_revealed(kind: int, share: bytes) -> bytes:
    """Return what is revealed of one client: which secret, and the share."""
    return bytes([kind]) + share


def unpack_revealed(owner: int, data: bytes) -> tuple[int, bytes]:
    """Read `pack_revealed`; raises `RevealError`."""
    if len(data) != 1 + SHARE_BYTES or data[0] not in (SELF, KEY):
        raise RevealError(
            f"revealed share of client {owner}: expected {1 + SHARE_BYTES} bytes, found "
            f"{len(data)}, or neither of its two secrets"
        )
    return data[0], bytes(data[1:])


def _context(terms: Terms, sender: int, recipient: int) -> bytes:
    return terms.digest + struct.pack("<II", sender, recipient)
