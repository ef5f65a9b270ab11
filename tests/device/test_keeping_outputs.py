"""A graph cut down to some of its outputs: ONNX Runtime then computes no more than they need."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from fedlora.device.manifest import factor_names, factors_of
from fedlora.device.runtime import open_bundle
from fedlora.device.wire import keeping_outputs
from fedlora.errors import FormatError
from tests.device.hand_made import HandMade, write_classifier
from tests.device.twins import examples


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> HandMade:
    return write_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.mark.parametrize("wanted", [{"loss"}, {"loss", "fc2.lora_B.grad"}, {"fc1.lora_A.grad"}])
def test_what_is_left_computes_the_same(made: HandMade, wanted: set[str]) -> None:
    bundle = open_bundle(made.folder, threads=1)
    (batch,) = examples(made, 1, 16)
    feeds = {**batch, **dict(factors_of(made.adapter()))}
    whole = bundle.session("train_16.onnx")
    names = [output.name for output in whole.get_outputs() if output.name in wanted]
    expected = whole.run(names, feeds)
    found = bundle.session("train_16.onnx", wanted).run(names, feeds)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_nodes_and_outputs_that_nobody_needs_are_gone(made: HandMade) -> None:
    model = (made.folder / "train_16.onnx").read_bytes()
    cut = onnx.load_model_from_string(keeping_outputs(model, {"loss"}, where=""))
    whole = onnx.load_model_from_string(model)
    assert [output.name for output in cut.graph.output] == ["loss"]
    needed = {"loss"}
    for node in reversed(cut.graph.node):
        assert needed & set(node.output)
        needed |= set(node.input)
    kept = [node.name for node in cut.graph.node]
    assert kept == [node.name for node in whole.graph.node if node.name in kept]
    assert len(kept) < 0.7 * len(whole.graph.node)
    for graph in (whole.graph, cut.graph):
        del graph.output[:]
        del graph.node[:]
    assert cut == whole
    every = {output.name for output in onnx.load_model_from_string(model).graph.output}
    assert keeping_outputs(model, every, where="") == model


def test_what_a_graph_inside_a_node_reads_is_kept() -> None:
    """The branches of an If have no inputs: they see the values around them."""
    scalar = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [])

    def branch(node: onnx.NodeProto) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, [])
        return helper.make_graph([node], "branch", [], [out])

    nodes = [
        helper.make_node("Neg", ["x"], ["minus"]),
        helper.make_node("Abs", ["x"], ["unused"]),
        helper.make_node("Greater", ["x", "x"], ["never"]),
        helper.make_node(
            "If", ["never"], ["y"],
            then_branch=branch(helper.make_node("Identity", ["x"], ["a"])),
            else_branch=branch(helper.make_node("Identity", ["minus"], ["b"])),
        ),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, []) for n in ("y", "unused")]
    model = helper.make_model(helper.make_graph(nodes, "graph", [scalar], ends))
    cut = onnx.load_model_from_string(keeping_outputs(model.SerializeToString(), {"y"}, where=""))
    assert [node.op_type for node in cut.graph.node] == ["Neg", "Greater", "If"]


def test_a_session_of_some_outputs_has_no_others(made: HandMade) -> None:
    bundle = open_bundle(made.folder, threads=1)
    wanted = {"loss", factor_names("fc2")[1].removesuffix("weight") + "grad"}
    session = bundle.session("train_16.onnx", wanted)
    assert {output.name for output in session.get_outputs()} == wanted
    assert bundle.session("train_16.onnx", wanted) is session
    assert len(bundle.session("train_16.onnx").get_outputs()) == 5


@pytest.mark.parametrize("cut", [1, 10, 100])
def test_a_part_of_a_model_is_refused(made: HandMade, cut: int) -> None:
    model = (made.folder / "train_16.onnx").read_bytes()
    with pytest.raises(FormatError, match=r"^here: expected an ONNX model"):
        keeping_outputs(model[:-cut], {"loss"}, where="here")
