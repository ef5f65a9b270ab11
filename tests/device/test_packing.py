"""Copies of large int8 matrices in low-memory mode: same numbers, and the mapped pages go back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from fedlora.adapter import LoraConfig
from fedlora.device import runtime
from fedlora.device.manifest import BASE_DATA
from fedlora.device.runtime import open_bundle
from fedlora.device.trainer import Trainer
from fedlora.device.wire import external_weights, integer_factors, with_inputs
from fedlora.export.bundle import export_bundle
from fedlora.training import TrainConfig
from tests.export.test_approximate import Mlp128
from tests.export.test_bundle import small
from tests.nn.models import seeded

GRAPH = "train_4.onnx"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A bundle whose training multiplies integers throughout."""
    made: Path = tmp_path_factory.mktemp("packing") / "bundle"
    lora = LoraConfig(target_modules=("first",))
    export_bundle(small(seeded(Mlp128)), made, lora=lora, train=["4"], train_precision="int8")
    return made


def batches(width: int, classes: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    return [
        {
            "inputs": generator.normal(size=(4, width)).astype(np.float32),
            "targets": generator.integers(0, classes, 4),
        }
        for _ in range(3)
    ]


def test_copies_change_no_number(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(local_steps=3)
    manifest = open_bundle(folder).manifest
    given = batches(*manifest.input_shape, manifest.outputs)
    plain = Trainer(folder, threads=1, low_memory=True)
    expected = plain.fit(given, config)
    assert plain.bundle.session(GRAPH, {"loss"}).get_overridable_initializers()
    monkeypatch.setattr(runtime, "LARGE", 1)
    packing = Trainer(folder, threads=1, low_memory=True)
    found = packing.fit(given, config)
    assert found.adapter == expected.adapter
    assert found.loss == expected.loss
    # Only what it has made copies of is still a constant.
    model = onnx.load(folder / GRAPH, load_external_data=False)
    wide = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) > 1}
    (session,) = (one for _, one in packing.bundle._sessions.values())
    optional = {value.name for value in session.get_overridable_initializers()}
    constants = {name for name in wide - optional if not name.startswith("constant")}
    assert constants
    assert all(name.endswith(".int8") for name in constants)


def test_products_of_integers_are_told_by_what_they_read(folder: Path) -> None:
    model = (folder / GRAPH).read_bytes()
    graph = onnx.load_model_from_string(model).graph
    places = {"DynamicQuantizeMatMul": 1, "QGemm": 3}
    read = {node.input[places[node.op_type]] for node in graph.node if node.op_type in places}
    assert read
    assert integer_factors(model, where="") == read
    # One that anything else reads too is needed as it is.
    name = min(read)
    proto = onnx.load_model_from_string(model)
    proto.graph.node.append(helper.make_node("Identity", [name], ["again"]))
    assert integer_factors(proto.SerializeToString(), where="") == read - {name}


def test_weights_become_inputs_with_a_default() -> None:
    tensor = numpy_helper.from_array(np.ones((3, 300), np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": BASE_DATA, "offset": "0", "length": "3600"}.items():
        tensor.external_data.add(key=key, value=value)
    graph = helper.make_graph([], "g", [], [], [tensor])
    model = helper.make_model(graph).SerializeToString()
    weights = external_weights(model, location=BASE_DATA, num_bytes=1 << 20, where="")
    made = onnx.load_model_from_string(with_inputs(model, weights, where=""))
    wanted = helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [3, 300])
    assert list(made.graph.input) == [wanted]
    del made.graph.input[:]
    assert made.SerializeToString() == model
    assert with_inputs(model, (), where="") == model


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_pages_that_are_copied_are_given_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(folder, threads=1, low_memory=True)
    data = bundle._base.data
    before = data.copy()  # every page is this process's now
    assert resident(folder) == data.nbytes
    monkeypatch.setattr(runtime, "LARGE", 1)
    bundle.session(GRAPH, {"loss"})
    model = (folder / GRAPH).read_bytes()
    weights = external_weights(model, location=BASE_DATA, num_bytes=data.nbytes, where="")
    factors = integer_factors(model, where="")
    copied = sum(-(-w.num_bytes // 4096) * 4096 for w in weights if w.name in factors)
    assert copied > 0
    assert resident(folder) == data.nbytes - copied
    np.testing.assert_array_equal(data, before)  # and come back from the file


def resident(folder: Path) -> int:
    """Bytes of the mapped weights that are in this process's memory."""
    name, size = str((folder / BASE_DATA).resolve()), 0
    lines = Path("/proc/self/smaps").read_text().splitlines()
    for index, line in enumerate(lines):
        if line.endswith(name):
            rss = next(each for each in lines[index:] if each.startswith("Rss:"))
            size += int(rss.split()[1]) * 1024
    return size
