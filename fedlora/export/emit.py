"""From a traced graph of aten operations to an ONNX model, written node by node.

Weights of the base stay in torch's layout and outside the model, in the bundle's base.onnx.data: a
product with a transposed weight is a ``Gemm`` with transB, its backward pass a ``MatMul`` with the
same tensor, and so no graph holds or makes a transposed copy.

Shapes: a size is fixed, or free. A free size is either symbolic in the trace or, where tracing
fixed it (the rank, in a train graph), a number that no other axis has; both are computed from the
inputs' shapes while the model runs.
"""

from __future__ import annotations

import onnx
from onnx import helper, numpy_helper

from fedlora.device.manifest import Precision, TrainPrecision
from fedlora.errors import UnsupportedError
from fedlora.export import ops_index, ops_linear, ops_math, ops_shape  # noqa: F401 - they register
from fedlora.export.emitter import Emitter, onnx_type
from fedlora.export.onnx_graph import MICROSOFT, Size
from fedlora.export.traced import Traced
from fedlora.export.weights import BaseWeights

__all__ = ["OPSET", "emit"]

OPSET, IR_VERSION = 21, 10  # of ONNX 1.16; what every ONNX Runtime since 1.18 reads


def emit(
    traced: Traced,
    weights: BaseWeights,
    *,
    precision: Precision = "fp32",
    required_factors: bool = False,
    training: bool | None = None,
    train_precision: TrainPrecision = "exact",
) -> onnx.ModelProto:
    """Turn a traced function into an ONNX model; the same trace gives the same bytes.

    Inputs and outputs have the names of `traced`. Inputs with a default are optional (a graph input
    and an initializer of one name), unless `required_factors`, for runtimes that do not take that.
    Weights point into the file that `weights` writes. With a precision of "int8" or "int4" those of
    linear layers and embeddings are quantized, see `fedlora.export.quantized`; `training` says
    which of the two forms that module has is wanted (None: training where an output is a gradient),
    and `train_precision` which products of training may be approximate.

    Raises `UnsupportedError`, which names the operation, for one that has no translation here.
    """
    if precision == "int4" and train_precision != "exact":
        raise UnsupportedError(
            f"export: expected exact training on an int4 base, found {train_precision!r}; "
            "approximate training multiplies int8 weights: use int8"
        )
    if training is None:
        training = any(name.endswith(".grad") for name in traced.outputs)
    emitter = Emitter(traced, weights, precision, training, train_precision)
    results = emitter.run()
    graph = emitter.graph
    ends = dict.fromkeys(results)
    nodes, used = graph.reachable(list(ends))
    nodes, outputs = _with_outputs(nodes, results, emitter)
    defaults = [] if required_factors else _defaults(traced)
    constants = [tensor for name, tensor in graph.constants.items() if name in used]
    # Only now, since whatever asks for an initializer has its numbers written to the file.
    stored = [weights.initializer(name) for name in emitter.stored if name in used]
    made = helper.make_graph(
        nodes, "fedlora", _inputs(traced), outputs, [*stored, *constants, *defaults]
    )
    domains = sorted({node.domain for node in nodes} | {""})
    opsets = [helper.make_opsetid(name, OPSET if name == "" else 1) for name in domains]
    assert set(domains) <= {"", MICROSOFT}
    return helper.make_model(
        made, opset_imports=opsets, ir_version=IR_VERSION, producer_name="fedlora"
    )


def _inputs(traced: Traced) -> list[onnx.ValueInfoProto]:
    made = []
    for name in traced.inputs:
        tensor, axes = traced.examples[name], traced.axes.get(name, {})
        # Optional inputs of several layers may differ in rank though the axis has one name, and
        # ONNX Runtime reuses memory where it takes two sizes for equal: the input's name is added.
        own = f" of {name}" if name in traced.defaults else ""
        shape = [
            f"{axes[axis]}{own}" if axis in axes else size for axis, size in enumerate(tensor.shape)
        ]
        made.append(helper.make_tensor_value_info(name, onnx_type(tensor.dtype), shape))
    return made


def _defaults(traced: Traced) -> list[onnx.TensorProto]:
    return [
        numpy_helper.from_array(tensor.detach().contiguous().numpy(), name)
        for name, tensor in traced.defaults.items()
    ]


def _with_outputs(
    nodes: list[onnx.NodeProto], results: list[str], e: Emitter
) -> tuple[list[onnx.NodeProto], list[onnx.ValueInfoProto]]:
    """Give the results their names; one that is an input or named twice is copied."""
    traced = e.traced
    made = {name for node in nodes for name in node.output}
    renamed: dict[str, str] = {}
    copies = []
    for name, result in zip(traced.outputs, results, strict=True):
        if result in made and result not in renamed:
            renamed[result] = name
        else:
            copies.append((name, result))
    named = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [renamed.get(name, name) for name in node.input]
        copy.output[:] = [renamed.get(name, name) for name in node.output]
        named.append(copy)
    for name, result in copies:
        named.append(helper.make_node("Identity", [renamed.get(result, result)], [name]))
    output = next(node for node in traced.module.graph.nodes if node.op == "output")
    infos = [
        helper.make_tensor_value_info(
            name, onnx_type(node.meta["val"].dtype), [_named(size, e) for size in e.shape(node)]
        )
        for name, node in zip(traced.outputs, output.args[0], strict=True)
    ]
    return named, infos


def _named(size: Size, e: Emitter) -> int | str | None:
    """A fixed size, the name of a free axis, or None: free, and not the size of one input."""
    if isinstance(size, int):
        return size
    for name, axis in e.sources.get(size, {}).items():
        if name not in e.traced.defaults:
            return e.traced.axes.get(name, {}).get(axis)
    return None
