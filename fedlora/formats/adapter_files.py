"""Load and save an adapter in whichever format its path names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.adapter import Adapter, LoraConfig
from fedlora.errors import ConfigError, DigestMismatchError, FormatError, UnsupportedError
from fedlora.formats.packed import decode_packed, write_packed
from fedlora.formats.peft import WEIGHTS_NAME, read_peft, write_peft
from fedlora.formats.tensors import MAX_FILE_BYTES, parse_tensors, read_bytes, read_tensors

__all__ = ["AdapterFile", "load_adapter", "read_info", "save_adapter"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter and what its file says of it."""

    adapter: Adapter
    format: str  # "peft" or "packed"
    codec: str  # "fp32", "fp16", "int8" or "int4"; a PEFT folder is read into fp32
    num_bytes: int  # on the disk
    tokenizer: str | None  # SHA-256 of the tokenizer's file
    provenance: Mapping[str, Any]  # run, round, method, …


def load_adapter(
    path: str | os.PathLike[str], *, sha256: str | None = None, config: LoraConfig | None = None
) -> Adapter:
    """Read a PEFT folder or a packed file.

    `sha256` is the expected digest of a packed file as a whole. `config` is for formats that have
    none of their own, and refused for these two.

    Raises `FormatError` (also for a missing path), `DigestMismatchError`, and `AdapterError` when
    the file is sound but the adapter is not, or is not supported.
    """
    if config is not None:
        raise ConfigError(f"{path}: config: this format has its own; leave config out")
    return read_info(path, sha256=sha256).adapter


def read_info(path: str | os.PathLike[str], *, sha256: str | None = None) -> AdapterFile:
    """Read an adapter with all that its file says; see `load_adapter`."""
    try:
        return _read(Path(path), sha256)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from None


def save_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    codec: str = "fp32",
    tokenizer: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter; the suffix of `path` picks the format.

    None (or a path that ends with a slash, or a folder that exists): a PEFT folder, always fp32.
    ``.safetensors``: a packed file, with a `codec` of fp32, fp16, int8 or int4 (see
    `fedlora.formats.codecs` for their errors) and the SHA-256 of the `tokenizer`. An adapter that
    is there is replaced atomically.

    Raises `ConfigError`, `UnsupportedError`, `NonFiniteError` for a number that the codec cannot
    hold, and `RunError` when the place cannot be written.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    is_folder = not suffix or os.fspath(path).endswith(("/", os.sep)) or target.is_dir()
    if suffix == ".onnx_adapter":
        raise _no_onnx_adapter(target)
    if is_folder:
        if codec != "fp32" or tokenizer is not None:
            raise UnsupportedError(
                f"{target}: a PEFT folder is written with codec 'fp32' and without a tokenizer, "
                f"found codec {codec!r}; save to a .safetensors file"
            )
        write_peft(adapter, target, provenance)
    elif suffix == ".safetensors":
        write_packed(adapter, target, codec=codec, tokenizer=tokenizer, provenance=provenance)
    else:
        raise FormatError(
            f"{target}: expected no suffix (a PEFT folder) or .safetensors (a packed file), found "
            f"{suffix!r}; end the path with a slash to mean a folder"
        )


def _read(target: Path, sha256: str | None) -> AdapterFile:
    suffix = target.suffix.lower()
    if suffix == ".onnx_adapter":
        raise _no_onnx_adapter(target)
    if suffix in _PICKLES and not target.is_dir():
        raise FormatError(
            f"{target}: expected a PEFT folder or a .safetensors file, found {suffix!r}; a pickle "
            "can run code and is never opened, so save the adapter as safetensors"
        )
    if not target.is_file():
        if sha256 is not None:
            raise ConfigError(f"{target}: sha256 is of a packed file; a folder has none")
        found = read_peft(target)
        return AdapterFile(found.adapter, "peft", "fp32", found.num_bytes, None, found.provenance)
    if target.name == WEIGHTS_NAME and sha256 is None:
        raise FormatError(f"{target}: name the folder that it is in, {target.parent}, instead")
    if sha256 is None:
        file = read_tensors(target)
    else:
        data = read_bytes(target, MAX_FILE_BYTES)
        digest = hashlib.sha256(data).hexdigest()
        if digest != sha256.lower():
            raise DigestMismatchError(
                f"{target}: expected SHA-256 {sha256[:12]}…, found {digest[:12]}…; it is not the "
                "file that was announced, do not use it"
            )
        file = parse_tensors(data, str(target))
    packed = decode_packed(file, str(target), verified=sha256 is not None)
    return AdapterFile(
        packed.adapter,
        "packed",
        packed.codec,
        target.stat().st_size,
        packed.tokenizer,
        packed.provenance,
    )


def _no_onnx_adapter(path: Path) -> UnsupportedError:
    return UnsupportedError(
        f"{path}: the .onnx_adapter format is not available in this version; use a PEFT folder or "
        "a packed .safetensors file"
    )
