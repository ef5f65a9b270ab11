"""Masks: AES-256 in counter mode from a 256-bit seed, added to ring numbers in place.

Every seed is used for one mask only, so the counter starts at 0. The numbers are little-endian.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from fedlora.privacy.secure.quantize import Ring

__all__ = ["apply_masks"]

_CHUNK = 1 << 18  # bytes at a time: small enough for the cache, large enough to forget the calls
_ZEROS = bytes(_CHUNK)


def apply_masks(vector: Ring, add: Iterable[bytes] = (), subtract: Iterable[bytes] = ()) -> None:
    """Add and subtract the masks of seeds (32 bytes each), modulo the ring, in place.

    vector: uint32 or uint64 (n,). Takes 512 KiB beside it, however many seeds there are.
    """
    streams: list[tuple[CipherContext, np.ufunc]] = [(_stream(seed), np.add) for seed in add]
    streams += [(_stream(seed), np.subtract) for seed in subtract]
    width = vector.dtype.itemsize
    # Some versions of the library want room for a block more than they write.
    buffer = bytearray(_CHUNK + 16)
    numbers = np.frombuffer(buffer, np.dtype(f"<u{width}"), _CHUNK // width)
    for start in range(0, len(vector), _CHUNK // width):
        part = vector[start : start + _CHUNK // width]
        zeros = memoryview(_ZEROS)[: part.nbytes]
        for stream, operation in streams:
            stream.update_into(zeros, buffer)
            operation(part, numbers[: len(part)], out=part)


def _stream(seed: bytes) -> CipherContext:
    return Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()
