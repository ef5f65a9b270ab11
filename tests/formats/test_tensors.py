"""The safetensors reader against hostile headers, and against the safetensors library."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from fedlora.errors import FormatError
from fedlora.formats.tensors import dump_tensors, parse_tensors, read_bytes, read_tensors
from tests.matching import raises

DTYPES = (np.float32, np.float16, np.int8, np.uint8)


def file_of(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(shape=(2,), offsets=(0, 8), dtype="F32") -> dict:
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=4),
    dtype=st.sampled_from(DTYPES),
)
def test_reader_and_writer_agree_with_the_library(shapes, dtype):
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.integers(0, 9, s).astype(dtype) for i, s in enumerate(shapes)}
    for data in (dump_tensors(tensors, {"key": "ü"}), save(tensors, {"key": "ü"})):
        ours, theirs = parse_tensors(data), load(data)
        assert ours.metadata == {"key": "ü"}
        assert ours.entries.keys() == theirs.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(ours.array(name), tensor)
            np.testing.assert_array_equal(theirs[name], tensor)
            assert ours.array(name).dtype == theirs[name].dtype == dtype


def test_bfloat16_is_the_upper_half_of_a_float32():
    bits = np.array([0x3F80, 0xC000, 0x7F7F, 0x0001], np.uint16)
    file = parse_tensors(file_of(one((4,), (0, 8), "BF16"), bits.tobytes()))
    expected = [1.0, -2.0, 3.3895314e38, 9.1835e-41]
    np.testing.assert_array_equal(file.array("a"), np.array(expected, np.float32))


def test_tensors_are_aligned_and_their_order_does_not_change_the_bytes():
    tensors = {"a": np.zeros(3, np.int8), "b": np.ones(2, np.float32), "c": np.ones(1, np.float16)}
    data = dump_tensors(tensors)
    assert data == dump_tensors(dict(reversed(tensors.items())))
    entries = parse_tensors(data).entries
    assert [(name, entries[name].begin) for name in "bca"] == [("b", 0), ("c", 8), ("a", 10)]
    assert int.from_bytes(data[:8], "little") % 8 == 0


HOSTILE = {
    "empty": (b"", "found 0 bytes"),
    "short": (b"\0" * 7, "found 7 bytes"),
    "claims 100 MB": (file_of(one(), length=100 << 20), "claim a header of 104,857,600"),
    "claims 2**64 - 1": (file_of(one(), length=2**64 - 1), "claim a header of 18,446,744"),
    "header over the limit": (file_of(b" " * (2 << 20)), "at most 1,048,576 bytes"),
    "no JSON": (file_of(b"{]"), "expected JSON"),
    "no UTF-8": (file_of(b'{"\xff":1}'), "expected UTF-8"),
    "half a surrogate pair": (file_of(b'{"\\ud800":1}'), "expected UTF-8"),
    "a list": (file_of([]), "expected an object, found list"),
    "duplicate key": (file_of(b'{"a":1,"a":2}'), "the key 'a' twice"),
    "NaN": (file_of(b'{"a":NaN}'), "NaN, which is no JSON number"),
    "infinity": (file_of(b'{"a":-Infinity}'), "-Infinity, which is no JSON number"),
    "deep lists": (file_of(b"[" * 20_000), "few levels of nesting"),
    "deep objects": (file_of(b'{"a":' * 10_000), "few levels of nesting"),
    "very deep": (file_of(b"[" * 500_000), "at most 20,000 lists, found 500,000"),
    "long integer": (file_of(b'{"a":' + b"9" * 5000 + b"}"), "expected JSON"),
    "many keys": (
        file_of(b"{" + b",".join(b'"%d":0' % i for i in range(80_000)) + b"}"),
        "at most 45,000 keys, found 80,000",
    ),
    "keys up to the limit": (
        file_of(b"{" + b",".join(b'"%d":0' % i for i in range(45_000)) + b"}"),
        "tensor '0'",
    ),
    "many numbers": (file_of(b'{"a":[' + b"1," * 500_000 + b"1]}"), "60,000 values, found 500"),
    "numbers up to the limit": (file_of(b'{"a":[' + b"1," * 60_000 + b"1]}"), "tensor 'a'"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "maps text to text"),
    "metadata in a list": (file_of({"__metadata__": []}), "maps text to text"),
    "tensor is a number": (file_of({"a": 1}), "expected dtype, shape and data_offsets, found 1"),
    "extra field": (file_of({"a": {**one()["a"], "b": 1}}), "expected dtype, shape"),
    "unknown dtype": (file_of(one(dtype="F31"), b"\0" * 8), "known dtype, found 'F31'"),
    "dtype is a list": (file_of(one(dtype=[])), "known dtype"),
    "negative size": (file_of(one((-2, -1))), "found [-2, -1]"),
    "fraction": (file_of(one((2.0,))), "found [2.0]"),
    "true": (file_of(one((True,))), "found [True]"),
    "2**60": (file_of(one((2**60,))), "2**40, found [1152921504606846976]"),
    "product of 2**120": (file_of(one((2**40,) * 3)), "expected 5,316,911,983,139,663,491"),
    "product of 2**64": (file_of(one((2**32, 2**32), (0, 0))), "found data_offsets [0, 0]"),
    "many dimensions": (file_of(one((1,) * 9)), "at most 8 whole numbers"),
    "one offset": (file_of(one(offsets=(0,))), "expected data_offsets [begin, end]"),
    "offsets backwards": (file_of(one(offsets=(8, 0)), b"\0" * 8), "found data_offsets [8, 0]"),
    "negative offset": (file_of(one(offsets=(-8, 0))), "expected data_offsets"),
    "wrong length": (file_of(one((3,)), b"\0" * 8), "expected 12 bytes for F32 [3]"),
    "beyond the end": (file_of(one(), b"\0" * 7), "expected 8 bytes of tensors, found 7"),
    "appended": (file_of(one(), b"\0" * 9), "expected 8 bytes of tensors, found 9"),
    "hole": (file_of(one(offsets=(4, 12)), b"\0" * 12), "begin at byte 0"),
    "overlap": (
        file_of({**one(), "b": one(offsets=(4, 12))["a"]}, b"\0" * 12),
        "tensor 'b': expected it to begin at byte 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "text"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_file_is_refused_in_time(data, text):
    before = time.thread_time()
    with raises(FormatError, "safetensors", text):
        parse_tensors(data)
    assert time.thread_time() - before < 0.1


def test_unreadable_dtype_is_refused_when_it_is_asked_for():
    file = parse_tensors(file_of(one((1,), (0, 8), "F64"), b"\0" * 8))
    with raises(FormatError, "tensor 'a': expected dtype F32, F16, BF16, I8, U8, found F64"):
        file.array("a")


def test_pipe_and_folder_and_missing_file_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with raises(FormatError, "expected a file, found a folder or device"):
            read_tensors(tmp_path / name)
    with raises(FormatError, "cannot be read: No such file or directory"):
        read_tensors(tmp_path / "missing")


def test_size_is_bounded_before_anything_is_read(tmp_path):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate((1 << 32) + 1)  # sparse: takes no room on the disk
    before = time.thread_time()
    with raises(FormatError, "expected at most 4,294,967,296 bytes, found 4,294,967,297"):
        read_tensors(path)
    with raises(FormatError, "expected at most 10 bytes"):
        read_bytes(path, 10)
    assert time.thread_time() - before < 0.1
