"""Canaries: a few inputs and the logits that the base gave for them when the bundle was exported.

A device runs them to learn whether its bundle still computes what it did: a damaged file would be
found by its digest, but a new ONNX Runtime, other drivers or bad memory would not. They are also
inputs on which a new adapter can be tried where the owner has no data yet.

    canaries.safetensors    inputs (rows, time) or (rows, *shape), logits (rows, outputs)

Both are float32, token ids too: they are below 2**24, which float32 holds exactly. A language
model's logits are those of the last position.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedlora.adapter import Array
from fedlora.device.manifest import CANARIES, Manifest, sha256_of
from fedlora.errors import DigestMismatchError, FormatError
from fedlora.files import write_atomic
from fedlora.formats.tensors import dump_tensors, read_tensors

__all__ = ["Canaries", "Runs", "drift", "probe_of", "read_canaries", "tolerance", "write_canaries"]

PROBED = 8  # tokens, or examples, where a bundle has no canaries


class Runs(Protocol):
    """A `fedlora.device.Session`, with the adapter that it serves."""

    def run(self, inputs: npt.NDArray[Any]) -> Array:
        """Return logits, (rows, time, vocabulary) or (rows, classes) float32."""


@dataclass(frozen=True, slots=True)
class Canaries:
    """inputs: as `Session.run` takes them; logits: (rows, outputs) float32 of the base."""

    inputs: npt.NDArray[Any]
    logits: Array


def write_canaries(folder: Path, canaries: Canaries) -> None:
    """Write the file; whoever writes the bundle's manifest names it there."""
    arrays = {"inputs": canaries.inputs, "logits": canaries.logits}
    data = dump_tensors({k: np.ascontiguousarray(v, np.float32) for k, v in arrays.items()})
    write_atomic(folder / CANARIES, data)


def read_canaries(folder: Path, manifest: Manifest) -> Canaries | None:
    """Return a bundle's canaries, None where it was exported without.

    Raises `DigestMismatchError`, and `FormatError` for a file that does not fit the manifest.
    """
    info = manifest.files.get(CANARIES)
    if info is None:
        return None
    path = folder / CANARIES
    file = read_tensors(path)
    if sha256_of(path) != info.sha256:
        raise DigestMismatchError(
            f"{path}: expected SHA-256 {info.sha256[:12]}, found another; the bundle is damaged: "
            "export or install it again"
        )
    if set(file.entries) != {"inputs", "logits"}:
        raise FormatError(f"{path}: expected inputs and logits, found {sorted(file.entries)}")
    inputs, logits = file.array("inputs"), file.array("logits")
    shape = manifest.input_shape if manifest.input_dtype == "float32" else inputs.shape[1:2]
    if not len(inputs) or inputs.shape[1:] != shape or logits.shape != (
        len(inputs), manifest.outputs,
    ):  # fmt: skip
        raise FormatError(
            f"{path}: expected inputs of this bundle and ({len(inputs)}, {manifest.outputs}) "
            f"logits, found {inputs.shape} and {logits.shape}"
        )
    return Canaries(inputs.astype(manifest.input_dtype), logits)


def drift(session: Runs, canaries: Canaries) -> float:
    """Return the largest difference to the recorded logits, by the largest of those if over 1.

    The session must serve the base. NaN where a logit is not finite.
    """
    found = session.run(canaries.inputs)
    found = found[:, -1] if found.ndim == 3 else found
    scale = max(1.0, float(np.abs(canaries.logits).max()))
    return float(np.abs(found - canaries.logits).max()) / scale


def tolerance(manifest: Manifest) -> float:
    """Return the largest drift of a sound device.

    Kernels of other processors sum in another order: float32 logits then move by about 1e-5.
    Integer products round activations first, where that flips a whole step, and older processors
    saturate them: a tenth is what a broken bundle exceeds and another processor does not.
    """
    return 1e-3 if manifest.precision == "fp32" else 0.1


def probe_of(canaries: Canaries | None, manifest: Manifest) -> npt.NDArray[Any]:
    """Return inputs to try an adapter on: the canaries', else token ids 1 to 8, or waves."""
    if canaries is not None:
        return canaries.inputs
    if manifest.input_dtype == "int64":
        return np.arange(1, PROBED + 1, dtype=np.int64)[None]
    size = int(np.prod(manifest.input_shape))
    waves = np.sin(np.arange(PROBED * size, dtype=np.float32))
    return waves.reshape(PROBED, *manifest.input_shape)
