"""Which layers get LoRA, the adapter that training starts from, and what it costs."""

from __future__ import annotations

import numpy as np
import pytest

from fedlora.adapter import LoraConfig
from fedlora.errors import ConfigError, UnsupportedError
from fedlora.randomness import rng
from fedlora.targets import LayerSpec, budget, initial_A, initial_adapter, select_targets
from tests.matching import raises

SPECS = {
    "embed": LayerSpec("embedding", (10,), 4, parameters=40),
    **{
        f"model.layers.{i}.{name}": LayerSpec("linear", (4,), 6, parameters=24)
        for i in range(3)
        for name in ("q_proj", "mlp.up", "experts.1.up")
    },
    "conv": LayerSpec("conv", (3, 2, 2), 5, parameters=60),
    "head": LayerSpec("linear", (4,), 10, is_output=True, parameters=40),
}
BLOCK = {i: [f"model.layers.{i}.{n}" for n in ("experts.1.up", "mlp.up", "q_proj")]
         for i in range(3)}  # fmt: skip
SELECTIONS = {
    "all linear but the head": ({}, [*BLOCK[0], *BLOCK[1], *BLOCK[2]]),
    "a name": ({"target_modules": ("q_proj",)}, [block[2] for block in BLOCK.values()]),
    "two components": ({"target_modules": ("mlp.up",)}, [block[1] for block in BLOCK.values()]),
    "any kind": ({"target_modules": ("embed", "conv", "head")}, ["conv", "embed", "head"]),
    "a full path": ({"target_modules": (BLOCK[1][0],)}, [BLOCK[1][0]]),
    "a regular expression": ({"target_modules": r".*\.[02]\.q_proj"}, [BLOCK[0][2], BLOCK[2][2]]),
    "the last blocks": ({"layers": "last:2"}, [*BLOCK[1], *BLOCK[2]]),
    "blocks by index": ({"layers_to_transform": (0, 2)}, [*BLOCK[0], *BLOCK[2]]),
    "a list of blocks": (
        {"layers_to_transform": (1,), "layers_pattern": ("experts",)},
        [block[0] for block in BLOCK.values()],
    ),
}


@pytest.mark.parametrize(("arguments", "expected"), SELECTIONS.values(), ids=SELECTIONS)
def test_layers_are_selected(arguments, expected):
    assert select_targets(SPECS, LoraConfig(**arguments)) == tuple(expected)


REFUSED = {
    "misspelt": ({"target_modules": ("q_porj",)}, "is called 'q_porj'; did you mean 'q_proj'?"),
    "part of a name": ({"target_modules": ("proj",)}, "no layer of the base is called 'proj'"),
    "regex of a part": ({"target_modules": "q_proj"}, "target_modules 'q_proj' with layers None"),
    "too many": ({"layers": "last:4"}, "expected at most 'last:3', the number of blocks"),
    "no block": ({"layers_to_transform": (7,)}, "with layers (7,) selects none of the base's 12"),
}


@pytest.mark.parametrize(("arguments", "text"), REFUSED.values(), ids=REFUSED)
def test_selection_of_nothing_is_refused(arguments, text):
    with raises(ConfigError, text):
        select_targets(SPECS, LoraConfig(**arguments))


def test_start_adapter_changes_nothing_and_has_every_kind():
    config = LoraConfig(
        rank=2, lora_alpha=3, target_modules=("embed", "conv", "q_proj"), rank_pattern={"conv": 1}
    )
    adapter = initial_adapter(SPECS, config, seed=7, base="b" * 64)
    assert [(path, layer.kind, layer.A.shape, layer.B.shape) for path, layer in
            adapter.layers.items()] == [
        ("conv", "conv", (1, 3, 2, 2), (5, 1)),
        ("embed", "embedding", (2, 10), (4, 2)),
        *((path, "linear", (2, 4), (6, 2)) for path in (b[2] for b in BLOCK.values())),
    ]  # fmt: skip
    assert all(not layer.B.any() and layer.A.any() for layer in adapter.layers.values())
    assert adapter["conv"].scaling == 3.0
    assert adapter.base == "b" * 64


def test_a0_is_keyed_by_seed_and_path_alone():
    whole = initial_adapter(SPECS, LoraConfig(rank=2), seed=7)
    part = initial_adapter(SPECS, LoraConfig(rank=2, layers="last:1"), seed=7)
    for path in part:
        np.testing.assert_array_equal(part[path].A, whole[path].A)
    assert not np.array_equal(initial_A("a", 2, (3,), 0), initial_A("b", 2, (3,), 0))
    assert not np.array_equal(initial_A("a", 2, (3,), 0), initial_A("a", 2, (3,), 1))
    expected = rng(7, "init", "conv").uniform(-(12**-0.5), 12**-0.5, (1, 3, 2, 2))
    np.testing.assert_array_equal(initial_A("conv", 1, (3, 2, 2), 7), expected.astype(np.float32))


def test_dora_needs_the_base():
    with raises(UnsupportedError, "variant 'dora' starts from the norms", "inject_lora"):
        initial_adapter(SPECS, LoraConfig(variant="dora"), seed=0)


def test_budget_counts_what_the_adapter_has():
    config = LoraConfig(rank=2, target_modules=("embed", "conv", "mlp.up"), rank_pattern={"up": 5})
    cost = budget(SPECS, config, base_parameters=1000)
    adapter = initial_adapter(SPECS, config, seed=0)
    assert (cost.layers, cost.parameters) == (5, adapter.num_parameters)
    assert cost.parameters == 2 * (10 + 4) + 2 * (12 + 5) + 3 * 5 * (4 + 6)
    assert cost.share == 0.212
    assert cost.bytes == {"fp32": 848, "fp16": 424, "int8": 212, "int4": 106}
