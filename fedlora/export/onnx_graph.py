"""Building the nodes of an ONNX graph: every distinct computation once, reshapes merged.

Names are numbers in the order of creation, so that the same calls make the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

__all__ = ["MICROSOFT", "OnnxGraph", "Size"]

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
Size: TypeAlias = Any  # an int, or a sympy expression of symbolic sizes
_Key: TypeAlias = tuple[Any, ...]


class OnnxGraph:
    """Nodes and inline constants of a graph in the making; values are known by their names.

    What is asked for a second time is returned, not computed again: none of the operations draws
    random numbers. `shapes` holds what is known of a value's shape, which reshaping asks for.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.shapes: dict[str, tuple[Size, ...]] = {}
        self._numbers: dict[str, npt.NDArray[np.generic]] = {}
        self._found: dict[_Key, tuple[str, ...]] = {}
        self._made_by: dict[str, onnx.NodeProto] = {}

    def call(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output and return the output's name; "" is an input left out."""
        return self.call_many(op, *inputs, outputs=1, domain=domain, **attributes)[0]

    def call_many(
        self, op: str, *inputs: str, outputs: int, domain: str = "", **attributes: Any
    ) -> tuple[str, ...]:
        """Add a node with several outputs and return their names."""
        key = (op, domain, inputs, outputs, repr(sorted(attributes.items())))
        if key not in self._found:
            names = tuple(
                f"{op}_{len(self.nodes)}" + (f".{k}" if k else "") for k in range(outputs)
            )
            node = helper.make_node(op, list(inputs), list(names), domain=domain, **attributes)
            self.nodes.append(node)
            self._found[key] = names
            self._made_by.update(dict.fromkeys(names, node))
        return self._found[key]

    def constant(self, array: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> str:
        """Return the name of a constant that is written into the graph's own file."""
        numbers = np.array(array, dtype, order="C")
        key = ("constant", numbers.dtype.str, numbers.shape, numbers.tobytes())
        if key not in self._found:
            name = f"constant_{len(self.constants)}"
            self.constants[name] = numpy_helper.from_array(numbers, name)
            self.shapes[name] = numbers.shape
            self._numbers[name] = numbers
            self._found[key] = (name,)
        return self._found[key][0]

    def value_of(self, name: str) -> npt.NDArray[np.generic] | None:
        """Return the numbers of a constant, None for any other value."""
        return self._numbers.get(name)

    def maker_of(self, name: str) -> onnx.NodeProto | None:
        """Return the node that computes a value, None for inputs, weights and constants."""
        return self._made_by.get(name)

    def axes(self, *axes: int) -> str:
        """Return a constant list of axes (or sizes): int64 (n,)."""
        return self.constant(axes, np.int64)

    def transpose(self, name: str, order: Sequence[int]) -> str:
        """Return a value with its axes in another order; two in a row become one, or none."""
        order = list(order)
        made = self._made_by.get(name)
        if made is not None and made.op_type == "Transpose":
            before = list(made.attribute[0].ints)
            name, order = made.input[0], [before[axis] for axis in order]
        if order == sorted(order):
            return name
        result = self.call("Transpose", name, perm=order)
        if name in self.shapes:
            self.shapes[result] = tuple(self.shapes[name][axis] for axis in order)
        return result

    def reshape(self, name: str, shape: Sequence[Size], size_of: Any) -> str:
        """Return a value in another shape; several in a row become one, or none.

        shape: of the result, without -1. size_of: called with a symbolic size, returns the name of
        an int64 (1,) tensor with its value.
        """
        shape = tuple(shape)
        while (made := self._made_by.get(name)) is not None and made.op_type == "Reshape":
            if made.input[0] not in self.shapes:
                break
            name = made.input[0]
        before = self.shapes.get(name)
        if before == shape:
            return name
        result = self.call("Reshape", name, self._reshaping(shape, before or (), size_of))
        self.shapes[result] = shape
        return result

    def _reshaping(self, shape: tuple[Size, ...], before: tuple[Size, ...], size_of: Any) -> str:
        """The second input of Reshape, a constant where at all possible.

        Reshape copies a size from the same place (0), and infers one (-1).
        """
        sizes: list[int | None] = [size if isinstance(size, int) else None for size in shape]
        for place, size in enumerate(shape):
            if sizes[place] is None and place < len(before) and before[place] == size:
                sizes[place] = 0
        if sizes.count(None) == 1:
            sizes[sizes.index(None)] = -1
        if None in sizes:
            return self.shape_tensor(shape, size_of)
        return self.constant([size or 0 for size in sizes], np.int64)

    def shape_tensor(self, shape: Sequence[Size], size_of: Any) -> str:
        """Return a shape as an int64 (n,) tensor, a constant where it has no symbolic size."""
        if all(isinstance(size, int) for size in shape):
            return self.constant(list(shape), np.int64)
        parts: list[str] = []
        run: list[int] = []  # of fixed sizes
        for size in shape:
            if isinstance(size, int):
                run.append(size)
                continue
            if run:
                parts.append(self.constant(run, np.int64))
                run = []
            parts.append(size_of(size))
        if run:
            parts.append(self.constant(run, np.int64))
        return parts[0] if len(parts) == 1 else self.call("Concat", *parts, axis=0)

    def reachable(self, outputs: Sequence[str]) -> tuple[list[onnx.NodeProto], set[str]]:
        """Return the nodes that the outputs need, in order, and the names of all they read."""
        wanted, kept = set(outputs), []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                kept.append(node)
                wanted.update(node.input)
        return kept[::-1], wanted
