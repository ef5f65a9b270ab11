"""A row through a message's codec, one number at a time, as `fedlora.federation.codecs` has it."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np

from fedlora.flat import Segment

LEVELS = {"int8": 127, "int4": 7}


def components(segments: Sequence[Segment]) -> tuple[list[list[int]], list[int]]:
    """The places in a row of each rank component's numbers, and of the magnitudes."""
    found: list[list[int]] = []
    magnitudes: list[int] = []
    start = 0
    for segment in segments:
        if segment.factor == "magnitude":
            magnitudes += range(start, start + segment.size)
        elif segment.factor == "A":
            rank = segment.shape[0]
            length = segment.size // rank
            found += [
                list(range(start + r * length, start + (r + 1) * length)) for r in range(rank)
            ]
        else:
            rank = segment.shape[1]
            found += [list(range(start + r, start + segment.size, rank)) for r in range(rank)]
        start += segment.size
    return found, magnitudes


def encode(segments: Sequence[Segment], row: np.ndarray, codec: str, draws: object) -> bytes:
    """The bytes of a row. `draws` gives a float32 in [0, 1) a number; None rounds to nearest."""
    values = [float(value) for value in row]
    if codec == "fp16":
        return b"".join(struct.pack("<e", value) for value in values)
    places, magnitudes = components(segments)
    scales, integers = [], []
    for component in places:
        scale = scale_of(max(abs(values[place]) for place in component), LEVELS[codec])
        scales.append(scale)
        for place in component:
            steps = values[place] / (scale or 1.0)
            if draws is None:
                integers.append(round(steps))
                continue
            below = math.floor(steps)
            drawn = float(draws.random(dtype=np.float32))  # type: ignore[attr-defined]
            integers.append(below + (drawn < steps - below))
    data = b"".join(struct.pack("<f", value) for value in scales)
    data += b"".join(struct.pack("<f", values[place]) for place in magnitudes)
    if codec == "int8":
        return data + b"".join(struct.pack("<b", value) for value in integers)
    if len(integers) % 2:
        integers.append(0)
    pairs = zip(integers[::2], integers[1::2], strict=True)
    return data + bytes((low & 15) | (high & 15) << 4 for low, high in pairs)


def decode(segments: Sequence[Segment], data: bytes, codec: str) -> np.ndarray:
    """The row of what `encode` returned."""
    size = sum(segment.size for segment in segments)
    if codec == "fp16":
        return np.array([struct.unpack_from("<e", data, 2 * i)[0] for i in range(size)], np.float32)
    places, magnitudes = components(segments)
    row = np.zeros(size, np.float32)
    for number, place in enumerate(magnitudes):
        row[place] = struct.unpack_from("<f", data, 4 * (len(places) + number))[0]
    head, position = 4 * (len(places) + len(magnitudes)), 0
    for number, component in enumerate(places):
        scale = struct.unpack_from("<f", data, 4 * number)[0]
        for place in component:
            if codec == "int8":
                integer = struct.unpack_from("<b", data, head + position)[0]
            else:
                half = data[head + position // 2] >> (4 * (position % 2)) & 15
                integer = half - 16 if half > 7 else half
            row[place] = integer * scale
            position += 1
    return row


def scale_of(largest: float, levels: int) -> float:
    """The least float32 scale of which `levels` steps reach `largest`, or the one above it."""
    scale = np.float32(largest / levels)
    if float(scale) * levels < largest:
        scale = np.nextafter(scale, np.float32(np.inf))
    return float(scale)
