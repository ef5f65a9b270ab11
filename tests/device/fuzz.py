"""Loads damaged bundles one after another, in a process of its own: a crash must be seen as one.

    python -m tests.device.fuzz FOLDER FIRST COUNT

For each number a file of the bundle is damaged, the number deciding how. In every second one the
manifest is given the new digests, so that what is behind them meets the damage, half of it such
that a graph is still one. Prints the number
before it is tried, and what came of it after: "fine" or the error's class.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx

from fedlora.device import Session
from fedlora.device.manifest import sha256_of
from fedlora.errors import FedloraError


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip bits, put in bytes that mean something, cut, repeat or swap a piece."""
    changed = bytearray(data)
    way = rng.integers(6)
    at = int(rng.integers(len(changed)))
    size = int(min(len(changed) - at, rng.integers(1, 64)))
    if way == 0:
        return bytes(changed[:at])
    if way == 1:
        for spot in rng.integers(len(changed), size=rng.integers(1, 9)):
            changed[spot] ^= 1 << int(rng.integers(8))
    elif way == 2:
        special = (0x00, 0x01, 0x7F, 0x80, 0xFF, 0x08, 0x0A, 0x12, 0x70, 0x6A)
        for spot in rng.integers(len(changed), size=rng.integers(1, 5)):
            changed[spot] = special[rng.integers(len(special))]
    elif way == 3:
        del changed[at : at + size]
    elif way == 4:
        changed[at:at] = changed[at : at + size]
    else:
        to = int(rng.integers(len(changed)))
        changed[to : to + size] = changed[at : at + size]
    return bytes(changed)


def warp(data: bytes, rng: np.random.Generator) -> bytes:
    """Change a model where it still is one: sizes, types, places, nodes and how they are joined."""
    model = onnx.load_from_string(data)
    graph = model.graph
    for _ in range(rng.integers(1, 3)):
        tensor = graph.initializer[rng.integers(len(graph.initializer))]
        node = graph.node[rng.integers(len(graph.node))]
        other = graph.node[rng.integers(len(graph.node))]
        sizes = [0, 1, -1, 7, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63)]
        size = sizes[rng.integers(len(sizes))]
        places = ["/etc/passwd", "../base.onnx.data", "manifest.json", "", "*/_ORT_MEM_ADDR_/*"]
        place = places[rng.integers(len(places))]
        way = rng.integers(12)
        if way == 0 and tensor.dims:
            tensor.dims[rng.integers(len(tensor.dims))] = size
        elif way == 1:
            tensor.data_type = int(rng.integers(-1, 26))
        elif way == 2 and tensor.external_data:
            entry = tensor.external_data[rng.integers(len(tensor.external_data))]
            entry.value = place if entry.key == "location" else str(size)
        elif way == 3:
            tensor.data_location = 1 - tensor.data_location
        elif way == 4:
            tensor.name = other.output[0]
        elif way == 5:
            node.op_type = other.op_type
        elif way == 6 and node.input:
            node.input[rng.integers(len(node.input))] = other.output[0]
        elif way == 7:
            del node.input[:1]
        elif way == 8 and node.attribute:
            attribute = node.attribute[rng.integers(len(node.attribute))]
            attribute.i = size
            attribute.ints.extend([size])
        elif way == 9:
            value = [*graph.input, *graph.output][rng.integers(len(graph.input))]
            value.type.tensor_type.elem_type = int(rng.integers(0, 18))
            value.type.tensor_type.shape.dim.add(dim_value=size)
        elif way == 10:
            hidden = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t
            hidden.CopyFrom(tensor)
            hidden.data_location = onnx.TensorProto.EXTERNAL
            hidden.external_data.add(key="location", value=place)
        elif way == 11:
            graph.node.append(other)
    return bytes(model.SerializeToString())


def spoil(source: Path, folder: Path, number: int) -> str:
    """Make a damaged copy of a bundle; return the name of the file."""
    rng = np.random.default_rng(number)
    shutil.copytree(source, folder)
    names = sorted(path.name for path in folder.iterdir())
    name = names[number // 2 % len(names)]
    path = folder / name
    change = warp if path.suffix == ".onnx" and number % 4 == 3 else damage
    path.write_bytes(change(path.read_bytes(), rng))
    if number % 2 and name != "manifest.json":
        record = json.loads((folder / "manifest.json").read_text())
        size = path.stat().st_size
        record["files"][name] = {"sha256": sha256_of(path), "num_bytes": size}
        (folder / "manifest.json").write_text(json.dumps(record))
    return name


def use(folder: Path) -> None:
    """Do with a bundle what a device does."""
    session = Session(folder, threads=1, low_memory=True)
    for name in session.manifest.graphs:
        session.bundle.session(name)
    if session.manifest.task == "classification":
        session.predict(np.ones((2, *session.manifest.input_shape), session.manifest.input_dtype))
        return
    session.run(np.ones((2, 3), np.int64))
    "".join(session.generate("the cat", 4))
    session.suggest("the c")


def main(source: Path, first: int, count: int) -> None:
    for number in range(first, first + count):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "bundle"
            name = spoil(source, folder, number)
            print(number, name, end=" ", flush=True)
            try:
                use(folder)
                print("fine")
            except FedloraError as error:
                text = str(error)
                print(type(error).__name__ if "\n" not in text else f"two lines: {text!r}")
            except Exception as error:
                print(f"untyped: {type(error).__name__}: {error}"[:300].replace("\n", " "))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
