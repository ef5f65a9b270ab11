"""A graph cut down to some of its outputs: ONNX Runtime then computes no more than they need."""

from __future__ import annotations

from typing import Any

import onnx
import pytest

from fedlora.device.manifest import factor_names
from fedlora.device.runtime import open_bundle
from fedlora.device.wire import keeping_outputs
from fedlora.errors import FormatError
from tests.device.hand_made import HandMade, write_classifier


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> HandMade:
    return write_classifier(tmp_path_factory.mktemp("classifier"))


def test_the_rest_of_the_model_stays_as_it_is(made: HandMade) -> None:
    model = (made.folder / "train_16.onnx").read_bytes()
    cut = onnx.load_model_from_string(keeping_outputs(model, {"loss", "fc2.lora_B.grad"}, where=""))
    whole = onnx.load_model_from_string(model)
    assert [output.name for output in cut.graph.output] == ["loss", "fc2.lora_B.grad"]
    del whole.graph.output[:]
    del cut.graph.output[:]
    assert cut == whole


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
