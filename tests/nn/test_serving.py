"""An adapter that is added to the weights for a while against the same adapter beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.nn import extract_adapter, inject_lora, load_adapter_into
from fedlora.nn import serving as serving_module
from fedlora.nn.inject import lora_modules
from fedlora.nn.serving import serving
from tests.nn.models import Many, Mlp, TiedLm, seeded

INPUTS = {
    Mlp: torch.randn(4, 6, generator=torch.Generator().manual_seed(1)),
    Many: torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1)),
    TiedLm: torch.tensor([[1, 2, 3], [4, 5, 0]]),
}


def adapted(kind: type[nn.Module], variant: str = "lora") -> tuple[nn.Module, Adapter]:
    """A model with LoRA on everything that takes it, and an adapter whose B is not zero."""
    model = seeded(kind)
    layers = {Mlp: "all-linear", Many: ["conv", "twice", "classifier"], TiedLm: ["embed", "mix"]}
    inject_lora(model, LoraConfig(rank=2, target_modules=layers[kind], variant=variant), seed=0)
    random = np.random.default_rng(0)
    adapter = extract_adapter(model)
    changed = {
        path: LoraLayer(
            layer.A,
            random.normal(size=layer.B.shape).astype(np.float32),
            layer.scaling,
            layer.magnitude,
            layer.kind,
        )
        for path, layer in adapter.layers.items()
    }
    return model, Adapter(changed, adapter.config, adapter.base)


@pytest.mark.parametrize(
    ("kind", "variant"),
    [(Mlp, "lora"), (Mlp, "dora"), (Many, "lora"), (TiedLm, "lora")],
)
def test_outputs_are_those_of_the_adapter_beside_the_base(kind, variant):
    model, adapter = adapted(kind, variant)
    load_adapter_into(model, adapter)
    with torch.no_grad():
        beside = model(INPUTS[kind])
        load_adapter_into(model, extract_adapter(model))
        with serving(model, adapter):
            served = model(INPUTS[kind])
        after = model(INPUTS[kind])
    # float32: the same sum in another order
    torch.testing.assert_close(served, beside, atol=2e-6, rtol=1e-5)
    assert torch.equal(after, beside)


def test_the_frozen_weights_are_not_touched_and_b_zero_is_the_base_bit_for_bit():
    base = seeded(Mlp)
    with torch.no_grad():
        expected = base(INPUTS[Mlp])
    model = seeded(Mlp)
    inject_lora(model, LoraConfig(rank=2, target_modules="all-linear"), seed=0)
    initial = extract_adapter(model)
    weights = [module.base_layer.weight for module in lora_modules(model).values()]
    before = [weight.clone() for weight in weights]
    with torch.no_grad(), serving(model, initial):
        assert torch.equal(model(INPUTS[Mlp]), expected)
    with torch.no_grad(), serving(model, adapted(Mlp)[1]):
        assert not torch.equal(model(INPUTS[Mlp]), expected)
    assert all(map(torch.equal, weights, before))


def test_a_large_model_keeps_its_adapter_beside_the_base(monkeypatch):
    monkeypatch.setattr(serving_module, "MERGED_WEIGHTS", 10)
    model, adapter = adapted(Mlp)
    with serving(model, adapter):
        assert not any("forward" in vars(module) for module in lora_modules(model).values())
        assert extract_adapter(model) == adapter


def test_the_adapter_is_beside_the_base_again_after_an_error():
    model, adapter = adapted(Mlp)
    with pytest.raises(KeyError), serving(model, adapter):
        raise KeyError
    assert not any("forward" in vars(module) for module in lora_modules(model).values())
