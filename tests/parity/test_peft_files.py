"""Folders that PEFT wrote, and folders that PEFT has to read (PEFT is the oracle)."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from fedlora.adapter import Adapter, LoraConfig, LoraLayer, stack  # noqa: E402
from fedlora.errors import LayerMismatchError  # noqa: E402
from fedlora.formats import load_adapter, save_adapter  # noqa: E402
from tests.matching import raises  # noqa: E402
from tests.parity.peft_models import TOKENS, logits, mixed, tiny_gpt2, tiny_llama  # noqa: E402

LINEAR = ["up", "down"]
ALL = [*LINEAR, "embed", "conv1", "conv2"]
# name, model, arguments of PEFT's LoraConfig
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("lora", mixed, {"target_modules": LINEAR}),
    ("rslora", mixed, {"target_modules": LINEAR, "use_rslora": True}),
    ("dora", mixed, {"target_modules": LINEAR, "use_dora": True}),
    ("rsdora", mixed, {"target_modules": LINEAR, "use_dora": True, "use_rslora": True}),
    ("all-kinds", mixed, {"target_modules": ALL, "r": 3}),
    ("all-kinds-dora", mixed, {"target_modules": ALL, "use_dora": True}),
    ("regex", mixed, {"target_modules": r".*\.layers\.\d+\.(up|down)"}),
    ("all-linear", mixed, {"target_modules": "all-linear"}),
    ("excluded", mixed, {"target_modules": LINEAR, "exclude_modules": ["layers.0.up"]}),
    ("layers", mixed, {"target_modules": LINEAR, "layers_to_transform": [1]}),
    (
        "layers-pattern",
        mixed,
        {"target_modules": LINEAR, "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    (
        "patterns",
        mixed,
        {
            "target_modules": ALL,
            "rank_pattern": {"layers.0.up": 2, r"^model\.conv\d": 5, "down": 1},
            "alpha_pattern": {"embed": 7, "(up|down)": 3},
        },
    ),
    ("rank-1", mixed, {"target_modules": ALL, "r": 1, "lora_alpha": 1}),
    ("gpt2", tiny_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ("gpt2-dora", tiny_gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True,
                              "use_dora": True, "task_type": "CAUSAL_LM"}),
    ("gpt2-embedding", tiny_gpt2, {"target_modules": ["wte", "c_fc"], "fan_in_fan_out": True}),
]  # fmt: skip


@pytest.mark.parametrize(("make", "arguments"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_folder_goes_from_peft_to_fedlora_and_back(make, arguments, tmp_path):
    trained = _peft_model(make, arguments)
    expected = logits(trained)
    _quietly(trained.save_pretrained, tmp_path / "theirs")

    adapter = load_adapter(tmp_path / "theirs")
    _assert_same_deltas(trained, adapter)
    save_adapter(adapter, tmp_path / "ours")

    again = _quietly(peft.PeftModel.from_pretrained, make(), tmp_path / "ours").eval()
    # The same float32 factors and scalings: only the scalings' last bit may differ.
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6)
    assert load_adapter(tmp_path / "ours") == adapter
    assert (expected - logits(make())).abs().max() > 1e-3  # the adapter does something


def test_config_survives_the_way_through_fedlora(tmp_path):
    arguments = {"target_modules": LINEAR, "rank_pattern": {"up": 2}, "lora_dropout": 0.25}
    _quietly(_peft_model(mixed, arguments).save_pretrained, tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs")
    save_adapter(adapter, tmp_path / "ours")
    theirs = peft.LoraConfig.from_pretrained(str(tmp_path / "theirs")).to_dict()
    ours = peft.LoraConfig.from_pretrained(str(tmp_path / "ours")).to_dict()
    assert ours == theirs
    assert adapter.config.extra["peft_version"] == peft.__version__


def test_stack_of_different_ranks_is_computed_exactly_by_peft(tmp_path):
    adapters = []
    for name, rank, alpha in (("a", 2, 3), ("b", 5, 16)):
        model = _peft_model(mixed, {"target_modules": ALL, "r": rank, "lora_alpha": alpha}, rank)
        _quietly(model.save_pretrained, tmp_path / name)
        adapters.append(load_adapter(tmp_path / name))
    few = LoraLayer(np.ones((1, 8)), np.ones((5, 1)), 0.3)
    both = stack([*adapters, Adapter({"model.head": few}, LoraConfig(rank=1, lora_alpha=1))])
    _check_outputs_of(both, tmp_path / "stack")


@pytest.mark.parametrize("factor", [0.3, -1.7, 0.0])
def test_scaled_adapter_is_computed_exactly_by_peft(factor, tmp_path):
    _quietly(_peft_model(mixed, {"target_modules": ALL}).save_pretrained, tmp_path / "a")
    adapter = load_adapter(tmp_path / "a")
    scaled = adapter.scaled(factor)
    _check_outputs_of(scaled, tmp_path / "scaled")
    again = load_adapter(tmp_path / "scaled")
    for path in adapter:
        np.testing.assert_array_equal(again.delta_weight(path), scaled.delta_weight(path))


def test_truncated_layers_get_their_own_ranks_in_peft(tmp_path):
    _quietly(_peft_model(mixed, {"target_modules": ALL}).save_pretrained, tmp_path / "a")
    adapter = load_adapter(tmp_path / "a")
    ranks = dict(zip(adapter, [1, 2, 3, 1, 2, 3, 4], strict=True))
    layers = {path: layer.truncated(ranks[path]) for path, layer in adapter.layers.items()}
    _check_outputs_of(replace(adapter, layers=layers), tmp_path / "cut")


@pytest.mark.parametrize(
    "selection", [{"target_modules": "all-linear"}, {"layers": "last:1"}], ids=str
)
def test_selections_that_peft_lacks_are_written_as_full_paths(selection, tmp_path):
    rng = np.random.default_rng(0)
    layer = LoraLayer(rng.normal(size=(4, 8)), rng.normal(size=(12, 4)), 2.0)
    config = LoraConfig(**{"rank": 4, "lora_alpha": 8, "target_modules": ("up",), **selection})
    adapter = Adapter({"model.layers.1.up": layer}, config)
    _check_outputs_of(adapter, tmp_path / "a")
    keys = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert keys["target_modules"] == ["model.layers.1.up"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_are_read_into_float32(dtype, tmp_path):
    model = _peft_model(mixed, {"target_modules": ALL}).to(getattr(torch, dtype))
    _quietly(model.save_pretrained, tmp_path / "a")
    adapter = load_adapter(tmp_path / "a")
    for path, layer in adapter.layers.items():
        A, B = _factors(model, path)
        assert np.array_equal(layer.A.ravel(), A.float().numpy().ravel())
        assert np.array_equal(layer.B.ravel(), B.float().numpy().ravel())


def test_weights_of_embeddings_beside_their_adapters_are_ignored(tmp_path):
    targets = ["embed_tokens", "lm_head", "q_proj"]
    _quietly(_peft_model(tiny_llama, {"target_modules": targets}).save_pretrained, tmp_path / "a")
    names = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert [name for name in sorted(names) if "base_layer" in name] == [
        "base_model.model.lm_head.base_layer.weight",
        "base_model.model.model.embed_tokens.base_layer.weight",
    ]
    assert list(load_adapter(tmp_path / "a")) == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj",
    ]


def test_weight_of_a_resized_embedding_is_refused(tmp_path):
    model = _peft_model(tiny_llama, {"target_modules": ["q_proj"]})
    _quietly(model.save_pretrained, tmp_path / "a", save_embedding_layers=True)
    with raises(LayerMismatchError, "unexpected tensor 'base_model.model.lm_head.weight'"):
        load_adapter(tmp_path / "a")


def _peft_model(make: Any, arguments: dict[str, Any], seed: int = 1) -> Any:
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **arguments})
    model = _quietly(peft.get_peft_model, make(), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def _check_outputs_of(adapter: Adapter, folder: Path) -> None:
    """PEFT's outputs with the saved adapter are those of a base with its deltas added."""
    save_adapter(adapter, folder)
    loaded = _quietly(peft.PeftModel.from_pretrained, mixed(), folder).eval()
    base = mixed()
    with torch.no_grad():
        for path in adapter:
            delta = torch.from_numpy(adapter.delta_weight(path).copy())
            weight = base.get_submodule(path).weight
            weight += delta.T if path.endswith("embed") else delta
    # The sum is rounded to float32 once more than PEFT's two terms are.
    torch.testing.assert_close(logits(loaded), logits(base), rtol=1e-5, atol=1e-5)


def _assert_same_deltas(model: Any, adapter: Adapter) -> None:
    modules = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "scaling") and hasattr(module, "base_layer")
    }
    assert sorted(modules) == list(adapter)
    for path, layer in adapter.layers.items():
        assert layer.scaling == modules[path].scaling["default"]
        A, B = _factors(model, path)
        assert np.array_equal(layer.A, A.numpy())
        assert np.array_equal(layer.B.ravel(), B.numpy().ravel())


def _factors(model: Any, path: str) -> Any:
    module = model.get_submodule(f"base_model.model.{path}")
    if len(module.lora_embedding_A):
        A, B = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
    else:
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
    return A.detach(), B.detach()


def _quietly(call: Any, *arguments: Any, **named: Any) -> Any:
    """PEFT warns about what it does on purpose; only its results are of interest here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*arguments, **named)


def test_tokens_are_in_both_vocabularies():
    assert int(TOKENS.max()) < 11
