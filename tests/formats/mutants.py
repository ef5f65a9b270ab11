"""Damaged and hostile adapter files, made from sound ones by a seeded generator.

A quarter each: bytes of the header; values and offsets in its JSON; truncation and extension; and
mutants with a meaning (a key twice, NaN, sizes of 2**60, A and B swapped, keys of other tools).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from fedlora.formats.codecs import CODECS
from fedlora.formats.packed import encode_packed
from fedlora.formats.peft import encode_peft
from tests.formats.adapters import small_adapter

Generator = np.random.Generator
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**60, 2**63, 2**64, 10**30, 0.5, -0.0, 1e-320,
    1e308, "", "x", "lora_A.weight", "\0", "\ud800", "💥", [], {}, [[]], [0], [2**60, 2**60],
    {"": {}}, [1] * 50, "a" * 5000, "(a+)+$", "(" * 50, "all-linear", "LOHA", "F64", "I8",
)  # fmt: skip
TOKENS = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"[" * 3000, b"9" * 5000, b'"\\ud800"',
    b"\xff\xfe", b"{}", b"null", b'{"a":1,"a":2}', b"-0", b"0x1", b"\xef\xbb\xbf",
)  # fmt: skip
FOREIGN = ("lora_alfa", "r", "network_dim", "ss_network_alpha", "peft_type", "version", "sha256",
           "__metadata__", "codec", "use_dora", "scales", "format", "base", "bias")  # fmt: skip


def packed_seeds() -> list[bytes]:
    variants = ("lora", "dora", "rslora", "rsdora")
    return [encode_packed(small_adapter(v), c) for v, c in zip(variants, CODECS, strict=True)]


def peft_seeds() -> list[tuple[bytes, bytes]]:
    return [encode_peft(small_adapter(variant)) for variant in ("lora", "dora", "rslora")]


def mutate_packed(data: bytes, kind: int, rng: Generator) -> bytes:
    header, body = _split(data)
    if kind == 0:
        return _joined(_flip(header, rng), body, rng)
    if kind == 2:
        return _resize(data, rng)
    change = _change_values if kind == 1 else _change_meaning
    return _joined(_with_metadata(header, change, rng), body, rng)


def mutate_peft(seed: tuple[bytes, bytes], kind: int, rng: Generator) -> tuple[bytes, bytes]:
    config, weights = seed
    if rng.random() < 0.5:
        header, body = _split(weights)
        if kind == 2:
            return config, _resize(weights, rng)
        if kind == 0:
            return config, _joined(_flip(header, rng), body, rng)
        change = _change_values if kind == 1 else _change_meaning
        return config, _joined(_with_metadata(header, change, rng), body, rng)
    if kind == 0:
        return _flip(config, rng), weights
    if kind == 2:
        return _resize(config, rng), weights
    return (_change_values if kind == 1 else _change_meaning)(config, rng), weights


def _split(data: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def _joined(header: bytes, body: bytes, rng: Generator) -> bytes:
    if rng.random() < 0.2 and body:
        old = hashlib.sha256(body).hexdigest().encode()
        body = _flip(body, rng) if rng.random() < 0.5 else body[:-4] + b"\xff" * 4  # NaN
        if rng.random() < 0.7:  # a digest that is right does not make the tensors so
            header = header.replace(old, hashlib.sha256(body).hexdigest().encode())
    length = len(header)
    if rng.random() < 0.1:
        length = int(rng.choice([0, 1, length - 1, length + 1, 100 << 20, 2**62, 2**63]))
    return length.to_bytes(8, "little") + header + body


def _flip(data: bytes, rng: Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        changed[int(rng.integers(len(changed)))] = int(rng.integers(256))
    return bytes(changed)


def _resize(data: bytes, rng: Generator) -> bytes:
    if rng.random() < 0.5:
        return data[: int(rng.integers(len(data)))]
    cut = int(rng.integers(len(data) + 1))
    junk = bytes(rng.integers(0, 256, int(rng.integers(1, 200)), np.uint8))
    return data[:cut] + junk + data[cut:] if rng.random() < 0.5 else data + data[:cut]


def _with_metadata(header: bytes, change: Callable[..., bytes], rng: Generator) -> bytes:
    """Change the header, or the JSON of fedlora that stands in its metadata as text."""
    value = json.loads(header)
    if "__metadata__" not in value or rng.random() < 0.5:
        return change(header, rng)
    changed = change(value["__metadata__"]["fedlora"].encode(), rng)
    value["__metadata__"]["fedlora"] = changed.decode("utf-8", "replace")
    return json.dumps(value).encode()


def _change_values(data: bytes, rng: Generator) -> bytes:
    value = json.loads(data)
    for _ in range(int(rng.integers(1, 3))):
        holder, key = _place(value, rng)
        old = holder[key]
        if type(old) is int and rng.random() < 0.5:  # sizes and offsets: near misses
            holder[key] = old + int(rng.integers(-9, 10))
        else:
            holder[key] = _value(rng)
    return json.dumps(value, ensure_ascii=bool(rng.random() < 0.5)).encode("utf-8", "replace")


def _change_meaning(data: bytes, rng: Generator) -> bytes:
    value = json.loads(data)
    holder, key = _place(value, rng)
    action = int(rng.integers(7))
    if action == 0:  # a token that JSON lacks, or that is too much
        holder[key] = "@@"
        token = TOKENS[int(rng.integers(len(TOKENS)))]
        return json.dumps(value).encode().replace(b'"@@"', token)
    if action == 1 and isinstance(holder, dict):  # the same key twice
        text = json.dumps({key: holder[key]})[1:-1]
        holder["@@"] = 0
        return json.dumps(value).encode().replace(b'"@@": 0', text.encode())
    if action == 2:
        holder[key] = [2**60, 2**60] if isinstance(holder[key], list) else 2**60
    elif action == 3:  # A and B swapped
        text = json.dumps(value).replace("lora_A", "@@").replace("lora_B", "lora_A")
        return text.replace("@@", "lora_B").encode()
    elif action == 4 and isinstance(holder, dict):
        foreign = FOREIGN[int(rng.integers(len(FOREIGN)))]
        holder[foreign] = _value(rng)
    elif action == 5:
        holder.pop(key)
    else:  # two values change places
        other, its_key = _place(value, rng)
        holder[key], other[its_key] = other[its_key], holder[key]
    try:
        return json.dumps(value).encode()
    except ValueError:  # a value within itself
        return b"[" * 100


def _value(rng: Generator) -> Any:
    return copy.deepcopy(VALUES[int(rng.integers(len(VALUES)))])


def _place(value: Any, rng: Generator) -> tuple[Any, Any]:
    """Return a container of the JSON value and a key in it."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[int(rng.integers(len(keys)))]
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.2:
            return value, key
        value = inner
