"""Gaussian noise that nobody can guess: a secret key, a stream cipher, float64 normals.

A run draws one secret of 256 bits from the operating system and keeps it in a file that only its
owner may read. Everything secret of the run comes from it by a pseudo-random function (HMAC with
SHA-256) of words that say what for. So a round that is done again with the same replies has the
same noise, to the bit, and one with other replies has noise that is independent of it: the words of
a round's noise hold the digest of the sum that it is added to.

Uniform numbers are the keystream of ChaCha20, 53 bits each, and normals are made of them by Box and
Muller's formula. They end at 8.6 standard deviations, beyond which a normal lies with a probability
of 1e-17. NumPy's generators are for simulations and not used here: their state can be computed from
what they have put out.

These are floating-point numbers: see "Limits" in docs/privacy.md.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

import numpy as np

from fedlora.errors import MissingExtraError, RunError
from fedlora.files import sync_folder
from fedlora.low_rank import Matrix

__all__ = ["KEY_BYTES", "derive", "fresh_key", "make_key", "normals", "read_key", "uniforms"]

KEY_BYTES = 32


def fresh_key() -> bytes:
    """Return a key from the operating system's entropy."""
    return secrets.token_bytes(KEY_BYTES)


def make_key(path: Path) -> bytes:
    """Write a new key to `path`, for its owner alone (0600), and return it.

    Raises `RunError` where there is a file already: a key is never overwritten.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    key = fresh_key()
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise RunError(
            f"{path}: expected no file, found one: the key of another run is not overwritten; "
            "choose another folder"
        ) from None
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None
    with os.fdopen(handle, "wb") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)
    return key


def read_key(path: Path) -> bytes:
    """Return the key of a run that goes on. Raises `RunError` where it is missing or not a key."""
    try:
        key = path.read_bytes()
        mode = path.stat().st_mode
    except OSError as error:
        raise RunError(
            f"{path}: expected the secret key of this run's noise, found none ({error.strerror}): "
            "without it a round that is done again would be released twice, with two noises, which "
            "no ledger covers; put the file back, or start a new run"
        ) from None
    if len(key) != KEY_BYTES:
        raise RunError(f"{path}: expected a key of {KEY_BYTES} bytes, found {len(key)}")
    if os.name == "posix" and mode & 0o077:
        raise RunError(
            f"{path}: expected a file that only its owner may read (0600), found "
            f"{mode & 0o777:04o}: whoever has read it can take the noise off; if nobody has, run "
            f"chmod 600 {path}"
        )
    return key


def derive(key: bytes, *words: str | int | bytes) -> bytes:
    """Return 32 bytes that only depend on the key and the words, and look random without the key.

    Words are joined with their kind and length, so that no two lists of them are the same text.
    """
    text = b"".join(_marked(word) for word in words)
    return hmac.new(key, text, hashlib.sha256).digest()


def uniforms(key: bytes, count: int) -> Matrix:
    """Return `count` numbers in [0, 1), float64, multiples of 2**-53, from the key's stream."""
    return _words(key, count) * 2.0**-53


def normals(key: bytes, count: int) -> Matrix:
    """Return `count` independent standard normal numbers, float64, from the key's stream.

    Box and Muller: ``sqrt(-2 log u) (cos 2 pi v, sin 2 pi v)`` with u in (0, 1] and v in [0, 1).
    """
    half = (count + 1) // 2
    words = _words(key, 2 * half)
    radius = np.sqrt(-2 * np.log((words[:half] + 1) * 2.0**-53))
    angle = words[half:] * (2 * np.pi * 2.0**-53)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def _words(key: bytes, count: int) -> Matrix:
    """Return `count` whole numbers below 2**53, as float64."""
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
    except ImportError:
        raise MissingExtraError("noise for privacy", "privacy") from None
    # A key is used for one stream only, so that the nonce and the counter begin at zero.
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    data = stream.update(bytes(8 * count))
    return (np.frombuffer(data, "<u8") >> np.uint64(11)).astype(np.float64)


def _marked(word: str | int | bytes) -> bytes:
    data = word if isinstance(word, bytes) else str(word).encode()
    return f"{type(word).__name__}:{len(data)}:".encode() + data + b";"
