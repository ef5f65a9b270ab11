"""safetensors files (https://huggingface.co/docs/safetensors): a strict reader, a canonical writer.

A file is eight bytes with the length of the header, the header (JSON: name -> dtype, shape and
byte range), and one buffer. The reader trusts none of it: sizes are bounded before anything is
allocated, and the ranges must tile the buffer without overlap or hole. The writer gives the same
bytes for the same tensors.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fedlora.errors import FormatError
from fedlora.formats.strict_json import parse_json, shown

__all__ = ["TensorFile", "dump_tensors", "parse_tensors", "read_bytes", "read_tensors"]

MAX_FILE_BYTES = 1 << 32
MAX_HEADER_BYTES = 1 << 20  # about 9,000 tensors; parsed in well under 0.1 s
MAX_DIMENSIONS = 8
MAX_SIZE = 1 << 40  # of one dimension; the byte range bounds their product
_WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1", "U8": "u1"}
_NAMES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16",
          np.dtype(np.int8): "I8", np.dtype(np.uint8): "U8"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies in the buffer."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A checked file: every entry lies inside `data`."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data: bytes | memoryview

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return a read-only float32, float16, int8 or uint8 array; bfloat16 becomes float32.

        Raises `FormatError` for another dtype.
        """
        entry = self.entries[name]
        if entry.dtype not in _NUMPY:
            raise FormatError(
                f"tensor {name!r}: expected dtype {', '.join(_NUMPY)}, found {entry.dtype}"
            )
        count = math.prod(entry.shape)
        flat = np.frombuffer(self.data, _NUMPY[entry.dtype], count, entry.begin)
        if entry.dtype == "BF16":  # the upper half of a float32
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(entry.shape)


def read_tensors(path: Path) -> TensorFile:
    """Read and check a file. Raises `FormatError`."""
    with _opened(path, MAX_FILE_BYTES) as (file, size):
        return _read(file.read, size, str(path))


def parse_tensors(data: bytes, where: str = "safetensors") -> TensorFile:
    """Check a file that is in memory, of which the tensors are views. Raises `FormatError`."""
    view, done = memoryview(data).toreadonly(), 0

    def read(size: int) -> memoryview:
        nonlocal done
        done += size
        return view[done - size : done]

    return _read(read, len(data), where)


def dump_tensors(
    tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the bytes of a file with float32, float16, int8 and uint8 tensors.

    Tensors stand in order of falling width, so that each is aligned, then of name.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    parts: list[bytes] = []
    begin = 0
    for name, array in ordered:
        part = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
        shape, end = list(array.shape), begin + len(part)
        dtype = _NAMES[array.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        parts.append(part)
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def read_bytes(path: Path, limit: int) -> bytes:
    """Return a regular file of at most `limit` bytes. Raises `FormatError`."""
    with _opened(path, limit) as (file, size):
        return file.read(size)  # a larger number would be allocated first


@contextlib.contextmanager
def _opened(path: Path, limit: int) -> Iterator[tuple[IO[bytes], int]]:
    try:
        # Asked before it is opened, since opening a pipe waits for a writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FormatError(f"{path}: expected a file, found a folder or device")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise FormatError(f"{path}: expected at most {limit:,} bytes, found {size:,}")
            yield file, size
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read(read: Callable[[int], bytes | memoryview], size: int, where: str) -> TensorFile:
    length = int.from_bytes(read(8), "little")
    if size < 8 or not 2 <= length <= size - 8:
        raise FormatError(
            f"{where}: expected a safetensors file, found {size:,} bytes of which the first eight "
            f"claim a header of {length:,}; the file is cut off or of another format"
        )
    if length > MAX_HEADER_BYTES:
        raise FormatError(
            f"{where}: expected a header of at most {MAX_HEADER_BYTES:,} bytes, found {length:,}"
        )
    header = parse_json(bytes(read(length)), f"{where}, header", max_depth=None)
    if not isinstance(header, dict):
        raise FormatError(f"{where}, header: expected an object, found {type(header).__name__}")
    metadata = _metadata(header.pop("__metadata__", {}), where)
    entries = {name: _entry(name, fields, where) for name, fields in header.items()}
    _check_tiling(entries, size - 8 - length, where)
    data = read(size - 8 - length)
    if len(data) != size - 8 - length:
        raise FormatError(f"{where}: the file changed while it was read; read it again")
    return TensorFile(entries, metadata, data)


def _metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError(f"{where}, header: expected __metadata__ that maps text to text")
    return value


def _entry(name: str, fields: Any, where: str) -> Entry:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(
            f"{where}, tensor {name[:200]!r}: expected dtype, shape and data_offsets, "
            f"found {shown(fields)}"
        )
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _WIDTHS:
        raise FormatError(
            f"{where}, tensor {name[:200]!r}: expected a known dtype, found {shown(dtype)}"
        )
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise FormatError(
            f"{where}, tensor {name[:200]!r}: expected a shape of at most {MAX_DIMENSIONS} whole "
            f"numbers from 0 to 2**40, found {shown(shape)}"
        )
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise FormatError(
            f"{where}, tensor {name[:200]!r}: expected data_offsets [begin, end], "
            f"found {shown(offsets)}"
        )
    expected = math.prod(shape) * _WIDTHS[dtype]  # Python's integers do not overflow
    if offsets[1] - offsets[0] != expected:
        raise FormatError(
            f"{where}, tensor {name[:200]!r}: expected {expected:,} bytes for {dtype} "
            f"{shown(shape)}, found data_offsets {offsets}"
        )
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size <= MAX_SIZE for size in value
    )


def _check_tiling(entries: Mapping[str, Entry], size: int, where: str) -> None:
    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != reached:
            raise FormatError(
                f"{where}, tensor {name[:200]!r}: expected it to begin at byte {reached:,}, "
                f"where the one before it ends, found {entry.begin:,}"
            )
        reached = entry.end
    if reached != size:
        raise FormatError(
            f"{where}: expected {reached:,} bytes of tensors, found {size:,}; "
            "the file is cut off or something is appended"
        )
