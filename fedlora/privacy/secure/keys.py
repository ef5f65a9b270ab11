"""Keys of one round: what a client advertises, who signed it, and what two clients derive.

A client has two X25519 pairs a round: one for encrypting shares, one for the masks with its
neighbors, whose secret half is shared out and may be opened by the server. Whatever is derived
(HKDF-SHA256, salted with the terms' digest) names its purpose, both clients and their public keys,
so nothing of another round, direction or purpose fits. Two clients that see other advertisements of
each other than were sent cannot read each other's shares, and so find out.

The advertisement is signed with the device's identity where it has one: ECDSA with SHA-384 over
terms, index, both keys and the commitment to the seed of the own mask.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlora.errors import ForgedKeyError, FormatError, SecureTermsError
from fedlora.privacy.secure.terms import Terms

__all__ = [
    "Advertisement",
    "Identity",
    "agreement_key",
    "channel_key",
    "commitment_of",
    "mask_seed",
    "new_secret",
    "opened_key",
    "public_of",
    "require_signed",
    "self_mask_seed",
    "shared_secret",
]

_HEAD = struct.Struct("<4sI32s32s32s32sH")
_MAGIC = b"FSA1"
_MAX_SIGNATURE = 160  # of the curve P-521 in DER, and some
_CURVES = ("secp256r1", "secp384r1", "secp521r1")


@dataclass(frozen=True, slots=True)
class Advertisement:
    """What one client shows to the others in the first phase; all of it is public."""

    index: int
    terms: bytes  # digest of the terms that it was made under
    share_key: bytes  # X25519, 32 bytes: for encrypting shares to this client
    mask_key: bytes  # X25519, 32 bytes: for the masks with its neighbors
    commitment: bytes  # `commitment_of` the seed of its own mask
    signature: bytes = b""  # empty without an identity

    def signed_part(self) -> bytes:
        """Return the bytes that the signature is over."""
        keys = self.share_key + self.mask_key + self.commitment
        return b"fedlora secure aggregation keys 1\n" + struct.pack(
            "<I32s96s", self.index, self.terms, keys
        )

    @property
    def digest(self) -> bytes:
        """SHA-256 of the signed part (32 bytes)."""
        return hashlib.sha256(self.signed_part()).digest()

    def to_bytes(self) -> bytes:
        """Return 138 bytes and the signature."""
        return (
            _HEAD.pack(
                _MAGIC, self.index, self.terms, self.share_key, self.mask_key, self.commitment,
                len(self.signature),
            )
            + self.signature
        )  # fmt: skip

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read `to_bytes`; raises `ForgedKeyError` for anything else."""
        if len(data) >= _HEAD.size:
            magic, index, terms, share, mask, commitment, length = _HEAD.unpack_from(data)
            signature = bytes(data[_HEAD.size :])
            if magic == _MAGIC and len(signature) == length <= _MAX_SIGNATURE:
                return cls(index, terms, share, mask, commitment, signature)
        raise ForgedKeyError(
            f"advertised keys: expected {_HEAD.size} bytes of version 1 and a signature, found "
            f"{len(data)} bytes that are not; client and server differ in version, or a message "
            "was damaged"
        )


class Identity:
    """A device's signing key: NIST P-256, P-384 or P-521, as the nodes of a federation have."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key

    @classmethod
    def from_pem_file(cls, path: str | os.PathLike[str]) -> Self:
        """Read a private key without passphrase, in OpenSSH's format or PKCS #8.

        Raises `FormatError`.
        """
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise FormatError(f"{path}: no identity key: {error.strerror}") from None
        ssh = b"BEGIN OPENSSH" in data
        load = serialization.load_ssh_private_key if ssh else serialization.load_pem_private_key
        try:
            key = load(data, None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
            raise FormatError(
                f"{path}: expected a private key on a NIST curve without a passphrase; make one "
                "with fedlora federation key NAME, or ssh-keygen -t ecdsa -b 384 -N ''"
            )
        return cls(key)

    @property
    def public_bytes(self) -> bytes:
        """The public half, as DER SubjectPublicKeyInfo."""
        return self._key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def sign(self, data: bytes) -> bytes:
        """Return an ECDSA signature with SHA-384, as DER."""
        return self._key.sign(data, ec.ECDSA(hashes.SHA384()))

    def signed(self, advertisement: Advertisement) -> Advertisement:
        """Return the advertisement with this identity's signature."""
        return replace(advertisement, signature=self.sign(advertisement.signed_part()))


def require_signed(
    terms: Terms, index: int, advertisement: Advertisement, public: bytes | None
) -> None:
    """Raise unless an advertisement is one of `index` under these terms.

    public: the identity that must have signed it, as DER, PEM or an OpenSSH line; None: anyone may.
    Raises `SecureTermsError` for other terms, else `ForgedKeyError`.
    """
    if advertisement.index != index:
        raise ForgedKeyError(
            f"keys of client {index}: expected its own, found those of {advertisement.index}"
        )
    if advertisement.terms != terms.digest:
        raise SecureTermsError(
            f"keys of client {index}: expected them made under the terms of round {terms.round}, "
            "found other terms; the server told the two clients different ones"
        )
    if len({advertisement.share_key, advertisement.mask_key}) != 2:
        raise ForgedKeyError(f"keys of client {index}: expected two keys, found one twice")
    if public is None:
        return
    try:
        _load_public(public).verify(
            advertisement.signature, advertisement.signed_part(), ec.ECDSA(hashes.SHA384())
        )
    except InvalidSignature:
        raise ForgedKeyError(
            f"keys of client {index}: expected the signature of its identity, found "
            + ("none" if not advertisement.signature else "another one")
            + "; someone else made them"
        ) from None


def _load_public(data: bytes) -> ec.EllipticCurvePublicKey:
    key: object = None
    try:
        if data.startswith(b"ecdsa-sha2-"):
            key = serialization.load_ssh_public_key(data)
        elif data.startswith(b"-----BEGIN"):
            key = serialization.load_pem_public_key(data)
        else:
            key = serialization.load_der_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        pass
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in _CURVES:
        raise ForgedKeyError(
            "known identity: expected a public key on a NIST curve as DER, PEM or an OpenSSH line"
        )
    return key


def new_secret() -> bytes:
    """Return 32 bytes from the operating system: an X25519 private key, or a mask's seed."""
    return os.urandom(32)


def public_of(secret: bytes) -> bytes:
    """Return the public half (32 bytes) of an X25519 private key."""
    return opened_key(secret).public_key().public_bytes_raw()


def opened_key(secret: bytes) -> X25519PrivateKey:
    """Return a private key to call `shared_secret` with; making it takes as long as using it."""
    return X25519PrivateKey.from_private_bytes(secret)


def shared_secret(key: X25519PrivateKey, public: bytes, whose: int) -> bytes:
    """Return what X25519 makes of one's private and another's public key (32 bytes).

    whose: the other client, for the message. Raises `ForgedKeyError` for a point of small order,
    with which the result would be known to everyone.
    """
    try:
        return key.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise ForgedKeyError(
            f"keys of client {whose}: expected an X25519 key, found a point of small order"
        ) from None


def commitment_of(terms: Terms, index: int, seed: bytes) -> bytes:
    """Return the digest by which the server checks an own mask's seed once it is opened."""
    head = b"fedlora secure aggregation commitment 1\n" + struct.pack("<I", index)
    return hashlib.sha256(head + terms.digest + seed).digest()


def self_mask_seed(terms: Terms, index: int, seed: bytes) -> bytes:
    """Return the generator's key for a client's own mask."""
    return _derive(terms, seed, b"self mask", struct.pack("<I", index))


def mask_seed(
    terms: Terms, shared: bytes, one: tuple[int, bytes], other: tuple[int, bytes]
) -> bytes:
    """Return the generator's key for the mask of two clients, the same whoever asks.

    shared: `shared_secret` of their mask keys. one, other: index and public mask key. The lower
    index adds the mask, the other subtracts it.
    """
    (low, low_key), (high, high_key) = sorted((one, other))
    context = struct.pack("<I32sI32s", low, low_key, high, high_key)
    return _derive(terms, shared, b"pairwise mask", context)


def channel_key(
    terms: Terms, shared: bytes, sender: Advertisement, recipient: Advertisement
) -> bytes:
    """Return the AES key for what one client sends to another.

    shared: `shared_secret` of their share keys.
    """
    return _derive(terms, shared, b"channel", sender.digest + recipient.digest)


def agreement_key(terms: Terms, shared: bytes, one: Advertisement, other: Advertisement) -> bytes:
    """Return the key of the tags between two clients, the same whoever asks.

    shared: `shared_secret` of their share keys.
    """
    return _derive(terms, shared, b"agreement", b"".join(sorted((one.digest, other.digest))))


def _derive(terms: Terms, secret: bytes, purpose: bytes, context: bytes) -> bytes:
    info = b"fedlora secure aggregation 1\n" + purpose + b"\n" + context
    return HKDF(hashes.SHA256(), 32, terms.digest, info).derive(secret)
