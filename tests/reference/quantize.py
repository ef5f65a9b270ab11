"""What the bits of a quantized weight stand for, written out one block and one row at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

# QLoRA, arXiv:2305.14314, appendix E.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def nf4_weight(weight: Array) -> Array:
    """The nearest NF4 value of each weight; 64 weights in memory order share a scale."""
    flat = weight.flatten()
    out = np.zeros_like(flat)
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        largest = np.abs(block).max()
        if largest > 0:
            nearest = np.abs(block[:, None] / largest - NF4).argmin(1)
            out[start : start + 64] = NF4[nearest] * largest
    return out.reshape(weight.shape)


def int8_weight(weight: Array) -> Array:
    """The nearest of 255 steps of each weight; an output's weights share a scale."""
    out = np.zeros_like(weight)
    for index, row in enumerate(weight):
        scale = np.abs(row).max() / np.float32(127)
        if scale > 0:
            out[index] = np.round(row / scale) * scale
    return out
