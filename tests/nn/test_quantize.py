"""A quantized base: what its bits stand for, whom its rows depend on, and what stays as it was."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fedlora.adapter import LoraConfig
from fedlora.errors import ConfigError, MissingExtraError, UnsupportedError
from fedlora.experiment import BaseConfig, DataConfig
from fedlora.nn import (
    base_fingerprint,
    extract_adapter,
    inject_lora,
    layer_specs,
    load_base,
    merge_lora,
    remove_lora,
    train_local,
)
from fedlora.nn import quantize as module
from fedlora.nn.inject import lora_modules
from fedlora.nn.llama import Llama, LlamaConfig
from fedlora.nn.quantize import LAYERS, Quantize, QuantizedLinear, quantize_base
from fedlora.training import TrainConfig
from fedlora.world import open_world
from tests.nn.models import Many, Mlp, TiedLm, seeded
from tests.reference.quantize import int8_weight, nf4_weight

KINDS: tuple[Quantize, ...] = ("nf4", "int8")
ORACLE = {"nf4": nf4_weight, "int8": int8_weight}
LORA = LoraConfig(rank=2, lora_alpha=4, target_modules=("q_proj", "down_proj"))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(out: int, in_: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(in_, out, bias).requires_grad_(False)
    layer.weight.copy_(random(out, in_, seed=seed))
    return layer


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(out=st.integers(1, 70), in_=st.integers(1, 200), bias=st.booleans())
def test_the_weight_is_that_of_the_format_for_every_shape(
    kind: Quantize, out: int, in_: int, bias: bool
) -> None:
    layer = linear(out, in_, bias, seed=out)
    quantized = LAYERS[kind](layer)
    expected = ORACLE[kind](layer.weight.numpy())
    assert quantized.weight.shape == (out, in_)
    # A product of the same two float32 numbers, of which one was divided in another order.
    np.testing.assert_allclose(quantized.weight.numpy(), expected, rtol=3e-7, atol=1e-7)
    x = random(3, in_, seed=1)
    assert torch.equal(quantized(x), F.linear(x, quantized.weight, layer.bias))


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_zeros_stays_zero_and_others_are_near(kind: Quantize) -> None:
    layer = linear(64, 96)
    layer.weight[3] = 0
    found = LAYERS[kind](layer).weight
    assert not found[3].any()
    error = (found - layer.weight).norm() / layer.weight.norm()
    # Of a normal weight: QLoRA's 4 bits about 9 %; 8 bits a row, steps of max / 127 over sqrt(12).
    assert error < {"nf4": 0.1, "int8": 0.01}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_weight_it_computed_with(kind: Quantize) -> None:
    quantized = LAYERS[kind](linear(24, 40))
    x, upstream = random(5, 7, 40, seed=1).requires_grad_(), random(5, 7, 24, seed=2)
    (found,) = torch.autograd.grad(quantized(x), x, upstream)
    same = x.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.linear(same, quantized.weight), same, upstream)
    assert torch.allclose(found, expected, atol=1e-6)  # sums of 24 float32 in another order


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_other_rows_of_its_batch(kind: Quantize) -> None:
    quantized = LAYERS[kind](linear(96, 128))
    x = random(16, 128, seed=1)
    wild = x.clone()
    wild[1:] *= 1e4  # LLM.int8 would take these columns out of every row
    assert torch.equal(quantized(x)[0], quantized(wild)[0])
    together = quantized(x)
    for row in range(len(x)):
        # One row and sixteen are multiplied in blocks of other sizes.
        assert torch.allclose(together[row], quantized(x[row]), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_clients_of_one_batch_get_the_gradients_that_they_have_alone(kind: Quantize) -> None:
    model = llama()
    inject_lora(model, LoraConfig(rank=2), seed=0)
    quantize_base(model, kind)
    embed = cast(Any, model).model.embed_tokens
    ids = torch.randint(1, 40, (6, 9), generator=torch.Generator().manual_seed(0))
    inputs: list[Tensor] = []
    handle = embed.register_forward_hook(lambda *a: inputs.append(a[2].requires_grad_()))

    def gradient(rows: Tensor) -> Tensor:
        inputs.clear()
        model(rows).log_softmax(-1)[..., 3].sum().backward()
        found = inputs[0].grad
        assert found is not None
        return found

    together = gradient(ids)
    for start in (0, 2, 4):
        alone = gradient(ids[start : start + 2])
        # Other numbers of rows are multiplied in blocks of other sizes.
        assert torch.allclose(together[start : start + 2], alone, atol=1e-5)
    handle.remove()


def test_the_graph_does_not_keep_the_weight() -> None:
    quantized = LAYERS["int8"](linear(64, 64))
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        quantized(random(2, 64).requires_grad_())
    assert kept == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_conv1d_is_turned_round(kind: Quantize) -> None:
    layer = Conv1D(5, 64).requires_grad_(False)
    quantized = LAYERS[kind](layer)
    assert (quantized.in_features, quantized.out_features) == (64, 5)
    assert quantized.bias is layer.bias
    np.testing.assert_allclose(
        quantized.weight.numpy(), ORACLE[kind](layer.weight.t().numpy()), rtol=3e-7, atol=1e-7
    )


def llama() -> nn.Module:
    """Its rows are not whole blocks of NF4: 48 and 40 inputs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=40,
    )  # fmt: skip
    return Llama(config).eval()


def quantized_names(model: nn.Module) -> list[str]:
    return [name for name, child in model.named_modules() if isinstance(child, QuantizedLinear)]


def test_output_embeddings_and_shared_weights_are_left_as_they_are() -> None:
    mlp, tied, many = seeded(Mlp), seeded(TiedLm), seeded(Many)
    assert quantize_base(mlp, "int8") == 2
    assert quantized_names(mlp) == ["first", "second"]
    assert quantize_base(tied, "int8") == 1
    assert quantized_names(tied) == ["mix"]
    assert quantize_base(many, "int8") == 1
    assert cast(Any, many).twice is cast(Any, many).again


def test_a_new_zero_head_is_left_as_it_is() -> None:
    model = load_base("tiny-chat", num_classes=5).model
    assert quantize_base(model, "int8") == 3 * 7
    assert type(model.zero_head) is nn.Linear


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_specs_and_adapter_stay_those_of_the_full_base(kind: Quantize) -> None:
    model = load_base("tiny-chat").model
    fingerprint, specs = base_fingerprint(model), layer_specs(model)
    inject_lora(model, LORA, seed=0)
    before = extract_adapter(model)
    quantize_base(model, kind)
    assert base_fingerprint(model) == fingerprint
    assert layer_specs(model) == specs
    assert extract_adapter(model) == before
    assert before.base == fingerprint
    remove_lora(model)
    assert len(quantized_names(model)) == 3 * 7
    assert base_fingerprint(model) == fingerprint
    inject_lora(model, LORA, seed=0)
    assert extract_adapter(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_a_base_with_the_dequantized_weights(kind: Quantize) -> None:
    plain, quantized = llama(), llama()
    with torch.no_grad():
        for path, spec in layer_specs(plain).items():
            if spec.kind == "linear" and not spec.is_output:
                weight = plain.get_submodule(path).weight
                weight.copy_(torch.from_numpy(ORACLE[kind](weight.numpy())))  # type: ignore[operator, arg-type]
    for model in (plain, quantized):
        inject_lora(model, LORA, seed=0, base="x")
    quantize_base(quantized, kind)
    ids = np.random.default_rng(0).integers(1, 40, (4, 12))
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
    config = TrainConfig(local_steps=5, learning_rate=0.05, optimizer="sgd")
    expected, found = (train_local(m, [batch] * 5, config) for m in (plain, quantized))
    assert found.loss == pytest.approx(expected.loss, abs=1e-4)
    for path, layer in expected.adapter.layers.items():
        # The plain base adds LoRA's product in place, the quantized one after: other roundings.
        np.testing.assert_allclose(found.adapter[path].A, layer.A, atol=1e-5)
        np.testing.assert_allclose(found.adapter[path].B, layer.B, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_worlds_copy_shares_the_bits_and_has_its_own_factors(kind: Quantize) -> None:
    world = open_world(
        BaseConfig("tiny-chat", quantize=kind), DataConfig("chitchat", "next-token", 2), LORA, 0
    )
    other = world.copy()
    ours, theirs = dict(world.model.named_buffers()), dict(other.model.named_buffers())
    assert len(ours) >= 2 * 3 * 7
    assert all(theirs[name] is tensor for name, tensor in ours.items())
    for path, layer in lora_modules(other.model).items():
        assert layer.base_layer is not lora_modules(world.model)[path].base_layer
        assert layer.lora_A is not lora_modules(world.model)[path].lora_A
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(world.model(ids), other.model(ids))


def test_the_full_weights_are_let_go() -> None:
    model = load_base("tiny-chat").model
    inject_lora(model, LORA, seed=0)
    layer = cast(Any, lora_modules(model)["model.layers.0.mlp.down_proj"].base_layer)
    alone, under_lora = model.model.layers[0].mlp.up_proj.weight, layer.weight  # type: ignore[index, union-attr]
    weights = [weakref.ref(alone), weakref.ref(under_lora)]
    del layer, alone, under_lora
    quantize_base(model, "int8")
    gc.collect()
    assert [weight() for weight in weights] == [None, None]


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_done_with_a_quantized_base_is_refused(kind: Quantize) -> None:
    model = seeded(Mlp)
    inject_lora(model, LoraConfig(rank=2), seed=0)
    merge_lora(model)
    with pytest.raises(ConfigError, match="the adapter is merged into the base"):
        quantize_base(model, kind)
    remove_lora(model)
    inject_lora(model, LoraConfig(rank=2), seed=0)
    quantize_base(model, kind)
    with pytest.raises(UnsupportedError, match="merge_lora: the base is quantized"):
        merge_lora(model)
    with pytest.raises(ConfigError, match="quantized already"):
        quantize_base(model, kind)
    with pytest.raises(ConfigError, match="Sequential has no linear layer below its output"):
        quantize_base(nn.Sequential(nn.Conv1d(2, 2, 1)), kind)


def test_an_adapter_of_the_full_base_fits_a_copy_of_the_quantized_model() -> None:
    model = seeded(Mlp)
    inject_lora(model, LoraConfig(rank=2, variant="dora"), seed=0)
    quantize_base(model, "int8")
    x = random(3, 6)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_nf4_without_its_extra_is_refused_before_the_base_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    module._bitsandbytes.cache_clear()
    with pytest.raises(MissingExtraError, match=r"pip install 'fedlora\[quant\]'"):
        open_world(
            BaseConfig(str(tmp_path), quantize="nf4"), DataConfig("chitchat", "next-token"), LORA, 0
        )
    module._bitsandbytes.cache_clear()


def test_importing_bitsandbytes_asks_no_package_for_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    present = type(sys)("kernels")
    monkeypatch.setitem(sys.modules, "kernels", present)
    with module._no_kernels_from_the_hub(), pytest.raises(ImportError):
        import kernels  # type: ignore[import-not-found]  # noqa: F401
    assert sys.modules["kernels"] is present
