"""One flat buffer in a message: its array, the record that describes it, and their checks.

Both sides prepare a `BufferForm` once for all the buffers of a layout. What is left for a buffer is
one copy and one SHA-256. Flower's own encoder and reader go through `numpy.save` and `numpy.load`:
the reader parses a header that the sender wrote, and allocates what it asks for. The header of what
we expect is known, so here it is only compared.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedlora.adapter import Adapter, Array
from fedlora.errors import FederationError, ShapeMismatchError
from fedlora.federation.layout import parse_segments, require_same_segments
from fedlora.flat import Segment

__all__ = [
    "LAYOUT_KEYS",
    "BufferForm",
    "FixedList",
    "describe",
    "read_array",
    "read_layout",
    "require_segments",
]

# What describes a buffer, each with its type; those of LAYOUT_LISTS are lists of it.
LAYOUT_ORDER: Mapping[str, type] = {
    "segments": str, "kinds": str, "scalings": float, "base": str, "round": int, "digest": str,
}  # fmt: skip
LAYOUT_LISTS = frozenset({"segments", "kinds", "scalings"})
LAYOUT_KEYS = frozenset(LAYOUT_ORDER)


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
    """What is the same in all buffers of one layout."""

    segments: tuple[Segment, ...]
    texts: tuple[str, ...]  # of the segments
    size: int  # numbers
    header: bytes  # of the .npy format, before the numbers
    _hashed: Any  # SHA-256 over the texts

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> BufferForm:
        """Return the form of buffers with these factors."""
        texts = tuple(map(str, segments))
        size = sum(segment.size for segment in segments)
        hashed = hashlib.sha256("\n".join(texts).encode())
        return cls(tuple(segments), texts, size, _array_header(size), hashed)

    def array(self, row: Array) -> FlowerArray:
        """Return a copy of `row`, ``(size,)`` float32, as Flower's array of immutable bytes.

        Raises `ShapeMismatchError` for any other shape or type.
        """
        if row.shape != (self.size,) or row.dtype != np.float32:
            raise ShapeMismatchError(
                f"expected a row of ({self.size},) float32, found {row.shape} {row.dtype}"
            )
        numbers = np.ascontiguousarray(row, dtype="<f4").data
        data = b"".join((self.header, numbers))
        return FlowerArray("float32", (self.size,), "numpy.ndarray", data)

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
    return ConfigRecord(
        {
            "segments": FixedList(form.texts),
            "kinds": FixedList(str(layer.kind) for layer in layers),
            "scalings": FixedList(layer.scaling for layer in layers),
            "base": adapter.base or "",
            "round": round,
        }
    )


def read_layout(content: RecordDict, name: str, who: str) -> Mapping[str, Any]:
    """Return a layout's record with every key there and of its type.

    Raises `FederationError`, which opens with `who`.
    """
    record = content.get(name)
    if not isinstance(record, ConfigRecord) or set(record) != LAYOUT_KEYS:
        raise FederationError(f"{who}: expected a record {name!r} with {', '.join(LAYOUT_ORDER)}")
    for key, kind in LAYOUT_ORDER.items():
        value = record[key]
        items = value if isinstance(value, list) and key in LAYOUT_LISTS else [value]
        if isinstance(value, list) != (key in LAYOUT_LISTS) or not all(
            type(item) is kind for item in items
        ):
            raise FederationError(f"{who}: {name}.{key} is not of type {kind.__name__}")
    return record


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
    array, size = record["factors"], form.size
    if tuple(array.shape) != (size,) or array.dtype != "float32":
        raise ShapeMismatchError(
            f"{who}: expected a buffer of ({size},) float32, found {tuple(array.shape)[:8]} "
            f"{array.dtype[:20]}"
        )
    data: bytes = array.data
    right = type(data) is bytes and data.startswith(form.header)
    if not right or len(data) != len(form.header) + 4 * size:
        raise FederationError(f"{who}: the buffer's bytes are not {size} float32 numbers")
    if layout["digest"] != form.digest(data):
        raise FederationError(f"{who}: the factors are not those that their digest was made of")
    return data


@functools.cache
def _array_header(size: int) -> bytes:
    stream = io.BytesIO()
    description = {"descr": "<f4", "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()
