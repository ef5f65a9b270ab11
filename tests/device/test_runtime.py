"""Bundles that lie: no file outside is opened, and whatever is damaged ends in one typed line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedlora.device import Session, open_bundle
from fedlora.device.manifest import FileInfo, sha256_of, write_manifest
from fedlora.device.wire import ExternalWeight, external_weights
from fedlora.errors import DigestMismatchError, FormatError
from tests.device.hand_made import (
    FEATURES,
    HandMade,
    classifier_logits,
    rewrite_manifest,
    write_classifier,
    write_language_model,
)
from tests.matching import raises

WRITERS: dict[str, Callable[[Path], HandMade]] = {
    "classifier": write_classifier,
    "language": write_language_model,
}
ROOT = Path(__file__).parents[2]


def read(data: bytes, num_bytes: int = 1 << 20) -> tuple[ExternalWeight, ...]:
    return external_weights(data, location="base.onnx.data", num_bytes=num_bytes, where="x.onnx")


def outside(location: str = "base.onnx.data", **about: Any) -> onnx.TensorProto:
    tensor = TensorProto(name="w", data_type=1, dims=(2, 2), data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": 0, "length": 16, **about}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def model_of(*initializers: onnx.TensorProto, nodes: Any = ()) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph(list(nodes), "g", [], [], list(initializers)))


@pytest.mark.parametrize("kind", WRITERS)
def test_the_reader_finds_what_onnx_finds(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path)
    data = np.frombuffer((tmp_path / "base.onnx.data").read_bytes(), np.uint8)
    for path in tmp_path.glob("*.onnx"):
        model = onnx.load(path)  # with its external data
        expected = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer
        }
        inside = onnx.load(path, load_external_data=False).graph.initializer
        names = [tensor.name for tensor in inside if tensor.external_data]
        weights = read(path.read_bytes(), len(data))
        assert [weight.name for weight in weights] == names != []
        for weight in weights:
            np.testing.assert_array_equal(weight.view(data), expected[weight.name])


def test_every_type_and_shape() -> None:
    for dtype in ("f4", "u1", "i1", "u2", "i2", "i4", "i8", "?", "f2", "f8", "u4", "u8"):
        for shape in ((), (0,), (3,), (2, 1, 5)):
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
            length = int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
            tensor = outside(offset=4096, length=length)
            tensor.data_type = kind
            del tensor.dims[:]
            tensor.dims.extend(shape)
            (weight,) = read(model_of(tensor).SerializeToString())
            assert weight == ExternalWeight("w", np.dtype(dtype), shape, 4096)


def in_attribute(field: str) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["c"])
    attribute = node.attribute.add(name="value")
    tensor = outside()
    if field == "t":
        attribute.t.CopyFrom(tensor)
    elif field == "tensors":
        attribute.tensors.append(tensor)
    elif field == "sparse_tensor":
        attribute.sparse_tensor.values.CopyFrom(tensor)
    elif field == "sparse_tensors":
        attribute.sparse_tensors.add().indices.CopyFrom(tensor)
    elif field == "g":
        attribute.g.initializer.append(tensor)
    elif field == "graphs":
        inner = attribute.graphs.add().node.add().attribute.add()
        inner.t.CopyFrom(tensor)
    return model_of(nodes=[node])


def in_sparse_initializer() -> onnx.ModelProto:
    model = model_of()
    model.graph.sparse_initializer.add().values.CopyFrom(outside())
    return model


def in_function(attribute: bool) -> onnx.ModelProto:
    model = model_of()
    function = model.functions.add(name="f")
    holder = function.attribute_proto.add() if attribute else function.node.add().attribute.add()
    holder.t.CopyFrom(outside())
    return model


def in_training_info() -> onnx.ModelProto:
    model = model_of()
    model.training_info.add().algorithm.initializer.append(outside())
    return model


def without_location() -> onnx.ModelProto:
    model = in_attribute("t")  # ONNX Runtime goes by the location alone, others may not
    model.graph.node[0].attribute[0].t.ClearField("data_location")
    return model


def deep() -> onnx.ModelProto:
    model = model_of()
    graph = model.graph
    for _ in range(40):
        graph = graph.node.add().attribute.add().g
    graph.initializer.append(outside())
    return model


NESTED = "main graph's initializers"
LIES: dict[str, tuple[onnx.ModelProto, str]] = {
    "an absolute path": (model_of(outside("/etc/hostname")), "found '/etc/hostname'"),
    "the folder above": (model_of(outside("../base.onnx.data")), "found '../base.onnx.data'"),
    "a longer way": (model_of(outside("./base.onnx.data")), "found './base.onnx.data'"),
    "another file": (model_of(outside("manifest.json")), "no other file is opened"),
    "memory": (model_of(outside("*/_ORT_MEM_ADDR_/*")), "no other file is opened"),
    "no path": (model_of(outside(location=None)), "expected a location"),
    "two paths": (
        model_of(TensorProto(external_data=[*outside().external_data, *outside().external_data])),
        "expected a location",
    ),
    "a checksum": (model_of(outside(checksum="00")), "found checksum, length, location, offset"),
    "no length": (model_of(outside(length=None)), "expected a location, an offset and a length"),
    "past the end": (model_of(outside(offset=(1 << 20) - 15)), "within the 1,048,576 bytes"),
    "before the start": (model_of(outside(offset=-16)), "found offset -16"),
    "a huge offset": (model_of(outside(offset=1 << 63)), "found offset 9223372036854775808"),
    "another length": (model_of(outside(length=12)), "expected float32 (2, 2) within"),
    "no number": (model_of(outside(offset="1e3")), "found offset 1e3"),
    "other digits": (model_of(outside(offset="१")), "offset"),
    "a negative size": (
        model_of(TensorProto(dims=(-2, -2), data_type=1, data_location=1,
                             external_data=outside().external_data)),
        "within",
    ),
    "a huge size": (
        model_of(TensorProto(dims=(1 << 62, 4), data_type=1, data_location=1,
                             external_data=outside().external_data)),
        "within",
    ),
    "a text": (
        model_of(TensorProto(dims=(2,), data_type=8, data_location=1,
                             external_data=outside().external_data)),
        "expected a type of plain numbers, found ONNX type 8",
    ),
    "a name twice": (model_of(outside(), outside()), "initializer 'w' once"),
    "not said to be outside": (without_location(), NESTED),
    "in a node": (in_attribute("t"), NESTED),
    "in a node's list": (in_attribute("tensors"), NESTED),
    "in a sparse attribute": (in_attribute("sparse_tensor"), NESTED),
    "in sparse attributes": (in_attribute("sparse_tensors"), NESTED),
    "in a subgraph": (in_attribute("g"), NESTED),
    "in subgraphs": (in_attribute("graphs"), NESTED),
    "in a sparse initializer": (in_sparse_initializer(), NESTED),
    "in a function's node": (in_function(False), NESTED),
    "in a function's default": (in_function(True), NESTED),
    "in training info": (in_training_info(), NESTED),
    "deeper than anyone goes": (deep(), "at most 64 messages"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_weights_elsewhere_are_refused(case: str) -> None:
    model, text = LIES[case]
    with raises(FormatError, "x.onnx: ", text):
        read(model.SerializeToString())


def field(number: int, wire: int, body: bytes) -> bytes:
    size = bytes([len(body)]) if wire == 2 else b""
    return bytes([number << 3 | wire]) + size + body


GRAPH = field(5, 2, outside().SerializeToString())


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01",  # field 0
        b"\x3b\x3c",  # a group
        b"\x3a",  # no size
        b"\x3a\x7f",  # more bytes than there are
        b"\x3a" + b"\xff" * 11,  # a size without an end
        b"\x38\x01",  # a graph that is a number
        b"\x0d\x00",  # half of a fixed number
        b"\xff\xff\xff\xff\xff\x07\x00",  # the number of no field
        b"\x08" + b"\x80" * 10 + b"\x01",  # a number of more than 64 bits
        field(7, 2, field(5, 2, field(8, 2, b"\xff"))),  # a name that is no text
        field(7, 2, field(5, 2, field(14, 2, b"\x01"))),  # a location that is no number
        field(7, 2, field(5, 2, field(2, 2, b"\x01"))),
        b"ORTM",
    ],
)
def test_what_is_no_model_is_refused(data: bytes) -> None:
    with raises(FormatError, "x.onnx: expected an ONNX model, found something else"):
        read(data)


def test_a_model_in_parts_is_read_as_protobuf_joins_them() -> None:
    # A second graph is merged into the first; a location of 2^32 + 1 is cut to 1, which is outside.
    twice = field(7, 2, GRAPH) + field(7, 2, field(5, 2, b"\x42\x01v"))
    assert [weight.name for weight in read(twice)] == ["w"]
    assert len(onnx.load_from_string(twice).graph.initializer) == 2
    sly = field(5, 2, field(14, 0, b"\x81\x80\x80\x80\x10"))
    assert onnx.load_from_string(field(7, 2, sly)).graph.initializer[0].data_location == 1
    with raises(FormatError, "expected a location"):
        read(field(7, 2, sly))
    packed = TensorProto(name="w", data_type=1, data_location=1)
    packed.external_data.extend(outside().external_data)
    body = packed.SerializeToString() + field(1, 2, b"\x02\x02")
    (weight,) = read(field(7, 2, field(5, 2, body)))
    assert weight.shape == (2, 2)


@pytest.mark.parametrize("name", ["infer.onnx", "base.onnx.data", "tokenizer.json"])
def test_links_pipes_and_missing_files_are_refused(tmp_path: Path, name: str) -> None:
    made = write_language_model(tmp_path / "bundle")
    path = made.folder / name
    away = tmp_path / name
    path.rename(away)
    manifest = made.manifest

    def refused(text: str) -> None:
        write_manifest(manifest, made.folder)
        with raises(FormatError, str(path), text):
            session = Session(made.folder, threads=1)
            session.suggest("a")

    refused("cannot be read: No such file")
    path.symlink_to(away)
    refused("found none or a link")
    path.unlink()
    os.mkfifo(path)
    refused("found none or a link")
    path.unlink()
    path.mkdir()
    refused("found none or a link")


@pytest.mark.parametrize("name", ["infer.onnx", "base.onnx.data", "tokenizer.json"])
def test_a_changed_file_is_named(tmp_path: Path, name: str) -> None:
    made = write_language_model(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    for changed in (bytes(data), bytes(data[:-1]), bytes(data) + b"\n", b""):
        (tmp_path / name).write_bytes(changed)
        with raises(DigestMismatchError, name, "export or install it again"):
            Session(made.folder, threads=1).suggest("a")


def test_a_base_that_was_just_checked_is_not_checked_again(tmp_path: Path) -> None:
    made = write_classifier(tmp_path)
    files = dict(made.manifest.files)
    files["base.onnx.data"] = replace(files["base.onnx.data"], sha256="0" * 64)
    write_manifest(replace(made.manifest, files=files), tmp_path)
    open_bundle(tmp_path, threads=1, verify=False).session("infer.onnx")
    with raises(DigestMismatchError, "base.onnx.data"):
        open_bundle(tmp_path, threads=1)
    (tmp_path / "infer.onnx").write_bytes(b"")  # graphs always are
    with raises(DigestMismatchError, "infer.onnx"):
        open_bundle(tmp_path, threads=1, verify=False).session("infer.onnx")


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_base_that_is_replaced_after_the_check_changes_nothing(
    tmp_path: Path, low_memory: bool
) -> None:
    made = write_classifier(tmp_path)
    bundle = open_bundle(tmp_path, threads=1, low_memory=low_memory)
    fresh = tmp_path / "fresh"
    fresh.write_bytes(bytes(made.manifest.files["base.onnx.data"].num_bytes))
    fresh.rename(tmp_path / "base.onnx.data")
    x = np.ones((2, FEATURES), np.float32)
    # ONNX Runtime asks whether the file exists, and is given the weights that were checked.
    expected = classifier_logits(made.weights, x)
    np.testing.assert_allclose(Session(bundle).run(x), expected, atol=2e-5)  # float32, float64


def test_a_model_from_elsewhere_does_not_look_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = write_classifier(tmp_path / "bundle")
    size = made.manifest.files["base.onnx.data"].num_bytes
    (tmp_path / "base.onnx.data").write_bytes(bytes(size))
    monkeypatch.chdir(tmp_path)
    x = np.ones((2, FEATURES), np.float32)
    expected = classifier_logits(made.weights, x)
    np.testing.assert_allclose(Session("bundle", threads=1).run(x), expected, atol=2e-5)


def rename_output(model: onnx.ModelProto) -> None:
    model.graph.node[-1].output[0] = model.graph.output[0].name = "logit"


def rename_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "x"
    for node in model.graph.node:
        node.input[:] = ["x" if name == "inputs" else name for name in node.input]


def one_more_input(model: onnx.ModelProto) -> None:
    model.graph.input.add().CopyFrom(helper.make_tensor_value_info("more", 1, (1,)))


def no_default(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == "fc1.lora_A.weight":
            model.graph.initializer.remove(tensor)
            return


def other_width(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        if value.name == "fc1.lora_A.weight":
            value.type.tensor_type.shape.dim[1].dim_param = "n"


ENDS: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "another output": (rename_output, "outputs: missing or unknown 'logit"),
    "another input": (rename_input, "inputs: expected"),
    "one more input": (one_more_input, "inputs: expected 'more' to be none, found tensor(float)"),
    "a factor that must be fed": (no_default, "expected 'fc1.lora_A.weight' to be none"),
    "a factor of free width": (other_width, "layer 'fc1': expected A (rank, (6,))"),
}


@pytest.mark.parametrize("case", ENDS)
def test_ends_that_are_not_what_the_manifest_promises(tmp_path: Path, case: str) -> None:
    made = write_classifier(tmp_path)
    change, text = ENDS[case]
    model = onnx.load(tmp_path / "infer.onnx", load_external_data=False)
    change(model)
    (tmp_path / "infer.onnx").write_bytes(model.SerializeToString())
    rewrite_manifest(tmp_path, made.manifest)
    with raises(FormatError, "infer.onnx", text, "export the bundle again"):
        Session(tmp_path, threads=1)


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    made = write_language_model(tmp_path)
    for data in (b"", b"{}", b"\xff", b'{"model": {"type": "BPE"}}'):
        (tmp_path / "tokenizer.json").write_bytes(data)
        files = dict(made.manifest.files)
        path = tmp_path / "tokenizer.json"
        files[path.name] = FileInfo(sha256_of(path), len(data))
        write_manifest(replace(made.manifest, files=files), tmp_path)
        with raises(FormatError, "tokenizer.json: expected a tokenizer"):
            Session(tmp_path, threads=1).suggest("a")


def test_the_name_of_a_size_that_is_no_text(tmp_path: Path) -> None:
    made = write_classifier(tmp_path)
    path = tmp_path / "infer.onnx"
    graph = onnx.load_model(path, load_external_data=False).graph
    sizes = {d.dim_param for v in graph.input for d in v.type.tensor_type.shape.dim}
    named = max(sizes, key=len).encode()
    assert named
    path.write_bytes(path.read_bytes().replace(named, b"\xa0" + named[1:]))
    files = dict(made.manifest.files)
    files[path.name] = FileInfo(sha256_of(path), path.stat().st_size)
    write_manifest(replace(made.manifest, files=files), tmp_path)
    with raises(FormatError, "infer.onnx: a name in it is not text", "export the bundle again"):
        Session(tmp_path, threads=1)


@pytest.mark.parametrize("kind", WRITERS)
def test_damaged_bundles_end_in_a_typed_line(tmp_path: Path, kind: str) -> None:
    """In a process of its own: ONNX Runtime must not be made to end it either."""
    WRITERS[kind](tmp_path / "bundle")
    command = [sys.executable, "-m", "tests.device.fuzz", str(tmp_path / "bundle"), "0", "120"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"ended at {lines[-1:]}: {done.stderr[-500:]}"
    outcomes = [line.split(" ", 2)[2] for line in lines]
    assert len(outcomes) == 120
    assert set(outcomes) <= {"fine", "FormatError", "DigestMismatchError", "DataError"}
    assert outcomes.count("FormatError") > 30
    assert outcomes.count("DigestMismatchError") > 30
