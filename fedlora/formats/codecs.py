"""Number formats of the packed file: how factors become small tensors, and back.

fp32   bit for bit.
fp16   rounded to nearest: error <= 2**-11 of the value, or <= 2**-25 below 6.1e-5; refused beyond
       65504.
int8   symmetric, one float32 scale for each rank component, that is for each row of A and each
       column of B: q = round(x / scale) in -127..127, scale = max |x| / 127 rounded up, so that
       |error| <= scale / 2 (plus the rounding of q * scale to float32).
int4   the same with -7..7 and max |x| / 7; two values a byte, the first in the lower half.

A DoRA magnitude multiplies whole outputs, so int8 and int4 leave it in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from fedlora.adapter import Array
from fedlora.errors import FormatError, NonFiniteError

__all__ = [
    "CODECS",
    "LEVELS",
    "Codec",
    "dequantize",
    "dtype_of",
    "pack_nibbles",
    "quantize",
    "scales_for",
    "to_half",
    "unpack_nibbles",
]

Codec = Literal["fp32", "fp16", "int8", "int4"]
Integers: TypeAlias = npt.NDArray[np.int8]
CODECS: tuple[str, ...] = get_args(Codec)
LEVELS: Mapping[str, int] = {"int8": 127, "int4": 7}  # the largest integer, of either sign


def dtype_of(codec: str) -> str:
    """Return the safetensors dtype of a factor."""
    return {"fp32": "F32", "fp16": "F16", "int8": "I8", "int4": "U8"}[codec]


def to_half(array: Array, what: str) -> npt.NDArray[np.float16]:
    """Round to float16. Raises `NonFiniteError` where that would be infinite."""
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise NonFiniteError(
            f"{what}: codec fp16 holds numbers up to 65504, found {np.abs(array).max():.4g}; "
            "use codec fp32 or int8"
        )
    return half


def scales_for(largest: npt.NDArray[np.float64], codec: str) -> Array:
    """Return the scales (rank,) float32 of components whose largest sizes are (rank,) float64."""
    levels = LEVELS[codec]
    scales = (largest / levels).astype(np.float32)
    # Rounded up: the largest value must not be beyond the last level.
    short = scales.astype(np.float64) * levels < largest
    scales[short] = np.nextafter(scales[short], np.float32(np.inf))
    return scales


def quantize(rows: Array, codec: str) -> tuple[Integers, Array]:
    """Return integers (rank, n) int8 and scales (rank,) float32 of rows (rank, n)."""
    values = rows.astype(np.float64)
    scales = scales_for(np.abs(values).max(axis=1), codec)
    divisor = np.where(scales > 0, scales, 1).astype(np.float64)
    integers = np.rint(values / divisor[:, None]).astype(np.int8)
    return integers, scales


def dequantize(integers: Integers, scales: Array) -> Array:
    """Return rows (rank, n) float32. Raises `FormatError` on scales that are no scales."""
    if not (np.isfinite(scales) & (scales >= 0)).all():
        raise FormatError("scales: expected finite numbers >= 0")
    with np.errstate(over="ignore"):  # an infinity is refused by LoraLayer, which names the layer
        return (integers * scales[:, None].astype(np.float64)).astype(np.float32)


def pack_nibbles(integers: Integers) -> npt.NDArray[np.uint8]:
    """Return (rank, ceil(n / 2)) uint8 of (rank, n) integers in -8..7."""
    padded: npt.NDArray[np.uint8] = np.pad(integers, ((0, 0), (0, integers.shape[1] % 2))).view(
        "u1"
    )
    packed: npt.NDArray[np.uint8] = np.bitwise_or(padded[:, 0::2] & 15, padded[:, 1::2] << 4)
    return packed


def unpack_nibbles(packed: npt.NDArray[Any], length: int) -> Integers:
    """Undo `pack_nibbles`: (rank, length) int8."""
    both = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)
    if length % 2 and both[:, length:].any():
        raise FormatError("int4: expected zero in the half byte after the last value")
    signed: Integers = ((both[:, :length] ^ 8).astype(np.int8) - 8).astype(np.int8)
    return signed
