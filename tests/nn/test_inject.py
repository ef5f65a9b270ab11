"""Injection, extraction, loading, merging: what changes, what must not, and what is refused."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.errors import (
    BaseMismatchError,
    ConfigError,
    FedloraError,
    LayerMismatchError,
    NonFiniteError,
    ShapeMismatchError,
    UnsupportedError,
)
from fedlora.formats import load_adapter, save_adapter
from fedlora.nn import (
    base_fingerprint,
    extract_adapter,
    inject_lora,
    layer_specs,
    load_adapter_into,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from fedlora.nn.inject import lora_modules
from fedlora.targets import LayerSpec, initial_adapter
from tests.nn.models import Many, Mlp, TiedLm, same_state, seeded, state

VARIANTS = ("lora", "rslora", "dora", "rsdora")
FEATURES = torch.linspace(-1, 1, 12).view(2, 6)
PICTURES = torch.linspace(-1, 1, 256).view(2, 2, 8, 8)
IDS = torch.arange(10).view(2, 5)


def config(**changes: Any) -> LoraConfig:
    return replace(LoraConfig(rank=2, lora_alpha=3), **changes)


def filled(adapter: Adapter, seed: int = 1) -> Adapter:
    """The same adapter with random factors, which change the outputs visibly."""
    random = np.random.default_rng(seed)

    def fill(layer: LoraLayer) -> LoraLayer:
        magnitude = layer.magnitude
        if magnitude is not None:
            magnitude = magnitude * random.uniform(0.5, 1.5, magnitude.shape)
        A, B = (random.normal(size=part.shape) for part in (layer.A, layer.B))
        return replace(layer, A=A, B=B, magnitude=magnitude)

    return adapter.map(fill)


def message(error: pytest.ExceptionInfo[FedloraError]) -> str:
    return str(error.value)


# Injection


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_injection_changes_no_output(variant: str) -> None:
    model = seeded(Mlp)
    before = model(FEATURES)
    inject_lora(model, config(variant=variant))
    torch.testing.assert_close(model(FEATURES), before, rtol=0, atol=1e-6)  # DoRA: m / norm ≈ 1


def test_the_first_factors_are_those_of_a_server_without_torch() -> None:
    model = seeded(Many)
    chosen = config(target_modules=("conv", "twice", "classifier"))
    expected = initial_adapter(layer_specs(model), chosen, 7, base_fingerprint(model))
    inject_lora(model, chosen, seed=7)
    assert extract_adapter(model) == expected
    assert extract_adapter(model).base == base_fingerprint(seeded(Many))


def test_only_the_factors_are_trainable() -> None:
    model = seeded(Mlp)
    inject_lora(model, config(variant="dora"))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        f"{layer}.{factor}"
        for layer in ("first", "second")
        for factor in ("lora_A", "lora_B", "magnitude")
    }


def test_injecting_twice_is_refused() -> None:
    model = seeded(Mlp)
    inject_lora(model, config())
    with pytest.raises(ConfigError) as error:
        inject_lora(model, config())
    assert message(error) == (
        "Mlp has LoRA already: call remove_lora first, or load_adapter_into to continue from "
        "another adapter"
    )


def test_a_misspelt_target_is_refused_and_leaves_the_model_alone() -> None:
    model = seeded(Mlp)
    before = state(model)
    with pytest.raises(ConfigError, match=r"no layer of the base is called 'secnd'.*'second'"):
        inject_lora(model, config(target_modules=("secnd",)))
    assert same_state(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


REFUSED = {
    "grouped convolution": (
        Many,
        "depthwise",
        "layer 'depthwise': a convolution in 4 groups cannot carry LoRA; leave it out of "
        "target_modules",
    ),
    "attention's output": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        "out_proj",
        "layer 'self_attn.out_proj': torch's attention reads this weight past the module's "
        "forward, so that LoRA would have no effect; leave it out of target_modules",
    ),
    "transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 2, 3)),
        "0",
        "layer '0': ConvTranspose1d cannot carry LoRA; leave it out of target_modules",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_named_layer_that_cannot_carry_lora_is_refused(case: str) -> None:
    make, target, expected = REFUSED[case]
    with pytest.raises(UnsupportedError) as error:
        inject_lora(make(), config(target_modules=(target,)))
    assert message(error) == expected


def test_dora_on_a_zero_weight_is_refused() -> None:
    model = seeded(Mlp)
    nn.init.zeros_(model.head.weight)
    with pytest.raises(UnsupportedError, match=r"layer 'head': DoRA divides .* 3 of 3 are zero"):
        inject_lora(model, config(variant="dora", target_modules=("head",)))


def test_a_module_that_is_used_twice_is_adapted_in_both_places() -> None:
    model = seeded(Many)
    inject_lora(model, config(target_modules=("twice",)))
    assert model.twice is model.again
    load_adapter_into(model, filled(extract_adapter(model)))
    unmerged = model(PICTURES)
    merge_lora(model)
    torch.testing.assert_close(model(PICTURES), unmerged, rtol=0, atol=1e-5)


def test_lora_on_a_tied_head_leaves_the_embedding_alone() -> None:
    model = seeded(TiedLm)
    rows = model.embed(IDS)
    inject_lora(model, config(target_modules=("lm_head",)))
    load_adapter_into(model, filled(extract_adapter(model)))
    assert torch.equal(model.embed(IDS), rows)
    assert not torch.allclose(model(IDS), seeded(TiedLm)(IDS))


def test_torchs_encoder_layer_uses_the_adapter_in_evaluation_too() -> None:
    """Its fast path reads the weights of its children and would skip LoRA without a word."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = model(x)
        inject_lora(model, config(target_modules=("linear1",)))
        load_adapter_into(model, filled(extract_adapter(model)))
        fast = model(x)
    assert torch.equal(fast, model(x).detach())
    assert not torch.allclose(fast, before)
    remove_lora(model)
    assert model.activation_relu_or_gelu == 1
    with torch.no_grad():
        assert torch.equal(model(x), before)


def test_an_injected_model_can_be_deep_copied() -> None:
    model = seeded(Mlp)
    inject_lora(model, config())
    twin = copy.deepcopy(model)
    load_adapter_into(twin, filled(extract_adapter(model)))
    assert extract_adapter(twin) == filled(extract_adapter(model))
    remove_lora(twin)
    assert same_state(twin, state(seeded(Mlp)))


# Removal


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [Mlp, TiedLm, Many])
def test_removal_gives_the_base_back_bit_for_bit(kind: type[nn.Module], variant: str) -> None:
    model = seeded(kind)
    before, classes = state(model), [type(module) for module in model.modules()]
    next(iter(model.parameters())).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    inject_lora(model, config(variant=variant))
    load_adapter_into(model, filled(extract_adapter(model)))
    if kind is not TiedLm:
        merge_lora(model)
    remove_lora(model)
    assert same_state(model, before)
    assert [type(module) for module in model.modules()] == classes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    inject_lora(model, config())  # and it can be injected again


NOT_INJECTED = (extract_adapter, remove_lora, merge_lora, unmerge_lora)


@pytest.mark.parametrize("call", NOT_INJECTED)
def test_a_model_without_lora_is_refused(call: Any) -> None:
    with pytest.raises(ConfigError) as error:
        call(seeded(Mlp))
    assert message(error) == "Mlp has no LoRA: call inject_lora first"


# Loading


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loaded_adapter_changes_the_output_and_comes_out_as_it_went_in(variant: str) -> None:
    model = seeded(Mlp)
    before = model(FEATURES)
    inject_lora(model, config(variant=variant))
    adapter = filled(extract_adapter(model))
    load_adapter_into(model, adapter)
    assert not torch.allclose(model(FEATURES), before, atol=1e-2)
    assert extract_adapter(model) == adapter


@pytest.mark.parametrize("name", ["folder", "packed.safetensors"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_and_loaded_adapter_changes_the_output_as_before(
    variant: str, name: str, tmp_path: Path
) -> None:
    first, second = seeded(Mlp), seeded(Mlp)
    inject_lora(first, config(variant=variant))
    load_adapter_into(first, filled(extract_adapter(first)))
    save_adapter(extract_adapter(first), tmp_path / name)
    inject_lora(second, config(variant=variant))
    assert not torch.allclose(first(FEATURES), second(FEATURES), atol=1e-2)
    load_adapter_into(second, load_adapter(tmp_path / name))
    assert torch.equal(first(FEATURES), second(FEATURES))


def test_the_output_is_that_of_the_base_plus_delta_weight() -> None:
    model = seeded(Mlp)
    inject_lora(model, config(target_modules=("first",)))
    adapter = filled(extract_adapter(model))
    load_adapter_into(model, adapter)
    found = model.first(FEATURES)
    delta = FEATURES @ torch.tensor(adapter.delta_weight("first")).T
    expected = seeded(Mlp).first(FEATURES) + delta
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_loading_takes_ranks_scalings_and_dropout_from_the_adapter() -> None:
    model, other = seeded(Mlp), seeded(Mlp)
    inject_lora(model, config(rank=2))
    wider = config(rank=5, lora_alpha=20, lora_dropout=0.25, rank_pattern={"first": 3})
    inject_lora(other, wider)
    adapter = filled(extract_adapter(other))
    load_adapter_into(other, adapter)
    parameters = [module.lora_A for module in lora_modules(model).values()]
    load_adapter_into(model, adapter)
    assert extract_adapter(model) == adapter
    assert extract_adapter(model).config == wider
    assert torch.equal(model(FEATURES), other(FEATURES))
    assert [m.dropout for m in lora_modules(model).values()] == [0.25, 0.25]
    assert all(a is m.lora_A for a, m in zip(parameters, lora_modules(model).values(), strict=True))


def test_writing_to_the_model_later_does_not_change_an_extracted_adapter() -> None:
    model = seeded(Mlp)
    inject_lora(model, config())
    adapter = extract_adapter(model)
    digest = adapter.fingerprint()
    with torch.no_grad():
        lora_modules(model)["first"].lora_B.fill_(1.0)
    assert adapter.fingerprint() == digest


def _without(adapter: Adapter) -> Adapter:
    return replace(adapter, layers={"first": adapter["first"]})


def _renamed(adapter: Adapter) -> Adapter:
    return replace(adapter, layers={"first": adapter["first"], "third": adapter["second"]})


def _misshapen(adapter: Adapter) -> Adapter:
    layer = replace(adapter["first"], A=np.ones((2, 7)))
    return replace(adapter, layers={**adapter.layers, "first": layer})


MISFITS: dict[str, tuple[Any, type[FedloraError], str]] = {
    "missing layer": (
        _without,
        LayerMismatchError,
        "load_adapter_into: expected the 2 layers that the model was injected with, found 1 "
        "missing (second); inject it with the adapter's target_modules",
    ),
    "missing and extra layer": (
        _renamed,
        LayerMismatchError,
        "load_adapter_into: expected the 2 layers that the model was injected with, found 1 "
        "missing (second) and 1 unexpected (third); inject it with the adapter's target_modules",
    ),
    "wrong shape": (
        _misshapen,
        ShapeMismatchError,
        "load_adapter_into, layer 'first': expected linear (6,) -> 8, found linear (7,) -> 8; the "
        "adapter is of another base",
    ),
    "another base": (
        lambda adapter: replace(adapter, base="f" * 64),
        BaseMismatchError,
        "load_adapter_into: the adapter was made for base ffffffffffff, this model is "
        "0123456789ab; load it on its own base",
    ),
    "another variant": (
        lambda adapter: Adapter(
            {p: replace(x, magnitude=np.ones(8)) for p, x in adapter.layers.items()},
            replace(adapter.config, variant="dora"),
        ),
        UnsupportedError,
        "load_adapter_into: the adapter's variant is 'dora', the model was injected with 'lora'; "
        "inject it with the adapter's config",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(case: str) -> None:
    change, kind, expected = MISFITS[case]
    model = seeded(Mlp)
    inject_lora(model, config(), base="0123456789abcdef")
    before = extract_adapter(model)
    with pytest.raises(kind) as error:
        load_adapter_into(model, change(before))
    assert message(error) == expected
    assert extract_adapter(model) == before


def test_an_adapter_without_a_base_fits_wherever_its_shapes_fit() -> None:
    model = seeded(Mlp)
    inject_lora(model, config())
    adapter = replace(filled(extract_adapter(model)), base=None)
    load_adapter_into(model, adapter)
    assert extract_adapter(model).base == base_fingerprint(model)


def test_extraction_names_the_layer_that_is_not_finite() -> None:
    model = seeded(Mlp)
    inject_lora(model, config())
    with torch.no_grad():
        lora_modules(model)["second"].lora_B[1, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layer 'second', B: .* nan at \(1, 0\)"):
        extract_adapter(model)


# Merging


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("kind", "inputs", "targets"),
    [
        (Mlp, FEATURES, "all-linear"),
        (Many, PICTURES, ("conv", "twice", "classifier")),
        (TiedLm, IDS, "mix"),
    ],
)
def test_merged_and_unmerged_agree_and_unmerging_is_bit_equal(
    kind: type[nn.Module], inputs: torch.Tensor, targets: Any, variant: str
) -> None:
    model = seeded(kind)
    inject_lora(model, config(variant=variant, target_modules=targets))
    load_adapter_into(model, filled(extract_adapter(model)))
    before, unmerged, adapter = state(model), model(inputs), extract_adapter(model)
    merge_lora(model)
    assert not same_state(model, before)
    scale = max(1.0, float(unmerged.detach().abs().max()))
    torch.testing.assert_close(model(inputs), unmerged, rtol=0, atol=1e-5 * scale)
    assert extract_adapter(model) == adapter
    unmerge_lora(model)
    assert same_state(model, before)
    assert torch.equal(model(inputs), unmerged)


@pytest.mark.parametrize("target", ["lm_head", "embed"])
def test_merging_a_tied_weight_is_refused(target: str) -> None:
    model = seeded(TiedLm)
    inject_lora(model, config(target_modules=("mix", target)))
    load_adapter_into(model, filled(extract_adapter(model)))
    before = state(model)
    with pytest.raises(UnsupportedError, match=f"layer '{target}': its weight is tied to that of"):
        merge_lora(model)
    assert same_state(model, before)


def test_a_merged_model_is_neither_loaded_nor_merged_again() -> None:
    model = seeded(Mlp)
    inject_lora(model, config())
    adapter = extract_adapter(model)
    merge_lora(model)
    for what, call in (
        ("load_adapter_into", lambda: load_adapter_into(model, adapter)),
        ("merge_lora", lambda: merge_lora(model)),
    ):
        with pytest.raises(ConfigError) as error:
            call()
        assert message(error) == (
            f"{what}: the adapter is merged into the base; call unmerge_lora first"
        )
    unmerge_lora(model)
    with pytest.raises(ConfigError, match="Mlp is not merged: call merge_lora first"):
        unmerge_lora(model)


# Description and fingerprint


def test_layers_are_described_by_their_plain_paths() -> None:
    model = seeded(Many)
    expected = {
        "conv": LayerSpec("conv", (2, 3, 3), 4, False, 76),
        "twice": LayerSpec("linear", (6,), 6, False, 42),
        "classifier": LayerSpec("linear", (24,), 3, True, 75),
    }
    assert layer_specs(model) == expected
    inject_lora(model, config(target_modules=("conv", "twice")))
    assert layer_specs(model) == expected
    assert layer_specs(seeded(TiedLm))["embed"] == LayerSpec("embedding", (11,), 8, False, 88)


def test_a_model_can_say_which_layer_is_its_output() -> None:
    model = seeded(Mlp)
    model.output_path = "second"
    assert [path for path, spec in layer_specs(model).items() if spec.is_output] == ["second"]
    model.output_path = "third"
    with pytest.raises(ConfigError, match=r"Mlp\.output_path: .* found 'third'"):
        layer_specs(model)


@pytest.mark.parametrize("kind", [Mlp, TiedLm, Many])
def test_the_fingerprint_is_the_bases_before_during_and_after(kind: type[nn.Module]) -> None:
    model = seeded(kind)
    expected = base_fingerprint(model)
    inject_lora(model, config(variant="dora"))
    load_adapter_into(model, filled(extract_adapter(model)))
    assert base_fingerprint(model) == expected
    if kind is not TiedLm:
        merge_lora(model)
        assert base_fingerprint(model) == expected
    remove_lora(model)
    assert base_fingerprint(model) == expected


def test_the_fingerprint_is_a_hash_of_names_types_shapes_and_bytes() -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    weight, bias = model[0].weight, model[0].bias
    text = hashlib.sha256(b"0.bias\nfloat32\n(1,)\n" + bias.detach().numpy().tobytes())
    text.update(b"0.weight\nfloat32\n(1, 2)\n" + weight.detach().numpy().tobytes())
    assert base_fingerprint(model) == text.hexdigest()


def test_the_fingerprint_counts_a_tied_weight_once_and_a_buffer_too() -> None:
    tied = seeded(TiedLm)
    expected = base_fingerprint(tied)
    tied.lm_head.weight = nn.Parameter(tied.embed.weight.detach().clone())
    assert base_fingerprint(tied) != expected
    model = seeded(Many)
    expected = base_fingerprint(model)
    model.norm.running_mean.add_(1)
    assert base_fingerprint(model) != expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_base_keeps_its_type_and_its_bits(dtype: torch.dtype) -> None:
    model = seeded(Mlp).to(dtype)
    before, fingerprint = state(model), base_fingerprint(model)
    inject_lora(model, config())
    load_adapter_into(model, filled(extract_adapter(model)))
    unmerged = model(FEATURES.to(dtype))
    assert unmerged.dtype == dtype
    merge_lora(model)
    torch.testing.assert_close(model(FEATURES.to(dtype)), unmerged, rtol=0.1, atol=0.1)
    remove_lora(model)
    assert same_state(model, before)
    assert base_fingerprint(model) == fingerprint
