"""Where an ONNX graph keeps its weights: just enough of protobuf to find its external data.

ONNX Runtime opens whatever file a graph names. So a graph is read here first, without the package
onnx, which a device does not have: every tensor in it, wherever one can be, must hold its numbers
itself, except the initializers of the main graph, which may name a part of one known file.

Field numbers are those of onnx.proto (ONNX IR version 13). Repeated and split messages are read as
protobuf merges them, and what protobuf would skip silently, as a known field of another wire type,
is refused: what is read here must be what ONNX Runtime sees.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlora.errors import FormatError

__all__ = [
    "ExternalWeight", "external_weights", "integer_factors", "keeping_outputs", "with_inputs",
]  # fmt: skip

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_DEPTH = 64  # of messages in messages; protobuf itself stops at 100

# Of each message, the fields that lead to tensors: number → message.
_LEADS: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto", 6: "GraphProto", 10: "TensorProto", 11: "GraphProto",
        22: "SparseTensorProto", 23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
}  # fmt: skip
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL_DATA, _LOCATION = 1, 2, 8, 13, 14  # of TensorProto
_DTYPES = {
    1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64,
    9: np.bool_, 10: np.float16, 11: np.float64, 12: np.uint32, 13: np.uint64,
}  # fmt: skip  # TensorProto.DataType
_ONNX_TYPES: dict[np.dtype[np.generic], int] = {np.dtype(t): n for n, t in _DTYPES.items()}
# ONNX Runtime's products of integers: operator → which input is the matrix.
_INTEGER_PRODUCTS = {"DynamicQuantizeMatMul": 1, "QGemm": 3}

_Field = tuple[int, int, int, memoryview]  # number, wire type, its value if a number, else bytes
_NOTHING = memoryview(b"")


@dataclass(frozen=True, slots=True)
class ExternalWeight:
    """An initializer whose numbers are in the data file."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    offset: int  # bytes

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.generic]:
        """Return the weight as a view of the data file's bytes."""
        return data[self.offset : self.offset + self.num_bytes].view(self.dtype).reshape(self.shape)


def external_weights(
    model: bytes, *, location: str, num_bytes: int, where: str
) -> tuple[ExternalWeight, ...]:
    """Return the initializers of a serialized ModelProto that lie in the file `location`.

    num_bytes: the size of that file, which every weight must be within. Raises `FormatError` on
    anything else that is not in the model itself, and on what is not a model.
    """
    found: dict[str, ExternalWeight] = {}
    for number, wire, _, body in _fields(memoryview(model), where):
        if number == 7:
            _main_graph(_message(body, wire, where), found, location, num_bytes, where)
        elif number in _LEADS["ModelProto"]:
            _refuse_external(
                _message(body, wire, where), _LEADS["ModelProto"][number], where, depth=1
            )
    return tuple(found.values())


def keeping_outputs(model: bytes, outputs: Collection[str], *, where: str) -> bytes:
    """Return a serialized ModelProto whose graph has some of its outputs, and what they need.

    ONNX Runtime 1.31 leaves out nothing by itself: it runs a node whose result nobody reads, also
    with `only_execute_path_to_fetches`. Raises `FormatError` on what is not a model.
    """
    parts = []
    for number, wire, value, body in _fields(memoryview(model), where):
        if number == 7:
            body = memoryview(_cut_graph(_message(body, wire, where), set(outputs), where))
        parts.append(_written(number, wire, value, body, where))
    return b"".join(parts)


def _cut_graph(graph: memoryview, needed: set[str], where: str) -> bytes:
    """`needed`: names of values, to which those are added that they are computed from."""
    kept = []
    fields = list(_fields(graph, where))
    outputs = frozenset(needed)
    for field in reversed(fields):  # a graph's nodes stand behind what they read
        number, wire, _, body = field
        if number == 12 and _value_name(field, where) not in outputs:
            continue
        if number == 1:
            made = _texts(_message(body, wire, where), 2, where)
            if needed.isdisjoint(made):
                continue
            needed |= _read_names(body, where, depth=2)
        kept.append(_written(*field, where))
    return b"".join(reversed(kept))


def _read_names(node: memoryview, where: str, depth: int) -> set[str]:
    """Return what a node reads, and the nodes of graphs inside it."""
    if depth > MAX_DEPTH:
        raise FormatError(f"{where}: expected at most {MAX_DEPTH} messages in one another")
    names = set(_texts(node, 1, where))
    for number, wire, _, attribute in _fields(node, where):
        if number != 5:
            continue
        for kind, kind_wire, _, graph in _fields(_message(attribute, wire, where), where):
            if kind not in (6, 11):
                continue
            for inner, inner_wire, _, body in _fields(_message(graph, kind_wire, where), where):
                if inner == 1:
                    names |= _read_names(_message(body, inner_wire, where), where, depth + 3)
                elif inner == 12:  # it may hand on a value of the graph around it
                    names |= set(_texts(_message(body, inner_wire, where), 1, where))
    return names


def integer_factors(model: bytes, *, where: str) -> frozenset[str]:
    """Return the names of values that products of integers read as their matrix, and nothing else.

    Raises `FormatError` on what is not a model.
    """
    factors: set[str] = set()
    others: set[str] = set()
    for number, wire, _, body in _fields(memoryview(model), where):
        if number != 7:
            continue
        for kind, kind_wire, _, node in _fields(_message(body, wire, where), where):
            if kind != 1:
                continue
            node = _message(node, kind_wire, where)
            place = _INTEGER_PRODUCTS.get(next(iter(_texts(node, 4, where)), ""))
            if place is None:
                others |= _read_names(node, where, depth=2)
                continue
            for index, name in enumerate(_texts(node, 1, where)):
                (factors if index == place else others).add(name)
    return frozenset(factors - others)


def with_inputs(model: bytes, weights: Iterable[ExternalWeight], *, where: str) -> bytes:
    """Return a serialized ModelProto that may be given these initializers as inputs.

    They are then defaults and no constants, of which ONNX Runtime prepares no copies. Raises
    `FormatError` on what is not a model.
    """
    inputs = b"".join(_record(11, _value_info(weight)) for weight in weights)
    parts = []
    for number, wire, value, body in _fields(memoryview(model), where):
        if number == 7:
            body = memoryview(bytes(_message(body, wire, where)) + inputs)
        parts.append(_written(number, wire, value, body, where))
    return b"".join(parts)


def _value_info(weight: ExternalWeight) -> bytes:
    """Return a ValueInfoProto: name, and type with its tensor's elements and shape."""
    sizes = (_varint_bytes(1 << 3) + _varint_bytes(size) for size in weight.shape)
    shape = b"".join(_record(1, size) for size in sizes)
    elements = _varint_bytes(1 << 3) + _varint_bytes(_ONNX_TYPES[weight.dtype])
    tensor = elements + _record(2, shape)
    return _record(1, weight.name.encode()) + _record(2, _record(1, tensor))


def _record(number: int, data: bytes) -> bytes:
    return _varint_bytes(number << 3 | BYTES) + _varint_bytes(len(data)) + data


def _texts(message: memoryview, wanted: int, where: str) -> list[str]:
    return [
        _text(_message(body, wire, where), where)
        for number, wire, _, body in _fields(message, where)
        if number == wanted
    ]


def _value_name(field: _Field, where: str) -> str:
    """Return the name in a ValueInfoProto."""
    return next(iter(_texts(_message(field[3], field[1], where), 1, where)), "")


def _written(number: int, wire: int, value: int, body: memoryview, where: str) -> bytes:
    """Return a field as protobuf writes it; models and graphs have none of fixed width."""
    tag = _varint_bytes(number << 3 | wire)
    if wire == VARINT:
        return tag + _varint_bytes(value)
    return _record(number, bytes(_message(body, wire, where)))


def _varint_bytes(value: int) -> bytes:
    digits = bytearray()
    while value >= 128:
        digits.append(value & 127 | 128)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def _main_graph(
    graph: memoryview,
    found: dict[str, ExternalWeight],
    location: str,
    num_bytes: int,
    where: str,
) -> None:
    for number, wire, _, body in _fields(graph, where):
        if number == 5:
            weight = _initializer(_message(body, wire, where), location, num_bytes, where)
            if weight is not None and found.setdefault(weight.name, weight) is not weight:
                raise FormatError(f"{where}: expected initializer {weight.name[:80]!r} once")
        elif number in _LEADS["GraphProto"]:
            _refuse_external(
                _message(body, wire, where), _LEADS["GraphProto"][number], where, depth=2
            )


def _refuse_external(message: memoryview, kind: str, where: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise FormatError(f"{where}: expected at most {MAX_DEPTH} messages in one another")
    leads = _LEADS.get(kind, {})
    for number, wire, value, body in _fields(message, where):
        if number in leads:
            _refuse_external(_message(body, wire, where), leads[number], where, depth + 1)
        elif kind == "TensorProto" and (
            number == _EXTERNAL_DATA or (number == _LOCATION and (wire != VARINT or value))
        ):
            raise FormatError(
                f"{where}: expected weights in another file for the main graph's initializers "
                "only, found them for a tensor inside a node, a function or a sparse tensor"
            )


def _initializer(
    tensor: memoryview, location: str, num_bytes: int, where: str
) -> ExternalWeight | None:
    name, kind, external = "", 0, False
    dims: list[int] = []
    about: list[tuple[str, str]] = []
    for number, wire, value, body in _fields(tensor, where):
        if number == _DIMS:
            dims += [value] if wire == VARINT else _packed(_message(body, wire, where), where)
        elif number == _DATA_TYPE:
            kind = _number(value, wire, where)
        elif number == _NAME:
            name = _text(_message(body, wire, where), where)
        elif number == _EXTERNAL_DATA:
            about.append(_pair(_message(body, wire, where), where))
        elif number == _LOCATION:
            external |= _number(value, wire, where) != 0
    if not external and not about:
        return None
    what = f"{where}: initializer {name[:80]!r}"
    record = dict(about)
    if len(record) != len(about) or record.keys() != {"location", "offset", "length"}:
        raise FormatError(
            f"{what}: expected a location, an offset and a length of its external data, found "
            f"{', '.join(sorted(key[:20] for key, _ in about)) or 'none'}"
        )
    if record["location"] != location or not external:
        raise FormatError(
            f"{what}: expected its numbers in {location}, found {record['location'][:80]!r}; "
            "no other file is opened for a bundle"
        )
    if kind not in _DTYPES:
        raise FormatError(f"{what}: expected a type of plain numbers, found ONNX type {kind}")
    weight = ExternalWeight(name, np.dtype(_DTYPES[kind]), tuple(dims), _size(record["offset"]))
    length = _size(record["length"])
    inside = 0 <= weight.offset <= weight.offset + length <= num_bytes
    if not inside or any(not 0 <= size < 1 << 40 for size in dims) or weight.num_bytes != length:
        raise FormatError(
            f"{what}: expected {weight.dtype} {weight.shape} within the {num_bytes:,} bytes of "
            f"{location}, found offset {record['offset'][:20]} and length {record['length'][:20]}"
        )
    return weight


def _fields(message: memoryview, where: str) -> Iterator[_Field]:
    """Yield the fields of a message: (number, wire type, number or 0, bytes or none)."""
    at, end = 0, len(message)
    while at < end:
        tag = message[at]
        at += 1
        if tag >= 128:
            tag, at = _varint(message, at - 1, where)
        number, wire = tag >> 3, tag & 7
        if number == 0 or tag >> 32:
            raise _damaged(where)
        if wire == BYTES:
            if at >= end:
                raise _damaged(where)
            size = message[at]
            at += 1
            if size >= 128:
                size, at = _varint(message, at - 1, where)
            if size > end - at:
                raise _damaged(where)
            yield number, wire, 0, message[at : at + size]
            at += size
        elif wire == VARINT:
            value, at = _varint(message, at, where)
            yield number, wire, value, _NOTHING
        elif wire in (FIXED32, FIXED64):
            at += 4 if wire == FIXED32 else 8
            if at > end:
                raise _damaged(where)
            yield number, wire, 0, _NOTHING
        else:  # groups, which ONNX has none of
            raise _damaged(where)


def _varint(message: memoryview, at: int, where: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, at
    raise _damaged(where)


def _packed(message: memoryview, where: str) -> list[int]:
    values, at = [], 0
    while at < len(message):
        value, at = _varint(message, at, where)
        values.append(value)
    return values


def _message(body: memoryview, wire: int, where: str) -> memoryview:
    if wire != BYTES:
        raise _damaged(where)
    return body


def _number(value: int, wire: int, where: str) -> int:
    if wire != VARINT:
        raise _damaged(where)
    return value


def _pair(entry: memoryview, where: str) -> tuple[str, str]:
    texts = {1: "", 2: ""}
    for number, wire, _, body in _fields(entry, where):
        if number in texts:
            texts[number] = _text(_message(body, wire, where), where)
    return texts[1], texts[2]


def _text(body: memoryview, where: str) -> str:
    try:
        return str(body, "utf-8")
    except UnicodeDecodeError:
        raise _damaged(where) from None


def _size(text: str) -> int:
    """Return a size that is written in digits, -1 for anything else: it fits nowhere."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -1


def _damaged(where: str) -> FormatError:
    return FormatError(f"{where}: expected an ONNX model, found something else or a part of one")
