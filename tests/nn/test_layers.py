"""What each wrapper computes: the base with the weight W + scaling · B · A, for any shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from fedlora.adapter import LoraLayer
from fedlora.nn.layers import LoraModule, spec_of, wrap

SIZES = st.integers(1, 5)


def wrapped(base: nn.Module, rank: int = 2, dora: bool = False, dropout: float = 0.0) -> LoraModule:
    """LoRA with random factors of order one around `base`."""
    spec = spec_of(base)
    assert spec is not None
    random = np.random.default_rng(0)
    A = random.normal(size=(rank, *spec.in_shape)).astype(np.float32)
    module = wrap("layer", base, A, 1.5, dora=dora, dropout=dropout)
    B = random.normal(size=(spec.out_features, rank))
    module.set_layer(replace(module.layer(), B=B), dropout)
    return module


def expected(base: nn.Module, layer: LoraLayer, x: Tensor) -> Tensor:
    delta = torch.tensor(layer.delta_weight)
    if layer.kind == "embedding":
        delta = delta.T
    return functional_call(base, {"weight": base.weight + delta}, x)


@given(lead=st.lists(st.integers(0, 3), max_size=3), rows=SIZES, columns=SIZES, rank=SIZES)
def test_linear_takes_any_leading_shape(
    lead: list[int], rows: int, columns: int, rank: int
) -> None:
    torch.manual_seed(0)
    base = nn.Linear(columns, rows)
    module = wrapped(base, rank)
    x = torch.randn(*lead, columns)
    torch.testing.assert_close(module(x), expected(base, module.layer(), x), rtol=1e-5, atol=1e-5)


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dilated": (lambda: nn.Conv1d(2, 3, 3, dilation=2), (2, 2, 9)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 2, 5, 5)),
    "strided": (lambda: nn.Conv2d(2, 3, 2, stride=2, bias=False), (2, 2, 6, 6)),
    "one pixel": (lambda: nn.Conv2d(1, 1, 1), (1, 1, 1, 1)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("dora", [False, True])
def test_a_convolution_is_its_base_with_another_weight(name: str, dora: bool) -> None:
    """PEFT computes another thing, or fails, with dilation and padding modes."""
    make, shape = CONVOLUTIONS[name]
    torch.manual_seed(0)
    base, x = make(), torch.randn(shape)
    module = wrapped(base, dora=dora)
    if dora:
        merged = functional_call(base, {"weight": module.merged_weight()}, x)
    else:
        merged = expected(base, module.layer(), x)
    torch.testing.assert_close(module(x), merged, rtol=1e-5, atol=1e-5)


def test_a_scaled_embedding_scales_the_adapter_too() -> None:
    """Gemma's embedding multiplies what it looks up."""

    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale

    torch.manual_seed(0)
    base, ids = Scaled(5, 4), torch.arange(5)
    for dora in (False, True):
        module = wrapped(base, dora=dora)
        merged = functional_call(base, {"weight": module.merged_weight()}, ids)
        torch.testing.assert_close(module(ids), merged, rtol=1e-5, atol=1e-5)


def test_dropout_is_active_in_training_only_and_drops_for_the_adapter_only() -> None:
    base = nn.Linear(6, 5)
    module = wrapped(base, dropout=0.999).train()
    x = torch.ones(3, 6)
    torch.manual_seed(0)
    torch.testing.assert_close(module(x), base(x))
    assert not torch.allclose(module.eval()(x), base(x))


def test_hooks_on_the_frozen_layer_still_run() -> None:
    base, seen = nn.Linear(6, 5), []
    base.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    wrapped(base)(torch.ones(3, 6))
    assert seen == [(3, 5)]


def test_attributes_are_those_of_the_frozen_layer() -> None:
    base = nn.Linear(6, 5)
    module = wrapped(base)
    assert (module.in_features, module.out_features) == (6, 5)
    assert module.weight is base.weight
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'nonsense'"):
        module.nonsense  # noqa: B018
    assert repr(module).startswith("LoraLinear(\n  rank=2, scaling=1.5\n  (base_layer): Linear(")


def test_the_layer_can_be_differentiated_twice() -> None:
    """Attacks that reconstruct data from gradients need that."""
    module = wrapped(nn.Linear(3, 2))
    x = torch.randn(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x).square().sum(), [module.lora_A], create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), [x])
    assert float(second.abs().max()) > 0


def test_what_cannot_carry_lora_has_no_description() -> None:
    for module in (nn.LayerNorm(4), nn.Conv1d(4, 4, 1, groups=2), nn.ReLU(), nn.BatchNorm1d(4)):
        assert spec_of(module) is None
