"""The walk over a traced graph: values by node, sizes, stored weights, and the table of handlers.

Handlers of aten operations are in the modules ``ops_*``, which register themselves by `handles`;
`fedlora.export.emit` imports them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeAlias, TypeVar

import numpy.typing as npt
import sympy  # type: ignore[import-untyped]  # torch depends on it
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx

from fedlora.device.manifest import Precision, TrainPrecision
from fedlora.errors import UnsupportedError
from fedlora.export.free_sizes import (
    fixed_symbol,
    free_sizes,
    near_weights,
    nearest_input,
    ordered,
)
from fedlora.export.onnx_graph import OnnxGraph, Size
from fedlora.export.simplify import Simplified, simplify
from fedlora.export.traced import Traced, bound, packet_name
from fedlora.export.weights import BaseWeights

__all__ = ["Emitter", "Handler", "handles", "onnx_type"]

_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}

Handler: TypeAlias = Callable[["Emitter", fx.Node, SimpleNamespace], str | tuple[str, ...]]
Found = TypeVar("Found")
HANDLERS: dict[str, Handler] = {}  # by the name of the aten operation, without an overload


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register what turns calls of aten operations into ONNX nodes.

    A handler is given the emitter, the node and its arguments by the names of the schema, defaults
    included; it returns the name of its result, or a tuple of them.
    """

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class Emitter:
    """The state of one translation: which FX node became which ONNX value."""

    def __init__(
        self,
        traced: Traced,
        weights: BaseWeights,
        precision: Precision,
        training: bool,
        train_precision: TrainPrecision,
    ) -> None:
        self.traced, self.weights = traced, weights
        self.precision, self.training = precision, training
        self.train_precision = train_precision
        self.graph = OnnxGraph()
        self.stored: dict[str, None] = {}  # names of weights that were read, in order
        self.simple: Simplified = simplify(traced)
        self.values: dict[fx.Node, str | tuple[str, ...]] = {}
        self.sources = free_sizes(traced)
        self._current: fx.Node | None = None
        self._found: dict[str, Any] = {}

    # The walk.

    def run(self) -> list[str]:
        """Translate the whole graph; return the names of the outputs' values."""
        placeholders = iter(self.traced.inputs)
        for node in self.simple.graph.nodes:
            self._current = node
            if node.op == "placeholder":
                self._set(node, next(placeholders))
            elif node in self.simple.constants:
                self._set(node, self.constant(self.simple.constants[node]))
            elif node.op == "call_function" and isinstance(
                node.meta.get("val"), Tensor | tuple | list
            ):
                self._set(node, self._translated(node))
            elif node.op == "output":
                return [self.value(result) for result in node.args[0]]
        raise UnsupportedError("export: the traced graph has no output")

    def _translated(self, node: fx.Node) -> str | tuple[str, ...]:
        if node.target is operator.getitem:
            of, place = node.args
            return self.values[of][place]  # type: ignore[index]
        name = packet_name(node)
        handler = HANDLERS.get(name)
        if handler is None:
            raise self.unsupported(f"operator aten.{name}")
        return handler(self, node, bound(node))

    def _set(self, node: fx.Node, value: str | tuple[str, ...]) -> None:
        self.values[node] = value
        if isinstance(value, str) and isinstance(node.meta.get("val"), Tensor):
            self.graph.shapes.setdefault(value, self.shape(node))

    def unsupported(self, what: str) -> UnsupportedError:
        """Build the error for something that cannot be translated, and say near which weights."""
        node = self._current
        near = "" if node is None else near_weights(node, self.traced)
        return UnsupportedError(
            f"export{near}: {what} has no translation to ONNX; "
            "write that part of the model with other operations, or ask for it to be added"
        )

    # Values.

    def value(self, node: Any) -> str:
        """Return the name of a node's value; a weight is asked for when it is first read."""
        if node.op == "get_attr" and node not in self.values:
            self._set(node, self.weight(self.traced.weights[str(node.target)]))
        value = self.values[node]
        assert isinstance(value, str)
        return value

    def constant(self, tensor: Tensor) -> str:
        """Return the name of an inline constant."""
        return self.graph.constant(tensor.detach().contiguous().numpy())

    def tensor(self, argument: Any, dtype: torch.dtype) -> str:
        """Return an argument (a node, a number or a size) as a value of this dtype."""
        if isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), Tensor):
            return self.cast(self.value(argument), argument.meta["val"].dtype, dtype)
        if isinstance(argument, int | float):
            return self.graph.constant(argument, _numpy_type(dtype))
        size = self.size(argument)
        if isinstance(size, int) or not isinstance(size, sympy.Basic):
            return self.graph.constant(size, _numpy_type(dtype))
        scalar = self.call("Squeeze", self.size_tensor(size))
        return self.cast(scalar, torch.int64, dtype)

    def cast(self, name: str, found: torch.dtype, wanted: torch.dtype) -> str:
        """Return a value in another dtype."""
        if found == wanted:
            return name
        result = self.call("Cast", name, to=onnx_type(wanted))
        if name in self.graph.shapes:
            self.graph.shapes[result] = self.graph.shapes[name]
        return result

    def cached(self, name: str, find: Callable[[Emitter], Found]) -> Found:
        """Return what a function finds out about the whole graph, asking it once."""
        if name not in self._found:
            self._found[name] = find(self)
        found: Found = self._found[name]
        return found

    def weight(self, name: str) -> str:
        """Return the name of a base's tensor as it is stored."""
        name = self.weights.name_of(name)
        self.stored[name] = None
        return name

    def call(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add an ONNX node with one output."""
        return self.graph.call(op, *inputs, **attributes)

    # Sizes.

    def size(self, value: Any) -> Size:
        """Return an int or a symbolic expression for a size of the trace."""
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        if isinstance(value, torch.SymInt):
            expression = value.node.expr
            value = int(expression) if expression.is_Integer else expression
        if isinstance(value, int) and not isinstance(value, bool):
            return fixed_symbol(value) if fixed_symbol(value) in self.sources else value
        return value

    def shape(self, node: Any) -> tuple[Size, ...]:
        """Return the shape of a node's tensor, sizes as `size` gives them."""
        return tuple(self.size(size) for size in node.meta["val"].shape)

    def size_tensor(self, size: Size) -> str:
        """Return a size as an int64 (1,) tensor."""
        if isinstance(size, int) or getattr(size, "is_Integer", False):
            return self.graph.axes(int(size))
        if isinstance(size, sympy.Symbol):
            name, axis = self._source(size)
            return self.call("Shape", name, start=axis, end=axis + 1)
        kind = type(size).__name__
        op = {"Add": "Add", "Mul": "Mul", "Max": "Max", "Min": "Min"}.get(kind)
        if op is not None:
            first, *rest = (self.size_tensor(part) for part in ordered(size))
            for part in rest:
                first = self.call(op, first, part)
            return first
        op = {"FloorDiv": "Div", "CleanDiv": "Div", "PythonMod": "Mod", "Mod": "Mod"}.get(kind)
        if op is not None:  # of sizes, which are not negative
            return self.call(op, *(self.size_tensor(part) for part in size.args))
        raise self.unsupported(f"the size {size}")

    def _source(self, symbol: sympy.Symbol) -> tuple[str, int]:
        """Where a free size can be read: an input's name and axis.

        Adapters may have other ranks in other layers, though the trace had one for all: the input
        that the current node is computed from, or with, is the right one.
        """
        if symbol not in self.sources:
            raise self.unsupported(f"a size that is no input's ({symbol})")
        places = self.sources[symbol]
        if len(places) == 1 or not all(name in self.traced.defaults for name in places):
            return next(iter(places.items()))
        assert self._current is not None
        inputs = [node for node in self.simple.graph.nodes if node.op == "placeholder"]
        name = nearest_input(
            self._current,
            dict(zip(inputs, self.traced.inputs, strict=True)),
            set(places),
        )
        if name is None:
            raise self.unsupported("a size that is the rank of several layers")
        return name, places[name]

    def reshape(self, name: str, shape: Any) -> str:
        """Return a value in another shape."""
        return self.graph.reshape(name, shape, self.size_tensor)

    def shape_tensor(self, shape: Any) -> str:
        """Return a shape as an int64 tensor."""
        return self.graph.shape_tensor(shape, self.size_tensor)


def onnx_type(dtype: torch.dtype) -> int:
    """Return ONNX's number of a torch dtype."""
    if dtype not in _TYPES:
        raise UnsupportedError(
            f"export: expected float32, integers or booleans, found {dtype}; "
            "load the base as float32"
        )
    return int(_TYPES[dtype])


def _numpy_type(dtype: torch.dtype) -> npt.DTypeLike:
    return helper.tensor_dtype_to_np_dtype(onnx_type(dtype))


# The model around the nodes.
