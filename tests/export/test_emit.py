"""Whole models, emitted and run by ONNX Runtime, against torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from fedlora.errors import UnsupportedError
from fedlora.export.emit import emit
from fedlora.export.traced import Traced
from fedlora.nn.llama import Llama, LlamaConfig
from fedlora.nn.watch_cnn import WatchCNN
from tests.export.traces import (
    base,
    base_weights,
    drawn_factors,
    emitted,
    factors,
    logits_of,
    session,
    step_of,
    traced_forward,
    traced_step,
    with_lora,
)

RANKS = (1, 4, 8, 16)
# Rounding of sums in another order, in float32: relative to the largest logit.
FORWARD = 1e-5
# The same through a backward pass; relative to the largest gradient.
GRADIENT = 5e-5


class Case:
    """A model, inputs and targets of it, and other inputs of other sizes."""

    def __init__(self, make: Callable[[], nn.Module], targets: Any, free: dict[int, str]) -> None:
        self.make, self.targets, self.free = make, targets, free

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return with_lora(self.make(), self.targets)

    def inputs(self, rows: int, time: int) -> Tensor:
        generator = torch.Generator().manual_seed(rows * 100 + time)
        if 1 in self.free:
            return torch.randint(1, 97, (rows, time), generator=generator)
        return torch.randn((rows, 6, 50), generator=generator)

    def labels(self, model: nn.Module, inputs: Tensor) -> Tensor:
        classes = logits_of(model, {}, inputs).shape
        labels = torch.randint(0, classes[-1], classes[:-1])
        labels.view(-1)[0] = -100
        return labels


# GPT-2 and one Llama have two blocks, the others one: tracing takes its time by block.
def llama(blocks: int = 1) -> nn.Module:
    return Llama(LlamaConfig(97, 32, blocks, 4, 2, 48))


def bert(size: int = 32) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": size, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = BertConfig(
        vocab_size=97, intermediate_size=48, num_labels=3, attn_implementation="eager", **sizes
    )
    return BertForSequenceClassification(config)


def gpt2(size: int = 32) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=97, n_positions=32, n_embd=size, n_layer=2, n_head=4, use_cache=False,
        attn_implementation="eager", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Causal(GPT2LMHeadModel(config))


def hugging_face_llama() -> nn.Module:
    from transformers import LlamaConfig as Config
    from transformers import LlamaForCausalLM

    config = Config(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    return Causal(LlamaForCausalLM(config))


class Causal(nn.Module):
    """Gives transformers a mask and positions: making them itself, it looks at numbers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        rows, time = inputs.shape
        mask = torch.full((time, time), float("-inf")).triu(1).expand(rows, 1, time, time)
        return self.model(inputs, attention_mask=mask, position_ids=torch.arange(time)[None]).logits


TEXT = {0: "batch", 1: "time"}
CASES = {
    "llama": Case(llama, "all-linear", TEXT),
    "llama with an adapted embedding": Case(lambda: llama(2), ["embed_tokens", "v_proj"], TEXT),
    "bert": Case(bert, ["query", "value"], TEXT),
    "gpt-2": Case(gpt2, ["c_attn", "c_fc"], TEXT),
    "transformers' llama": Case(hugging_face_llama, ["q_proj", "down_proj"], TEXT),
    "watch-cnn": Case(WatchCNN, ["conv1", "conv2", "conv3", "hidden"], {0: "batch"}),
}


# Tracing is most of what these tests take, so each graph is traced once.
@cache
def forward_of(name: str) -> tuple[nn.Module, Traced]:
    case = CASES[name]
    model = case.model()
    return model, traced_forward(model, case.inputs(3, 5), case.free)


Training = tuple[nn.Module, Tensor, Tensor, Traced]


@cache
def training_of(name: str) -> Training:
    case = CASES[name]
    model = case.model()
    inputs = case.inputs(2, 6)
    targets = case.labels(model, inputs)
    return model, inputs, targets, traced_step(model, inputs, targets)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_torchs_for_any_rank_and_size(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, traced = forward_of(name)
    running = session(emitted(model, traced, tmp_path))
    for rank, rows, time in zip(RANKS, (1, 2, 5, 3), (1, 9, 4, 5), strict=True):
        given, inputs = drawn_factors(model, rank), case.inputs(rows, time)
        (found,) = running.run(None, {"inputs": inputs.numpy(), **given})
        expected = torch_logits(model, inputs, given)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= FORWARD * max(1, np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_without_factors_the_logits_are_the_bases(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, traced = forward_of(name)
    running = session(emitted(model, traced, tmp_path))
    inputs = case.inputs(2, 6)
    (found,) = running.run(None, {"inputs": inputs.numpy()})
    zeros = {key: np.zeros_like(value) for key, value in drawn_factors(model, 1).items()}
    expected = torch_logits(model, inputs, zeros)
    assert np.abs(found - expected).max() <= FORWARD * max(1, np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_torchs_for_any_rank(name: str, tmp_path: Path) -> None:
    model, inputs, targets, traced = training_of(name)
    running = session(emitted(model, traced, tmp_path))
    for rank in RANKS:
        given = drawn_factors(model, rank)
        feed = {"inputs": inputs.numpy(), "targets": targets.numpy(), **given}
        loss, *gradients = running.run(None, feed)
        tensors = [torch.from_numpy(value) for value in given.values()]
        expected, *wanted = step_of(model, list(factors(model)), inputs, targets, tensors)
        assert abs(loss - expected.item()) <= FORWARD * max(1, abs(expected.item()))
        scale = max(float(gradient.abs().max()) for gradient in wanted)
        for found, gradient in zip(gradients, wanted, strict=True):
            assert found.shape == gradient.shape
            assert np.abs(found - gradient.numpy()).max() <= GRADIENT * scale


def test_layers_may_have_different_ranks(tmp_path: Path) -> None:
    model, inputs, targets, traced = training_of("llama with an adapted embedding")
    running = session(emitted(model, traced, tmp_path))
    names = list(factors(model))
    by_rank = {rank: drawn_factors(model, rank) for rank in (1, 4, 8)}
    layers = sorted({name.rsplit(".", 1)[0] for name in names})
    rank_of = {layer: (1, 4, 8)[place % 3] for place, layer in enumerate(layers)}
    given = {
        f"{name}.weight": by_rank[rank_of[name.rsplit(".", 1)[0]]][f"{name}.weight"]
        for name in names
    }
    loss, *gradients = running.run(
        None, {"inputs": inputs.numpy(), "targets": targets.numpy(), **given}
    )
    tensors = [torch.from_numpy(value) for value in given.values()]
    expected, *wanted = step_of(model, names, inputs, targets, tensors)
    assert loss == pytest.approx(expected.item(), rel=FORWARD)
    for found, gradient in zip(gradients, wanted, strict=True):
        assert np.abs(found - gradient.numpy()).max() <= GRADIENT


def slow_but(*kept: str) -> list[Any]:
    """The names of all cases; what the others show is shown by the kept ones by default."""
    return [n if n in kept else pytest.param(n, marks=pytest.mark.slow) for n in CASES]


# Each is traced a second time: by default one of ours, with all kinds of factors, and one of
# convolutions.
@pytest.mark.parametrize("name", slow_but("llama with an adapted embedding", "watch-cnn"))
def test_the_same_trace_gives_the_same_bytes(name: str) -> None:
    both = []
    for make in (training_of, training_of.__wrapped__):  # the second traces anew
        model, _, _, traced = make(name)
        both.append(emit(traced, base_weights(model)).SerializeToString(deterministic=True))
    assert both[0] == both[1]


def test_no_weight_is_copied_or_transposed() -> None:
    model, _, _, traced = training_of("llama")
    proto = emit(traced, base_weights(model))
    outside = {t.name for t in proto.graph.initializer if t.external_data}
    readers = {node.op_type for node in proto.graph.node for name in node.input if name in outside}
    # Norm weights are in Mul.
    assert readers == {"Gemm", "MatMul", "Gather", "Mul"}
    assert "lm_head.weight" not in outside  # tied to the embedding, and stored once


def test_required_factors_have_no_defaults() -> None:
    model, traced = forward_of("watch-cnn")
    proto = emit(traced, base_weights(model), required_factors=True)
    names = {tensor.name for tensor in proto.graph.initializer}
    assert not names & {value.name for value in proto.graph.input}
    optional = emit(traced, base_weights(model))
    names = {tensor.name for tensor in optional.graph.initializer}
    assert names & {value.name for value in optional.graph.input} == set(traced.defaults)


def test_a_rank_that_another_axis_has_is_refused() -> None:
    model = with_lora(WatchCNN(), ["hidden"], rank=7)  # and it has seven classes
    inputs = torch.randn(2, 6, 50)
    traced = traced_step(model, inputs, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(
        UnsupportedError, match=r"traced with a free axis of size 7, which \S+, axis \d has"
    ):
        emit(traced, base_weights(model))


def torch_logits(model: nn.Module, inputs: Tensor, given: dict[str, Any]) -> Any:
    values = dict(zip(factors(model), map(torch.from_numpy, given.values()), strict=True))
    with torch.no_grad():
        return logits_of(model, values, inputs).numpy()


def test_nothing_of_the_machine_is_in_the_model() -> None:
    model, _, _, traced = training_of("llama")
    proto = emit(traced, base_weights(model))
    assert not proto.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    assert not proto.doc_string
    assert b".py" not in proto.SerializeToString()


QUANTIZED = {
    "bert": Case(lambda: bert(128), ["query", "value"], TEXT),
    "gpt-2": Case(lambda: gpt2(128), ["c_attn", "c_fc"], TEXT),
    "llama": Case(lambda: Llama(LlamaConfig(97, 128, 1, 4, 2, 160)), ["q_proj"], TEXT),
}


@cache
def _quantized_once(name: str) -> tuple[Training, dict[str, Tensor]]:
    case = QUANTIZED[name]
    model = case.model()
    inputs = case.inputs(2, 6)
    targets = case.labels(model, inputs)
    training = model, inputs, targets, traced_step(model, inputs, targets)
    return training, {key: value.clone() for key, value in model.state_dict().items()}


@cache
def _quantized_forward_once(name: str) -> Traced:
    case = QUANTIZED[name]
    return traced_forward(quantized_training(name)[0], case.inputs(3, 5), case.free)


def quantized_training(name: str) -> Training:
    """A model, inputs, targets and the trace of a step; the model's numbers are as at first."""
    training, first = _quantized_once(name)
    training[0].load_state_dict(first)  # into the same memory, which the traces read
    return training


def quantized_forward(name: str) -> tuple[nn.Module, Traced]:
    """The same model and the trace of its forward pass."""
    return quantized_training(name)[0], _quantized_forward_once(name)


def rounded_weights(model: nn.Module, stored: set[str]) -> None:
    """The slow twin: put the numbers that the integers stand for into torch's model."""
    for name, weight in base(model).items():
        if f"{name}.int8" not in stored:
            continue
        conv1d = ".c_" in name
        by_output = weight.T if conv1d else weight
        scale = by_output.abs().amax(1, keepdim=True) / 127
        weight.copy_(
            ((by_output / scale).round() * scale).T
            if conv1d
            else (by_output / scale).round() * scale
        )


@pytest.mark.parametrize("name", QUANTIZED)
def test_training_on_int8_is_training_on_the_rounded_base(name: str, tmp_path: Path) -> None:
    model, inputs, targets, traced = quantized_training(name)
    path = emitted(model, traced, tmp_path, precision="int8")
    names = {tensor.name for tensor in onnx.load(path, load_external_data=False).graph.initializer}
    assert any(name.endswith(".int8") for name in names)
    running = session(path)
    rounded_weights(model, names)
    given = drawn_factors(model, 8)
    feed = {"inputs": inputs.numpy(), "targets": targets.numpy(), **given}
    loss, *gradients = running.run(None, feed)
    tensors = [torch.from_numpy(value) for value in given.values()]
    expected, *wanted = step_of(model, list(factors(model)), inputs, targets, tensors)
    assert loss == pytest.approx(expected.item(), rel=FORWARD)
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for found, gradient in zip(gradients, wanted, strict=True):
        assert np.abs(found - gradient.numpy()).max() <= GRADIENT * scale


@pytest.mark.parametrize("name", QUANTIZED)
def test_inference_on_int8_is_near_the_base(name: str, tmp_path: Path) -> None:
    case = QUANTIZED[name]
    model, traced = quantized_forward(name)
    weights = base_weights(model)
    path = emitted(model, traced, tmp_path, precision="int8")
    running = session(path)
    full = sum(array.nbytes for array in weights._arrays.values())
    stored = sum(
        int(entry.value)
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "length"
    )
    assert stored < 0.4 * full  # a quarter, and scales, biases, norms, a tied table
    given, inputs = drawn_factors(model, 4), case.inputs(4, 7)
    (found,) = running.run(None, {"inputs": inputs.numpy(), **given})
    expected = torch_logits(model, inputs, given)
    # Weights and activations in 127 steps: errors of about 1/127 of a number's scale, averaged.
    assert np.abs(found - expected).mean() <= 0.03 * np.abs(expected - expected.mean()).mean()
