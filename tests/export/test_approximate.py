"""Training by integer products: how near it is to the exact one, and what it leaves exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from fedlora.adapter import LoraConfig
from fedlora.device.manifest import read_manifest
from fedlora.errors import FormatError, UnsupportedError
from fedlora.export.bundle import export_bundle
from tests.export.test_bundle import small
from tests.export.test_emit import QUANTIZED, quantized_training, rounded_weights
from tests.export.traces import drawn_factors, emitted, factors, session, step_of, traced_step
from tests.nn.models import Mlp, seeded

Rows = npt.NDArray[np.float32]


def step_with(name: str, folder: Path, **options: Any) -> tuple[float, Rows, float, Rows, Path]:
    """Loss and gradients, as one row, of ONNX Runtime and of torch on the same numbers."""
    model, inputs, targets, traced = quantized_training(name)
    path = emitted(model, traced, folder, **options)
    if options.get("precision") == "int8":
        rounded_weights(model, stored(path))
    given = drawn_factors(model, 8)
    feed = {"inputs": inputs.numpy(), "targets": targets.numpy(), **given}
    loss, *gradients = session(path).run(None, feed)
    tensors = [torch.from_numpy(value) for value in given.values()]
    expected, *wanted = step_of(model, list(factors(model)), inputs, targets, tensors)
    row = np.concatenate([gradient.ravel() for gradient in gradients])
    true = np.concatenate([gradient.numpy().ravel() for gradient in wanted])
    return float(loss), row, expected.item(), true, path


def stored(path: Path) -> set[str]:
    proto = onnx.load(path, load_external_data=False)
    return {tensor.name for tensor in proto.graph.initializer}


def operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


def cosine(a: Rows, b: Rows) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_integers_in_the_backward_pass_leave_the_loss_exact(
    name: str, precision: str, tmp_path: Path
) -> None:
    loss, row, expected, true, path = step_with(
        name, tmp_path, precision=precision, train_precision="int8-backward"
    )
    assert loss == pytest.approx(expected, rel=2e-6)  # as in exact training
    # Weights and gradients in 127 steps of a row's largest: about 1 % of noise in each product.
    assert 0.999 < cosine(row, true) < 1 - 1e-7
    assert np.linalg.norm(row) == pytest.approx(np.linalg.norm(true), rel=0.02)
    assert "QGemm" in operators(path)
    assert "DynamicQuantizeMatMul" not in operators(path)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_integers_throughout(name: str, precision: str, tmp_path: Path) -> None:
    loss, row, expected, true, path = step_with(
        name, tmp_path, precision=precision, train_precision="int8"
    )
    assert loss == pytest.approx(expected, rel=0.01)
    assert cosine(row, true) > 0.995
    assert {"QGemm", "DynamicQuantizeMatMul"} <= operators(path)
    # One copy for both passes, and no product reads a weight in float32 that has one.
    names = stored(path)
    copies = {name.removesuffix(".int8") for name in names if name.endswith(".int8")}
    assert copies
    assert not copies & names


def test_the_head_stays_as_it_is(tmp_path: Path) -> None:
    # This Llama's head is tied; with one of its own, its float32 weights are read, not integers.
    case = QUANTIZED["llama"]
    model = case.model()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    inputs = case.inputs(2, 6)
    traced = traced_step(model, inputs, case.labels(model, inputs))
    names = stored(emitted(model, traced, tmp_path, train_precision="int8"))
    assert "lm_head.weight" in names
    assert "lm_head.weight.int8" not in names
    assert any(name.endswith("down_proj.weight.int8") for name in names)


def test_rows_whose_gradient_is_zero_or_tiny_keep_their_digits(tmp_path: Path) -> None:
    # One counted target: other texts' rows are zeros, earlier tokens' get what attention gives
    # them. One scale for all rows would leave those few of its 255 steps.
    model, inputs, targets, traced = quantized_training("llama")
    last = int((targets.flatten() != -100).nonzero()[-1])
    only = torch.full_like(targets, -100)
    only.view(-1)[last] = targets.flatten()[last]
    given = drawn_factors(model, 8)
    running = session(emitted(model, traced, tmp_path, train_precision="int8-backward"))
    feed = {"inputs": inputs.numpy(), "targets": only.numpy(), **given}
    _, *gradients = running.run(None, feed)
    tensors = [torch.from_numpy(value) for value in given.values()]
    _, *wanted = step_of(model, list(factors(model)), inputs, only, tensors)
    row = np.concatenate([gradient.ravel() for gradient in gradients])
    true = np.concatenate([gradient.numpy().ravel() for gradient in wanted])
    assert np.isfinite(row).all()
    assert cosine(row, true) > 0.999


def test_the_manifest_says_that_training_is_approximate(tmp_path: Path) -> None:
    base = small(seeded(Mlp128))
    lora = LoraConfig(target_modules=("first",))
    options: dict[str, Any] = {"lora": lora, "train": ["4"]}
    exact = export_bundle(base, tmp_path / "b", **options)
    assert exact.train_precision == "exact"
    assert exact.graphs["train_4.onnx"].difference <= 5e-5
    rough = export_bundle(base, tmp_path / "b", train_precision="int8", **options)
    assert rough.train_precision == "int8"
    assert read_manifest(tmp_path / "b").train_precision == "int8"
    # Inference is exact; that training is not is measured and said.
    assert rough.graphs["infer.onnx"].difference <= 1e-5
    assert 1e-4 < rough.graphs["train_4.onnx"].difference < 0.3
    path = tmp_path / "b" / "manifest.json"
    path.write_text(path.read_text().replace('"train_precision": "int8"', '"train_precision": 8'))
    with pytest.raises(FormatError, match="train_precision: expected exact, int8-backward or int8"):
        read_manifest(tmp_path / "b")


def test_nothing_to_approximate_is_refused(tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=("first",))
    with pytest.raises(UnsupportedError, match="leave --train-precision out"):
        export_bundle(
            small(seeded(Mlp)), tmp_path / "b", lora=lora, train=["2"], train_precision="int8"
        )


class Mlp128(torch.nn.Module):
    """Wide enough for int8: weights of a few numbers are left as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(128, 128), torch.nn.Linear(128, 128)
        self.head = torch.nn.Linear(128, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.first(x).relu()
        result: torch.Tensor = self.head(self.second(hidden).relu())
        return result
