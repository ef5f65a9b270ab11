"""The weights of a base, written once and used by every graph of a bundle.

While graphs are built they ask for weights by name and get an initializer that points into
base.onnx.data; when all are built, `BaseWeights.write` writes what was asked for. ONNX Runtime then
maps one file for all of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from fedlora.device.manifest import BASE_DATA

__all__ = ["BaseWeights"]

ALIGNMENT = 4096  # of each weight in the file, so that it can be mapped


class BaseWeights:
    """Hands out initializers for the base's tensors.

    tensors: by name (module path and parameter), as stored in torch. Tensors that share their
    memory, as tied embeddings do, are one: the first name is used.
    """

    def __init__(self, tensors: Mapping[str, npt.NDArray[np.generic]]) -> None:
        self._arrays: dict[str, npt.NDArray[np.generic]] = {}
        self._offsets: dict[tuple[int, int], int] = {}  # by where an array is, and its bytes
        self._written: list[npt.NDArray[np.generic]] = []  # in the order of the file
        self._end = 0
        self._names: dict[tuple[int, tuple[int, ...]], str] = {}
        self._name_of: dict[str, str] = {}
        for name, array in tensors.items():
            place = (array.__array_interface__["data"][0], array.shape)
            self._name_of[name] = self._names.setdefault(place, name)
            self._arrays.setdefault(self._name_of[name], array)

    def name_of(self, name: str) -> str:
        """Return the name under which a tensor is stored: another one's where they are tied."""
        return self._name_of[name]

    def array(self, name: str) -> npt.NDArray[np.generic]:
        """Return a tensor by any of its names."""
        return self._arrays[self._name_of.get(name, name)]

    def add(self, name: str, array: npt.NDArray[np.generic]) -> None:
        """Add a tensor that is made of others (a transposed or quantized weight), once.

        The same name stands for the same numbers: adding it again changes nothing. A view of an
        array that was added, in another shape, takes no space of its own.
        """
        if name not in self._arrays:
            self._arrays[name] = np.ascontiguousarray(array)
            self._name_of[name] = name

    def __contains__(self, name: str) -> bool:
        return name in self._name_of

    def initializer(self, name: str) -> onnx.TensorProto:
        """Return an initializer whose numbers are in base.onnx.data; `name` becomes its name."""
        name = self._name_of[name]
        array = self._arrays[name]
        place = (array.__array_interface__["data"][0], array.nbytes)
        if place not in self._offsets:
            self._offsets[place] = self._end
            self._written.append(array)
            self._end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        tensor = onnx.TensorProto(
            name=name,
            data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        about = {"location": BASE_DATA, "offset": self._offsets[place], "length": array.nbytes}
        for key, value in about.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def write(self, folder: Path) -> str:
        """Write base.onnx.data into a new folder, flushed to the disk; return its SHA-256."""
        digest = hashlib.sha256()
        with (folder / BASE_DATA).open("wb") as file:
            for array in self._written:
                # Chunks of a transposed weight would be copies; the whole one is no more than it.
                data = np.ascontiguousarray(array).data.cast("B")
                padding = bytes(-len(data) % ALIGNMENT)
                for part in (data, padding):
                    file.write(part)
                    digest.update(part)
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest()
