"""A base's weights as 4-bit integers, for where space counts more than time.

Each row of a linear layer's weight (out, in) is in blocks of 32 with a float32 scale of their own:
``w = scale * (q - 8)`` with q in 0..15, and the scale such that a block's largest number, with its
sign, is q = 0 exactly. 4.5 to 5 bits a weight: two numbers a byte, the first in the low half, as
ONNX Runtime's MatMulNBits has it, and stored as bytes, since its loader refuses external tensors of
a 4-bit type.

Inference multiplies by them with MatMulNBits. Training makes the float32 weights that the numbers
stand for, by looking up all of their rows (GatherBlockQuantized), and so has the exact gradients of
the quantized base. They exist while they are used, and the backward pass makes them anew: which
rows to look up is computed from the other factor, or ONNX Runtime would make all weights while it
loads, or early, and keep them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fedlora.export.emitter import Emitter
from fedlora.export.onnx_graph import MICROSOFT

__all__ = ["BLOCK", "packed_blocks", "product_of_blocks", "rows_of_blocks"]

BLOCK = 32  # weights that share a scale
SMALLEST_CODE = -8


def packed_blocks(
    rows: npt.NDArray[np.generic],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Round a weight (out, in), in a multiple of 32, to (out, blocks, 16) bytes and their scales.

    The scales are (out, blocks). A block of zeros has the scale 1.
    """
    blocks = rows.reshape(len(rows), -1, BLOCK).astype(np.float32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(2)[..., None], 2)
    scales = (largest / SMALLEST_CODE).astype(np.float32)
    scales[scales == 0] = 1
    codes = (np.rint(blocks / scales) - SMALLEST_CODE).clip(0, 15).astype(np.uint8)
    return codes[..., ::2] | (codes[..., 1::2] << 4), scales[..., 0]


def product_of_blocks(e: Emitter, x: str, name: str, forward: bool) -> str:
    """``x @ W.T`` (forward) or ``x @ W`` for a weight (out, in) that is stored in blocks."""
    outputs, blocks, _ = e.weights.array(f"{name}.int4").shape
    if not e.training:
        return e.call(
            "MatMulNBits", x, e.weight(f"{name}.int4"), e.weight(f"{name}.int4.scale"),
            domain=MICROSOFT, K=blocks * BLOCK, N=outputs, bits=4, block_size=BLOCK,
        )  # fmt: skip
    one, end = e.graph.constant(1, np.int64), e.graph.constant(outputs, np.int64)
    every = e.call("Range", _zero_after(e, x), end, one)
    whole = e.call("Reshape", _rows(e, name, every), e.graph.axes(outputs, blocks * BLOCK))
    return e.call("Gemm", x, whole, transB=1) if forward else e.call("MatMul", x, whole)


def rows_of_blocks(e: Emitter, name: str, ids: str, ids_rank: int) -> str:
    """Rows (*ids, in) of a weight that is stored in blocks."""
    return e.call("Reshape", _rows(e, name, ids), e.graph.axes(*[0] * ids_rank, -1))


def _rows(e: Emitter, name: str, ids: str) -> str:
    """Rows (*ids, blocks, 32) in float32."""
    return e.call(
        "GatherBlockQuantized", e.weight(f"{name}.int4"), ids, e.weight(f"{name}.int4.scales"),
        domain=MICROSOFT, bits=4, block_size=BLOCK, gather_axis=0, quantize_axis=2,
    )  # fmt: skip


def _zero_after(e: Emitter, x: str) -> str:
    """An int64 zero that is known when the rows x are: whether a number is less than itself."""
    first = e.call("Slice", x, e.graph.axes(0, 0), e.graph.axes(1, 1), e.graph.axes(0, 1))
    return e.call("Squeeze", e.cast(e.call("Less", first, first), torch.bool, torch.int64))
