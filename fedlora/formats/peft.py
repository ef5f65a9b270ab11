"""PEFT's adapter folder: ``adapter_model.safetensors`` and ``adapter_config.json``.

A tensor is called ``base_model.model.PATH.lora_A.weight``. Against `fedlora.LoraLayer`, a
convolution's B and magnitude have ones at the end, (out, rank, 1[, 1]) and (1, out, 1[, 1]), and an
embedding's names are lora_embedding_A and lora_embedding_B. fedlora's own facts (base, provenance)
stand in the safetensors metadata, since PEFT warns about unknown keys in its config.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlora.adapter import Adapter, Array, Kind, LoraConfig, LoraLayer
from fedlora.errors import (
    AdapterError,
    FormatError,
    LayerMismatchError,
    ShapeMismatchError,
    UnsupportedError,
)
from fedlora.files import interrupted_folder, replace_folder
from fedlora.formats.peft_config import MAX_CONFIG_BYTES, parse_config, peft_keys
from fedlora.formats.stranger_config import MAX_PATH, is_module_path
from fedlora.formats.strict_json import canonical_json, is_label, parse_json, pretty_json
from fedlora.formats.tensors import (
    TensorFile,
    dump_tensors,
    parse_tensors,
    read_bytes,
    read_tensors,
)

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "decode_peft", "encode_peft", "read_peft", "write_peft"]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
MODEL_CARD = "README.md"
_PREFIX = "base_model.model."
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude",
    ".base_layer.weight": "base",  # PEFT adds the weight of an embedding that is a target
}


@dataclass(frozen=True, slots=True)
class PeftFolder:
    """What a folder holds."""

    adapter: Adapter
    provenance: Mapping[str, Any]
    num_bytes: int


def read_peft(folder: Path) -> PeftFolder:
    """Read a folder. Raises `FormatError` and `AdapterError`; a pickle is never opened."""
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not folder.is_dir() and interrupted_folder(folder).is_dir():
        old = interrupted_folder(folder)
        raise FormatError(
            f"{folder}: writing it was interrupted; rename {old.name} back to {folder.name}"
        )
    if not config_path.is_file():
        raise FormatError(f"{folder}: expected a PEFT folder with {CONFIG_NAME}, found none")
    if not weights_path.is_file():
        pickles = [path.name for path in sorted(folder.glob("adapter_model.*"))]
        raise FormatError(
            f"{folder}: expected {WEIGHTS_NAME}, found {pickles[0] if pickles else 'none'}"
            + ("; a pickle can run code, so save the adapter as safetensors" if pickles else "")
        )
    config = read_bytes(config_path, MAX_CONFIG_BYTES)
    tensors = read_tensors(weights_path)
    adapter, provenance = decode_peft(config, tensors, str(folder))
    return PeftFolder(adapter, provenance, len(config) + weights_path.stat().st_size)


def write_peft(adapter: Adapter, folder: Path, provenance: Mapping[str, Any] | None = None) -> None:
    """Write a folder that PEFT loads; it replaces an existing one, see `replace_folder`.

    What could not be read is not written.
    """
    config, weights = encode_peft(adapter, provenance)
    decode_peft(config, parse_tensors(weights, str(folder)), str(folder))

    def build(fresh: Path) -> None:
        (fresh / CONFIG_NAME).write_bytes(config)
        (fresh / WEIGHTS_NAME).write_bytes(weights)
        if (folder / MODEL_CARD).is_file():  # PEFT writes one, and people edit it
            shutil.copyfile(folder / MODEL_CARD, fresh / MODEL_CARD)

    replace_folder(folder, build)


def decode_peft(
    config: bytes, tensors: TensorFile, where: str = "PEFT adapter"
) -> tuple[Adapter, Mapping[str, Any]]:
    """Return the adapter and its provenance. Raises `FormatError` and `AdapterError`."""
    ours = _parse_metadata(tensors.metadata, f"{where}, {WEIGHTS_NAME}")
    parts = _group(tensors, f"{where}, {WEIGHTS_NAME}")
    settings = parse_config(config, f"{where}, {CONFIG_NAME}", parts)
    resolved = settings.resolve(parts)
    layers = {}
    for path, found in parts.items():
        try:
            rank, scaling = resolved[path]
            scaling = _exact(ours["scalings"].get(path), scaling, path)
            layers[path] = _layer(found, tensors, scaling, settings)
            if layers[path].rank != rank:
                raise ShapeMismatchError(
                    f"expected rank {rank} as in {CONFIG_NAME}, found {layers[path].rank}"
                )
        except (AdapterError, FormatError) as error:
            raise type(error)(f"{where}, layer {path!r}: {error}") from None
    return Adapter(layers, settings, ours["base"]), ours["provenance"]


def encode_peft(
    adapter: Adapter, provenance: Mapping[str, Any] | None = None
) -> tuple[bytes, bytes]:
    """Return the bytes of adapter_config.json and of adapter_model.safetensors.

    The same adapter and provenance give the same bytes. Raises `FormatError` for a provenance that
    is not JSON.
    """
    adapter = adapter.map(_positive)
    keys, rounded = peft_keys(adapter)
    tensors: dict[str, Array] = {}
    for path, layer in adapter.layers.items():
        ones = (1,) * (layer.A.ndim - 2)
        infix = "lora_embedding_" if layer.kind == "embedding" else "lora_"
        end = "" if layer.kind == "embedding" else ".weight"
        tensors[f"{_PREFIX}{path}.{infix}A{end}"] = layer.A
        tensors[f"{_PREFIX}{path}.{infix}B{end}"] = layer.B.reshape(*layer.B.shape, *ones)
        if layer.magnitude is not None:
            shape = (1, -1, *ones) if layer.kind == "conv" else (-1,)
            tensors[f"{_PREFIX}{path}.lora_magnitude_vector"] = layer.magnitude.reshape(shape)
    ours = {
        "version": 1,
        "base": adapter.base,
        "provenance": dict(provenance or {}),
        "scalings": rounded,
    }
    metadata = {"format": "pt", "fedlora": canonical_json(ours).decode()}
    return pretty_json(keys), dump_tensors(tensors, metadata)


def _group(tensors: TensorFile, where: str) -> dict[str, dict[str, str]]:
    """Return path -> part -> name of the tensor."""
    parts: dict[str, dict[str, str]] = {}
    for name in tensors.entries:
        end = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
        if end is None or not name.startswith(_PREFIX):
            raise LayerMismatchError(
                f"{where}: unexpected tensor {name[:200]!r}; expected names such as "
                f"{_PREFIX}PATH.lora_A.weight; fedlora holds A, B and DoRA magnitudes only"
            )
        path = name[len(_PREFIX) : -len(end)]
        if not is_module_path(path):
            raise FormatError(
                f"{where}: expected the path of a module of at most {MAX_PATH} printable "
                f"characters, found {path[:200]!r}"
            )
        parts.setdefault(path, {})[_SUFFIXES[end]] = name
    if not parts:
        raise LayerMismatchError(f"{where}: expected at least one layer, found no tensor")
    return dict(sorted(parts.items()))


def _layer(
    found: dict[str, str], tensors: TensorFile, scaling: float, config: LoraConfig
) -> LoraLayer:
    names = {part: name for part, name in found.items() if part != "base"}
    is_embedding = "embedding_A" in names or "embedding_B" in names
    prefix = "embedding_" if is_embedding else ""
    expected = {f"{prefix}A", f"{prefix}B"} | ({"magnitude"} if config.uses_dora else set())
    for part in sorted(expected - names.keys()):
        raise LayerMismatchError(f"lora_{part} is missing")
    for part in sorted(names.keys() - expected):
        raise LayerMismatchError(f"unexpected lora_{part} with use_dora={config.uses_dora}")
    A = _floats(tensors, names[f"{prefix}A"])
    B = _floats(tensors, names[f"{prefix}B"])
    kind: Kind = "embedding" if is_embedding else "conv" if A.ndim > 2 else "linear"
    ones = (1,) * (A.ndim - 2)
    if kind == "conv":
        if B.ndim != A.ndim or B.shape[2:] != ones or B.shape[1] != A.shape[0]:
            raise UnsupportedError(
                f"convolution: expected lora_B {('out', A.shape[0], *ones)} for lora_A {A.shape}, "
                f"found {B.shape}; grouped convolutions are not covered"
            )
        B = B.reshape(B.shape[:2])
    magnitude = None
    if config.uses_dora:
        magnitude = _floats(tensors, names["magnitude"])
        expected_shape = (1, B.shape[0], *ones) if kind == "conv" else B.shape[:1]
        if magnitude.shape != expected_shape:
            raise ShapeMismatchError(
                f"lora_magnitude_vector: expected {expected_shape}, found {magnitude.shape}"
            )
        magnitude = magnitude.reshape(-1)
    return LoraLayer(A, B, scaling, magnitude, kind)


def _floats(tensors: TensorFile, name: str) -> npt.NDArray[Any]:
    array = tensors.array(name)
    if array.dtype.kind != "f":
        raise FormatError(f"tensor {name[-40:]!r}: expected F32, F16 or BF16, found {array.dtype}")
    return array.astype(np.float32, copy=False)


def _parse_metadata(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    if "fedlora" not in metadata:
        return {"base": None, "provenance": {}, "scalings": {}}
    value = parse_json(metadata["fedlora"].encode("utf-8"), f"{where}, metadata 'fedlora'")
    if (
        not isinstance(value, dict)
        or value.keys() != {"version", "base", "provenance", "scalings"}
        or value["version"] != 1
        or not is_label(value["base"])
        or not isinstance(value["provenance"], dict)
        or not isinstance(value["scalings"], dict)
    ):
        raise FormatError(
            f"{where}, metadata 'fedlora': expected version 1 with base, provenance and scalings; "
            "the file may come from a newer fedlora"
        )
    return value


def _exact(recorded: Any, scaling: float, path: str) -> float:
    """Return the recorded scaling, of which the config's is the nearest that alpha / r gives."""
    if recorded is None:
        return scaling
    if type(recorded) is not float or abs(recorded - scaling) > 1e-12 * abs(scaling):
        raise FormatError(f"expected scaling {scaling!r} as in {CONFIG_NAME}, found {recorded!r}")
    return recorded


def _positive(layer: LoraLayer) -> LoraLayer:
    """Move a sign or a zero from the scaling, which comes from an alpha > 0, into B."""
    if layer.scaling > 0:
        return layer
    if layer.scaling == 0:
        return replace(layer, B=np.zeros_like(layer.B), scaling=1.0)
    return replace(layer, B=-layer.B, scaling=-layer.scaling)
