"""A base's weights as int8, or 4 bits: stored so, and the products and look-ups that read them.

Symmetric, one scale for each output of a linear layer or row of an embedding: ``w = scale * q``
with q in -127..127. Weights of products are stored (in, out), whichever way torch has them, since
that is what an integer product reads; the backward pass reads the same numbers with transB.

Inference quantizes the activations as well, each row by its own largest number, and multiplies
integers. Training multiplies by the float32 weights that the integers stand for: exact gradients of
the quantized base. Those weights exist while they are used; the backward pass makes them anew, with
an explicit zero point, without which ONNX Runtime would see the same computation and keep the first
result, all weights in float32.

Approximate training (`TrainPrecision`) multiplies integers too: in the backward pass alone, or in
both. The gradient of rows is ``(dy * scale) @ Q.T`` with the same integers, which QGemm turns while
it reads them. The head, whose rounding the loss sees undiluted, is left as it is in exact training,
and so is everything that is not a product.

With a precision of "int4" the weights of products are in `fedlora.export.four_bits`, the tables of
embeddings are int8.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from fedlora.export.emitter import Emitter
from fedlora.export.four_bits import BLOCK, packed_blocks, product_of_blocks, rows_of_blocks
from fedlora.export.onnx_graph import MICROSOFT
from fedlora.export.traced import packet_name

__all__ = ["is_quantized", "looked_up", "product"]

LARGEST = 127
SMALLEST = 1 << 12  # numbers of a weight that is worth it
# What may be between a head's product and the loss: shapes, and the sum with LoRA's part.
PASSING = {
    "_log_softmax", "_to_copy", "_unsafe_view", "add", "alias", "clone", "detach", "expand",
    "index", "log_softmax", "mul", "slice", "squeeze", "unsqueeze", "view",
}  # fmt: skip
TINY = 1e-30  # instead of the largest number of a row of zeros


def is_quantized(e: Emitter, node: fx.Node) -> bool:
    """Return whether a node is a weight that is stored in fewer bits, of a product or a table.

    A table that is a head too (tied embeddings) stays float32: it would be needed both ways, and
    the logits are what its rounding would hurt.
    """
    return e.precision != "fp32" and _can_be_quantized(e, node)


def product(
    e: Emitter,
    rows: fx.Node,
    weight: fx.Node,
    turned: int,
    bias: fx.Node | None = None,
    *,
    beta: float = 1.0,
) -> str | None:
    """``rows @ W + beta * bias`` for a quantized W; turned: ``rows @ W.T``.

    None: this product is one of float32 weights as they are.
    """
    if not _can_be_quantized(e, weight):
        return None
    # By the weight as it is stored, (in, out), in a forward pass; its transposition in a backward
    # one.
    forward = bool(turned) != _is_conv1d(e, weight)
    in_integers = _in_integers(e, weight, forward)
    if not in_integers and e.precision == "fp32":
        return None
    x = e.value(rows)
    if in_integers:
        result = _integer_product(e, x, weight, forward)
    elif e.precision == "int4":
        result = product_of_blocks(e, x, _stored_blocks(e, weight), forward)
    elif forward:
        # Not MatMul or Gemm: after DequantizeLinear ONNX Runtime (1.31) turns those into a product
        # that rounds the activations too, and keeps a copy of the weights for it.
        whole = e.call("DequantizeLinear", *_stored(e, weight), axis=1)
        result = e.call("FusedMatMul", x, whole, domain=MICROSOFT)
    else:
        quantized, scale = _stored(e, weight)
        zero = _zeros_after(e, x, e.weights.array(scale).size)
        whole = e.call("DequantizeLinear", quantized, scale, zero, axis=1)
        result = e.call("Gemm", x, whole, transB=1)
    if bias is None:
        return result
    added = e.value(bias)
    if beta != 1.0:
        added = e.call("Mul", added, e.tensor(beta, torch.float32))
    return e.call("Add", result, added)


def _in_integers(e: Emitter, weight: fx.Node, forward: bool) -> bool:
    """Whether a product rounds the rows as well and multiplies integers."""
    if not e.training:
        return forward and e.precision == "int8"
    wanted = e.train_precision == "int8" or (e.train_precision == "int8-backward" and not forward)
    return wanted and _stored_name(e, weight) not in e.cached("heads", _heads)


def _integer_product(e: Emitter, x: str, weight: fx.Node, forward: bool) -> str:
    """``x @ W``, or ``x @ W.T`` for a gradient, each row x in 255 steps of its own size.

    ONNX Runtime rounds all rows by one scale (DynamicQuantizeMatMul). Rows differ in size by orders
    of magnitude, those of gradients above all, so each is divided by its largest number first.
    """
    quantized, scale = _stored(e, weight)
    if not forward:
        x = e.call("Mul", x, scale)
    largest = e.call("ReduceMax", e.call("Abs", x), e.graph.axes(-1), keepdims=1)
    largest = e.call("Max", largest, e.tensor(TINY, torch.float32))
    rows = e.call("Div", x, largest)
    if forward:
        result = e.call("DynamicQuantizeMatMul", rows, quantized, scale, domain=MICROSOFT)
    else:
        numbers, step, zero = e.graph.call_many("DynamicQuantizeLinear", rows, outputs=3)
        one, none = e.graph.constant(1, np.float32), e.graph.constant(0, np.int8)
        inputs = (numbers, step, zero, quantized, one, none)
        result = e.call("QGemm", *inputs, domain=MICROSOFT, transB=1)
    return e.call("Mul", result, largest)


def _zeros_after(e: Emitter, x: str, count: int) -> str:
    """Zeros, int8 (count,), known when the rows x are: whether a number is less than itself."""
    first = e.call("Slice", x, e.graph.axes(0, 0), e.graph.axes(1, 1), e.graph.axes(0, 1))
    zero = e.cast(e.call("Less", first, first), torch.bool, torch.int8)
    return e.call("Expand", e.call("Reshape", zero, e.graph.axes(1)), e.graph.axes(count))


def looked_up(e: Emitter, weight: fx.Node, ids: str, ids_rank: int) -> str:
    """Rows (*ids, size) of a quantized table, in float32."""
    is_head = not _is_table(e, weight)  # whose rows the loss looks up
    if is_head and e.precision == "int4":
        return rows_of_blocks(e, _stored_blocks(e, weight), ids, ids_rank)
    quantized, scale = _stored(e, weight)
    rows = e.call("Gather", quantized, ids, axis=int(is_head))
    if is_head:
        rows = e.call("Transpose", rows, perm=[*range(1, ids_rank + 1), 0])
    scales = e.call("Unsqueeze", e.call("Gather", scale, ids, axis=0), e.graph.axes(-1))
    return e.call("Mul", e.cast(rows, torch.int8, torch.float32), scales)


def _stored(e: Emitter, weight: fx.Node) -> tuple[str, str]:
    """Names of a weight's integers, (in, out) or (rows, size) of a table, and of their scales."""
    name = _stored_name(e, weight)
    quantized, scale = f"{name}.int8", f"{name}.scale"
    if quantized not in e.weights:
        array = e.weights.array(name)
        numbers, scales = _rounded(array.T if _is_conv1d(e, weight) else array)
        e.weights.add(quantized, numbers if _is_table(e, weight) else numbers.T)
        e.weights.add(scale, scales)
    return e.weight(quantized), e.weight(scale)


def _stored_blocks(e: Emitter, weight: fx.Node) -> str:
    """Name of a weight that is stored in blocks of 4 bits."""
    name = _stored_name(e, weight)
    if f"{name}.int4" not in e.weights:
        array = e.weights.array(name)
        packed, scales = packed_blocks(array.T if _is_conv1d(e, weight) else array)
        e.weights.add(f"{name}.int4", packed)
        e.weights.add(f"{name}.int4.scale", scales)
        # The same bytes in the shape that looking up rows asks for.
        e.weights.add(f"{name}.int4.scales", scales[..., None])
    return name


def _stored_name(e: Emitter, weight: fx.Node) -> str:
    return e.weights.name_of(e.traced.weights[str(weight.target)])


def _is_table(e: Emitter, weight: fx.Node) -> bool:
    return _stored_name(e, weight) in e.cached("uses", _uses)[0]


def _is_conv1d(e: Emitter, weight: fx.Node) -> bool:
    """Whether a weight is (in, out), as transformers' Conv1D has it, not (out, in)."""
    return _stored_name(e, weight) in e.cached("conv1d", _conv1d)


def _rounded(
    rows: npt.NDArray[np.generic],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Round each row to multiples of its largest number / 127; rows of zeros have the scale 1."""
    scales = np.abs(rows).max(1).astype(np.float32) / np.float32(LARGEST)
    scales[scales == 0] = 1
    numbers = np.rint(rows / scales[:, None]).clip(-LARGEST, LARGEST).astype(np.int8)
    return numbers, scales


def _can_be_quantized(e: Emitter, node: fx.Node) -> bool:
    """Whether a node is a weight of at least two axes and worth it, and not a table and a head."""
    if node.op != "get_attr":
        return False
    name = e.traced.weights.get(str(node.target))
    if name is None:
        return False
    array = e.weights.array(name)
    if array.ndim != 2 or array.size < SMALLEST or array.dtype != np.float32:
        return False
    tables, factors = e.cached("uses", _uses)
    stored = _stored_name(e, node)
    if (stored in tables) == (stored in factors):
        return False
    inputs = array.shape[0 if _is_conv1d(e, node) else 1]
    return e.precision != "int4" or stored in tables or inputs % BLOCK == 0


def _uses(e: Emitter) -> tuple[set[str], set[str]]:
    """The names of the weights that embeddings look up, and of those in products."""
    tables: set[str] = set()
    factors: set[str] = set()
    for node in e.traced.module.graph.nodes:
        if node.op != "get_attr" or str(node.target) not in e.traced.weights:
            continue
        name = e.weights.name_of(e.traced.weights[str(node.target)])
        for user in node.users:
            is_table = packet_name(user) == "embedding" and user.args[0] is node
            (tables if is_table else factors).add(name)
    return tables, factors


def _conv1d(e: Emitter) -> set[str]:
    """The names of the weights (in, out): of products with a bias, without a transposition."""
    found = set()
    for node in e.traced.module.graph.nodes:
        if node.op == "call_function" and packet_name(node) == "addmm":
            weight = node.args[2]
            if weight.op == "get_attr" and str(weight.target) in e.traced.weights:
                found.add(_stored_name(e, weight))
    return found


def _heads(e: Emitter) -> set[str]:
    """The names of the weights whose products are logits: in what a loss takes logarithms of."""
    found: set[str] = set()
    graph = e.traced.module.graph
    waiting = [n for n in graph.nodes if packet_name(n) in ("_log_softmax", "log_softmax")]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if packet_name(node) in ("mm", "addmm"):
            matrix = node.args[-1]
            while matrix.op == "call_function":  # a transposition
                matrix = matrix.args[0]
            if matrix.op == "get_attr" and str(matrix.target) in e.traced.weights:
                found.add(_stored_name(e, matrix))
            continue
        if packet_name(node) in PASSING:
            before = [one for one in node.all_input_nodes if one not in seen]
            seen.update(before)
            waiting += before
    return found
