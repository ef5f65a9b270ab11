"""The packed file: a whole adapter in one ``.safetensors`` file, for delivery.

Tensors are ``PATH.lora_A.weight``, ``PATH.lora_B.weight`` and, for DoRA,
``PATH.lora_magnitude_vector``; int8 and int4 add ``scales``, float32: of each layer in turn (paths
sorted) those of A's rows, then those of B's columns. int4 factors are (rank, ceil(n / 2)), A by
rows and B by columns. The one metadata key, ``fedlora``, is canonical JSON. The same adapter gives
the same bytes.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlora.adapter import Adapter, Array, LoraConfig, LoraLayer
from fedlora.errors import (
    ConfigError,
    DigestMismatchError,
    FedloraError,
    FormatError,
)
from fedlora.files import write_atomic
from fedlora.formats.codecs import (
    CODECS,
    dequantize,
    dtype_of,
    pack_nibbles,
    quantize,
    to_half,
    unpack_nibbles,
)
from fedlora.formats.stranger_config import MAX_PATH, build_config, is_module_path
from fedlora.formats.strict_json import canonical_json, is_label, parse_json, shown
from fedlora.formats.tensors import TensorFile, dump_tensors, parse_tensors, read_tensors

__all__ = [
    "PackedFile",
    "config_from_json",
    "config_to_json",
    "decode_packed",
    "encode_packed",
    "read_packed",
    "write_packed",
]

VERSION = 1
_KEYS = {"version", "config", "base", "tokenizer", "sha256", "codec", "layers", "provenance"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LAYER_KEYS = {"kind", "A", "B", "scaling"}


@dataclass(frozen=True, slots=True)
class PackedFile:
    """What a packed file holds."""

    adapter: Adapter
    codec: str
    tokenizer: str | None  # SHA-256 of the tokenizer's file
    provenance: Mapping[str, Any]


def write_packed(
    adapter: Adapter,
    path: Path,
    *,
    codec: str = "fp32",
    tokenizer: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a file atomically; see `encode_packed`. What could not be read is not written."""
    data = encode_packed(adapter, codec, tokenizer, provenance)
    decode_packed(parse_tensors(data, str(path)), str(path))
    write_atomic(path, data)


def read_packed(path: Path) -> PackedFile:
    """Read and check a file. Raises `FormatError`, `DigestMismatchError` and `AdapterError`."""
    return decode_packed(read_tensors(path), str(path))


def encode_packed(
    adapter: Adapter,
    codec: str = "fp32",
    tokenizer: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> bytes:
    """Return the file's bytes.

    Raises `ConfigError` for an unknown codec, `NonFiniteError` when a number is too large for it,
    and `FormatError` for a provenance that is not JSON.
    """
    if codec not in CODECS:
        raise ConfigError(f"codec: expected one of {', '.join(CODECS)}, found {codec!r}")
    tensors: dict[str, npt.NDArray[Any]] = {}
    scales: list[Array] = []
    for path, layer in adapter.layers.items():
        for part, factor in (("A", layer.A), ("B", layer.B)):
            what = f"layer {path!r}, {part}"
            tensors[f"{path}.lora_{part}.weight"], found = _encode(factor, part, codec, what)
            scales.extend(found)
        if layer.magnitude is not None:
            half = codec == "fp16"
            what = f"layer {path!r}, magnitude"
            magnitude = to_half(layer.magnitude, what) if half else layer.magnitude
            tensors[f"{path}.lora_magnitude_vector"] = magnitude
    if scales:
        tensors["scales"] = np.concatenate(scales)
    body = dump_tensors(tensors)
    data = body[8 + int.from_bytes(body[:8], "little") :]
    header = {
        "version": VERSION,
        "config": config_to_json(adapter.config),
        "base": adapter.base,
        "tokenizer": tokenizer,
        "sha256": hashlib.sha256(data).hexdigest(),
        "codec": codec,
        "layers": {
            path: {
                "kind": layer.kind,
                "A": list(layer.A.shape),
                "B": list(layer.B.shape),
                "scaling": layer.scaling,
            }
            for path, layer in adapter.layers.items()
        },
        "provenance": dict(provenance or {}),
    }
    return dump_tensors(tensors, {"fedlora": canonical_json(header).decode()})


def decode_packed(
    file: TensorFile, where: str = "packed adapter", *, verified: bool = False
) -> PackedFile:
    """Check a parsed file and return what it holds.

    verified: the whole file has just been found to have the digest that it was announced with, so
    that the digest of its tensors has nothing to add.
    """
    header = _header(file, where)
    digest = header["sha256"] if verified else hashlib.sha256(file.data).hexdigest()
    if digest != header["sha256"]:
        raise DigestMismatchError(
            f"{where}: expected tensors with SHA-256 {header['sha256'][:12]}…, found "
            f"{digest[:12]}…; the file is damaged or was changed, get it again"
        )
    config = config_from_json(header["config"], list(header["layers"]), where)
    codec = header["codec"]
    _check_names(file, header, config, where)
    scales = file.array("scales") if codec in ("int8", "int4") else np.zeros(0, np.float32)
    layers: dict[str, LoraLayer] = {}
    used = 0
    for path in sorted(header["layers"]):
        about = header["layers"][path]
        try:
            A, used = _decode(file, path, "A", about["A"], codec, scales, used)
            B, used = _decode(file, path, "B", about["B"], codec, scales, used)
            magnitude = None
            if config.uses_dora:
                magnitude = _magnitude(file, f"{path}.lora_magnitude_vector", codec, B)
            layers[path] = LoraLayer(A, B, about["scaling"], magnitude, about["kind"])
        except FedloraError as error:
            raise type(error)(f"{where}, layer {path!r}: {error}") from None
    if used != len(scales):
        raise FormatError(f"{where}: expected {used} scales, found {len(scales)}")
    adapter = Adapter(layers, config, header["base"])
    return PackedFile(adapter, codec, header["tokenizer"], header["provenance"])


def _encode(
    factor: Array, part: str, codec: str, what: str
) -> tuple[npt.NDArray[Any], list[Array]]:
    if codec == "fp32":
        return factor, []
    if codec == "fp16":
        return to_half(factor, what), []
    rows = factor.reshape(factor.shape[0], -1) if part == "A" else factor.T
    integers, scales = quantize(rows, codec)
    if codec == "int4":
        return pack_nibbles(integers), [scales]
    return (integers.reshape(factor.shape) if part == "A" else integers.T), [scales]


def _decode(
    file: TensorFile, path: str, part: str, shape: list[int], codec: str, scales: Array, used: int
) -> tuple[Array, int]:
    """Return a factor, and how many of the scales are used up with it."""
    name = f"{path}.lora_{part}.weight"
    rank = shape[0] if part == "A" else shape[1]
    length = math.prod(shape) // rank
    stored = (rank, (length + 1) // 2) if codec == "int4" else tuple(shape)
    entry = file.entries[name]
    if entry.shape != stored or entry.dtype != dtype_of(codec):
        raise FormatError(
            f"lora_{part}: expected {dtype_of(codec)} {stored} for codec {codec}, "
            f"found {entry.dtype} {entry.shape}"
        )
    array = file.array(name)
    if codec in ("fp32", "fp16"):
        return array.astype(np.float32, copy=False), used
    if codec == "int4":
        rows = unpack_nibbles(array, length)
    else:
        rows = array.reshape(rank, length) if part == "A" else array.T
    own = scales[used : used + rank]
    if len(own) != rank:
        raise FormatError(f"expected {rank} scales for lora_{part}, found {len(own)}")
    values = dequantize(rows, own)
    return (values.reshape(shape) if part == "A" else values.T), used + rank


def _magnitude(file: TensorFile, name: str, codec: str, B: Array) -> Array:
    entry = file.entries[name]
    dtype = "F16" if codec == "fp16" else "F32"
    if entry.shape != B.shape[:1] or entry.dtype != dtype:
        raise FormatError(
            f"magnitude: expected {dtype} {B.shape[:1]}, found {entry.dtype} {entry.shape}"
        )
    return file.array(name).astype(np.float32, copy=False)


def _header(file: TensorFile, where: str) -> dict[str, Any]:
    if file.metadata.keys() != {"fedlora"}:
        raise FormatError(
            f"{where}: expected one metadata key, 'fedlora', found {shown(sorted(file.metadata))}; "
            "weights of a PEFT adapter are read by naming their folder, which has the config"
        )
    value = parse_json(file.metadata["fedlora"].encode("utf-8"), f"{where}, metadata 'fedlora'")
    if isinstance(value, dict) and value.get("version", VERSION) != VERSION:
        raise FormatError(
            f"{where}: expected version {VERSION} of the packed format, found "
            f"{shown(value['version'])}; update fedlora"
        )
    if not isinstance(value, dict) or value.keys() != _KEYS:
        raise FormatError(f"{where}: expected metadata with {', '.join(sorted(_KEYS))}")
    for key, (expected, fits) in _FIELDS.items():
        if not fits(value[key]):
            raise FormatError(f"{where}: {key}: expected {expected}, found {shown(value[key])}")
    for path, about in value["layers"].items():
        if not is_module_path(path) or not _is_layer(about):
            raise FormatError(
                f"{where}, layer {path[:200]!r}: expected a path of at most {MAX_PATH} "
                "printable characters, with kind, scaling and the shapes of A and B, "
                f"found {shown(about)}"
            )
    return value


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "config": ("an object", lambda value: isinstance(value, dict)),
    "base": ("a fingerprint or null", is_label),
    "tokenizer": ("a SHA-256 or null", is_label),
    "sha256": (
        "64 hexadecimal digits",
        lambda value: isinstance(value, str) and _SHA256.fullmatch(value) is not None,
    ),
    "codec": (
        f"one of {', '.join(CODECS)}",
        lambda value: isinstance(value, str) and value in CODECS,
    ),
    "layers": (
        "an object with at least one layer",
        lambda value: isinstance(value, dict) and len(value) > 0,
    ),
    "provenance": ("an object", lambda value: isinstance(value, dict)),
}


def _is_layer(about: Any) -> bool:
    return (
        isinstance(about, dict)
        and about.keys() == _LAYER_KEYS
        and isinstance(about["kind"], str)
        and type(about["scaling"]) in (int, float)
        and _is_shape(about["A"], 2, 5)
        and _is_shape(about["B"], 2, 2)
        and about["A"][0] == about["B"][1]
    )


def _is_shape(value: Any, low: int, high: int) -> bool:
    return (
        isinstance(value, list)
        and low <= len(value) <= high
        and all(type(size) is int and 1 <= size < 1 << 40 for size in value)
    )


def _check_names(
    file: TensorFile, header: Mapping[str, Any], config: LoraConfig, where: str
) -> None:
    parts = ["lora_A.weight", "lora_B.weight"]
    parts += ["lora_magnitude_vector"] if config.uses_dora else []
    expected = {f"{path}.{part}" for path in header["layers"] for part in parts}
    expected |= {"scales"} if header["codec"] in ("int8", "int4") else set()
    missing, extra = expected - file.entries.keys(), file.entries.keys() - expected
    if missing or extra:
        word, name = ("missing", min(missing)) if missing else ("unexpected", min(extra))
        raise FormatError(f"{where}: {word} tensor {name[:200]!r}")
    if "scales" in expected:
        scales = file.entries["scales"]
        if scales.dtype != "F32" or len(scales.shape) != 1:
            raise FormatError(f"{where}: scales: expected F32 (n,), found {scales.shape}")


def config_to_json(config: LoraConfig) -> dict[str, Any]:
    """Return the fields as JSON; whole alphas stand as floats: equal configs, equal bytes."""
    value = {field.name: getattr(config, field.name) for field in fields(config)}
    value = {key: dict(v) if isinstance(v, Mapping) else v for key, v in value.items()}
    alphas = {key: float(alpha) for key, alpha in config.alpha_pattern.items()}
    floats = {key: float(value[key]) for key in ("lora_alpha", "lora_dropout")}
    return {**value, **floats, "alpha_pattern": alphas}


def config_from_json(value: dict[str, Any], paths: list[str], where: str) -> LoraConfig:
    """Read what `config_to_json` wrote, for an adapter with layers at `paths`.

    Raises `FormatError`.
    """
    known = {field.name for field in fields(LoraConfig)}
    if value.keys() != known:
        different = sorted(value.keys() ^ known)
        raise FormatError(f"{where}: config: missing or unknown key {different[0][:80]!r}")
    return build_config(value, f"{where}: config", paths)
