"""4-bit weights: what is stored, and that training and inference are those of the rounded base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fedlora.errors import UnsupportedError
from fedlora.export.emit import emit
from fedlora.export.four_bits import packed_blocks
from tests.export.test_emit import (
    GRADIENT,
    QUANTIZED,
    quantized_forward,
    quantized_training,
    torch_logits,
)
from tests.export.traces import (
    base,
    base_weights,
    drawn_factors,
    emitted,
    factors,
    session,
    step_of,
)


def rounded(rows: np.ndarray) -> np.ndarray:
    """The slow twin: each block of 32 in multiples of its largest number / -8, from -8 to 7."""
    found = np.empty_like(rows)
    for i, row in enumerate(rows):
        for start in range(0, len(row), 32):
            block = row[start : start + 32]
            scale = np.float32(block[np.abs(block).argmax()] / -8) or np.float32(1)
            found[i, start : start + 32] = np.rint(block / scale).clip(-8, 7) * scale
    return found


def test_blocks_are_packed_low_half_first() -> None:
    rows = np.zeros((2, 64), np.float32)
    rows[0, :4] = [-8, 7, 1, -3]  # scale 1: codes 0, 15, 9, 5
    rows[0, 32:34] = [4, -2]  # scale -0.5: codes 0, 12
    packed, scales = packed_blocks(rows)
    assert packed.shape == (2, 2, 16)
    assert scales.tolist() == [[1, -0.5], [1, 1]]
    assert packed[0, 0, :2].tolist() == [0xF0, 0x59]
    assert packed[0, 1, 0] == 0xC0
    assert (packed[1] == 0x88).all()


def rounded_base(model: nn.Module, path: Path) -> None:
    stored = {t.name for t in onnx.load(path, load_external_data=False).graph.initializer}
    assert any(name.endswith(".int4") for name in stored)
    for name, weight in base(model).items():
        if f"{name}.int8" in stored:  # a table
            scale = weight.abs().amax(1, keepdim=True) / 127
            weight.copy_((weight / scale).round() * scale)
        if f"{name}.int4" in stored:
            turned = ".c_" in name  # Conv1D has (in, out)
            rows = (weight.T if turned else weight).contiguous().numpy()
            by_output = torch.from_numpy(rounded(rows))
            weight.copy_(by_output.T if turned else by_output)


@pytest.mark.parametrize("name", QUANTIZED)
def test_training_is_training_on_the_rounded_base(name: str, tmp_path: Path) -> None:
    model, inputs, targets, traced = quantized_training(name)
    path = emitted(model, traced, tmp_path, precision="int4")
    running = session(path)
    rounded_base(model, path)
    given = drawn_factors(model, 8)
    loss, *gradients = running.run(
        None, {"inputs": inputs.numpy(), "targets": targets.numpy(), **given}
    )
    tensors = [torch.from_numpy(value) for value in given.values()]
    expected, *wanted = step_of(model, list(factors(model)), inputs, targets, tensors)
    assert loss == pytest.approx(expected.item(), rel=2e-6)  # sums in another order
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for found, gradient in zip(gradients, wanted, strict=True):
        assert np.abs(found - gradient.numpy()).max() <= GRADIENT * scale


@pytest.mark.parametrize("name", QUANTIZED)
def test_inference_is_that_of_the_rounded_base(name: str, tmp_path: Path) -> None:
    case = QUANTIZED[name]
    model, traced = quantized_forward(name)
    path = emitted(model, traced, tmp_path, precision="int4")
    running = session(path)
    given, inputs = drawn_factors(model, 4), case.inputs(4, 7)
    (found,) = running.run(None, {"inputs": inputs.numpy(), **given})
    rounded_base(model, path)
    expected = torch_logits(model, inputs, given)
    # ONNX Runtime's product of 4-bit weights rounds nothing else.
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_both_kinds_of_graph_share_the_bytes(tmp_path: Path) -> None:
    model, _, _, step = quantized_training("llama")
    weights = base_weights(model)
    emit(step, weights, precision="int4")
    weights.write(tmp_path)
    before = (tmp_path / "base.onnx.data").stat().st_size
    emit(quantized_forward("llama")[1], weights, precision="int4")
    weights.write(tmp_path)
    assert (tmp_path / "base.onnx.data").stat().st_size == before


def test_approximate_training_on_it_is_refused() -> None:
    model, _, _, step = quantized_training("llama")
    with pytest.raises(UnsupportedError, match="expected exact training on an int4 base"):
        emit(step, base_weights(model), precision="int4", train_precision="int8")
