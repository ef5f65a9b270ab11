"""One flat buffer in a message: its array, the record that describes it, and their checks.

Both sides prepare a `BufferForm` once for all the buffers of a layout. What is left for a buffer is
one copy and one SHA-256. Flower's own encoder and reader go through `numpy.save` and `numpy.load`:
the reader parses a header that the sender wrote, and allocates what it asks for. The header of what
we expect is known, so here it is only compared.

A buffer is float32 numbers, or the bytes that a codec makes of them (`fedlora.federation.codecs`);
its layout then says which, in "codec". Every check is the same for both.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedlora.adapter import Adapter, Array
from fedlora.errors import FederationError, ShapeMismatchError
from fedlora.federation.codecs import FP32, Codec, RowCodec
from fedlora.federation.layout import parse_segments, require_same_segments
from fedlora.flat import Segment

__all__ = [
    "BufferForm",
    "FixedList",
    "array_header",
    "codec_of",
    "describe",
    "read_array",
    "read_layout",
    "require_segments",
]

# What describes a buffer, each with its type; those of LAYOUT_LISTS are lists of it. "codec" stands
# there only where it is not fp32.
LAYOUT_ORDER: Mapping[str, type] = {
    "segments": str, "kinds": str, "scalings": float, "base": str, "round": int, "digest": str,
}  # fmt: skip
LAYOUT_LISTS = frozenset({"segments", "kinds", "scalings"})
CODEC = "codec"
LAYOUT_KEYS = frozenset(LAYOUT_ORDER)
LAYOUT_KEYS_CODED = LAYOUT_KEYS | {CODEC}


class FixedList(list[Any]):
    """A list that many records share, so that it refuses to be changed; a copy is a plain list."""

    def _refuse(self, *args: Any, **options: Any) -> Any:
        raise TypeError("this list is shared by all messages of a round; change list(it) instead")

    append = extend = insert = pop = remove = clear = sort = reverse = _refuse
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


@dataclass(frozen=True, slots=True, eq=False)
class BufferForm:
    """What is the same in all buffers of one layout and codec."""

    segments: tuple[Segment, ...]
    texts: tuple[str, ...]  # of the segments
    size: int  # numbers
    dtype: str  # of the array: "float32", and "uint8" with a codec
    length: int  # of the array
    num_bytes: int  # of the array, its header with it
    header: bytes  # of the .npy format, before the array's numbers
    _hashed: Any  # SHA-256 over the texts, and the codec
    _coded: RowCodec | None = None  # None: fp32

    @classmethod
    def of(cls, segments: Sequence[Segment], codec: Codec = FP32) -> BufferForm:
        """Return the form of buffers with these factors."""
        texts = tuple(map(str, segments))
        size = sum(segment.size for segment in segments)
        if codec == FP32:
            hashed = hashlib.sha256("\n".join(texts).encode())
            header = array_header(size, "<f4")
            total = len(header) + 4 * size
            return cls(tuple(segments), texts, size, "float32", size, total, header, hashed)
        coded = RowCodec(segments, codec)
        length = coded.num_bytes
        header = array_header(length, "|u1")
        hashed = hashlib.sha256("\n".join((*texts, codec)).encode())
        total = len(header) + length
        return cls(tuple(segments), texts, size, "uint8", length, total, header, hashed, coded)

    @property
    def codec(self) -> Codec:
        """How the numbers stand in the array."""
        return FP32 if self._coded is None else self._coded.codec

    @property
    def keys(self) -> frozenset[str]:
        """The keys of the record beside a buffer."""
        return LAYOUT_KEYS if self._coded is None else LAYOUT_KEYS_CODED

    def array(self, row: Array, draws: np.random.Generator | None = None) -> FlowerArray:
        """Return a copy of `row`, ``(size,)`` float32, as Flower's array of immutable bytes.

        draws: for the rounding of the codec.

        Raises `ShapeMismatchError` for any other shape or type, and what `RowCodec.encode` raises.
        """
        if row.shape != (self.size,) or row.dtype != np.float32:
            raise ShapeMismatchError(
                f"expected a row of ({self.size},) float32, found {row.shape} {row.dtype}"
            )
        if self._coded is None:
            numbers = np.ascontiguousarray(row, dtype="<f4").data
            data = b"".join((self.header, numbers))
        else:
            data = self.header + self._coded.encode(row, draws)
        return FlowerArray(self.dtype, (self.length,), "numpy.ndarray", data)

    def row(self, data: bytes) -> Array:
        """Return the row, ``(size,)`` float32, of an array's `data`, as `read_array` returns it.

        Raises `FormatError` for bytes that no encoder of this codec makes. It does not look at the
        numbers themselves.
        """
        if self._coded is None:
            return np.frombuffer(data, np.float32, offset=len(self.header))
        return self._coded.decode(memoryview(data)[len(self.header) :])

    @property
    def fp32_surplus(self) -> int:
        """The bytes that an array and its record would have more in fp32, as Flower counts them."""
        if self._coded is None:
            return 0
        plain = len(array_header(self.size, "<f4")) + 4 * self.size
        return plain - self.num_bytes - len(CODEC) - len(self.codec)

    def digest(self, data: bytes) -> str:
        """Return the SHA-256 over the layout's texts and the numbers of an array's `data`."""
        hashed = self._hashed.copy()
        hashed.update(memoryview(data)[len(self.header) :])
        return str(hashed.hexdigest())


def describe(adapter: Adapter, form: BufferForm, round: int) -> ConfigRecord:
    """Return the record beside a buffer with factors of `adapter`; its digest is still missing.

    Its copies share its lists, which nobody can change.
    """
    layers = adapter.layers.values()
    record = ConfigRecord(
        {
            "segments": FixedList(form.texts),
            "kinds": FixedList(str(layer.kind) for layer in layers),
            "scalings": FixedList(layer.scaling for layer in layers),
            "base": adapter.base or "",
            "round": round,
        }
    )
    if form.codec != FP32:
        record[CODEC] = form.codec
    return record


def read_layout(content: RecordDict, name: str, who: str) -> Mapping[str, Any]:
    """Return a layout's record with every key there and of its type.

    Raises `FederationError`, which opens with `who`.
    """
    record = content.get(name)
    if not isinstance(record, ConfigRecord) or set(record) - {CODEC} != LAYOUT_KEYS:
        raise FederationError(f"{who}: expected a record {name!r} with {', '.join(LAYOUT_ORDER)}")
    for key, kind in LAYOUT_ORDER.items():
        value = record[key]
        items = value if isinstance(value, list) and key in LAYOUT_LISTS else [value]
        if isinstance(value, list) != (key in LAYOUT_LISTS) or not all(
            type(item) is kind for item in items
        ):
            raise FederationError(f"{who}: {name}.{key} is not of type {kind.__name__}")
    codec_of(record, who)
    return record


def codec_of(layout: Mapping[str, Any], who: str) -> Codec:
    """Return the codec that a layout's record names. Raises `FederationError` for an unknown one.

    fp32 is named by no record, so that there is one way of saying it.
    """
    if CODEC not in layout:
        return FP32
    named = layout[CODEC]
    for codec in get_args(Codec):
        if named == codec != FP32 and type(named) is str:
            return cast(Codec, codec)
    raise FederationError(f"{who}: codec {str(named)[:20]!r} is not one of fp16, int8 or int4")


def require_segments(layout: Mapping[str, Any], form: BufferForm, who: str) -> None:
    """Raise an error that names the first layer in which `layout` is not that of `form`."""
    if tuple(layout["segments"]) != form.texts:
        require_same_segments(form.segments, parse_segments(layout["segments"], who), who)


def read_array(
    content: RecordDict, name: str, layout: Mapping[str, Any], form: BufferForm, who: str
) -> bytes:
    """Return the bytes of the one array in record `name`: the form's header, then its numbers.

    Raises `ShapeMismatchError` and `FederationError`, which open with `who`: another record, size,
    type, header or digest.
    """
    record = content.get(name)
    if not isinstance(record, ArrayRecord) or list(record.keys()) != ["factors"]:
        raise FederationError(f"{who}: expected one array 'factors', found something else")
    array, length = record["factors"], form.length
    if tuple(array.shape) != (length,) or array.dtype != form.dtype:
        raise ShapeMismatchError(
            f"{who}: expected a buffer of ({length},) {form.dtype}, found "
            f"{tuple(array.shape)[:8]} {array.dtype[:20]}"
        )
    data: bytes = array.data
    right = type(data) is bytes and data.startswith(form.header)
    if not right or len(data) != form.num_bytes:
        raise FederationError(f"{who}: the buffer's bytes are not {length} {form.dtype} numbers")
    if layout["digest"] != form.digest(data):
        raise FederationError(f"{who}: the factors are not those that their digest was made of")
    return data


@functools.cache
def array_header(size: int, kind: str) -> bytes:
    """Return what opens an array of `size` numbers of a kind ("<f4") in NumPy's format."""
    stream = io.BytesIO()
    description = {"descr": kind, "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()
