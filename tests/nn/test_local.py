"""Local training against a loop written out by hand, and what it must leave alone."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.adapter import Adapter, LoraConfig
from fedlora.errors import ConfigError, NonFiniteError
from fedlora.nn import (
    Batch,
    Task,
    base_fingerprint,
    extract_adapter,
    inject_lora,
    load_adapter_into,
    merge_lora,
    train_local,
)
from fedlora.nn.inject import lora_modules
from fedlora.training import Factor, LocalRule, TrainConfig
from tests.nn.models import Many, Mlp, TiedLm, same_state, seeded, state
from tests.reference import local_loop

LORA = LoraConfig(rank=2, lora_alpha=3)
CONFIG = TrainConfig(local_steps=10, learning_rate=1e-2)

CONFIGS = {
    "adamw": CONFIG,
    "adamw with decay": replace(CONFIG, weight_decay=0.1),
    "adamw clipped": replace(CONFIG, max_grad_norm=0.05),
    "sgd": replace(CONFIG, optimizer="sgd", learning_rate=0.1),
    "sgd with momentum and decay": replace(
        CONFIG, optimizer="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.01
    ),
    "sgd clipped": replace(CONFIG, optimizer="sgd", learning_rate=0.1, max_grad_norm=0.05),
}


def batches(count: int = 10, size: int = 4, seed: int = 0) -> list[Batch]:
    random = np.random.default_rng(seed)
    return [
        {
            "inputs": random.normal(size=(size, 6)).astype(np.float32),
            "targets": random.integers(0, 3, size),
        }
        for _ in range(count)
    ]


def injected(kind: type[nn.Module] = Mlp, **changes: Any) -> nn.Module:
    model = seeded(kind)
    inject_lora(model, replace(LORA, **changes), seed=3)
    return model


def train(model: nn.Module, config: TrainConfig = CONFIG, **options: Any) -> Any:
    options = {"task": "classification", "batches": batches()} | options
    return train_local(model, options.pop("batches"), config, **options)


def largest_difference(adapter: Adapter, factors: dict[str, Tensor]) -> float:
    return max(
        float(np.abs(getattr(adapter[path], name) - factors[f"{path}.{name}"].numpy()).max())
        for path in adapter
        for name in ("A", "B")
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_ten_steps_equal_the_loop_written_by_hand(name: str) -> None:
    model = injected()
    start = extract_adapter(model)
    factors = {
        f"{path}.{factor}": torch.tensor(getattr(layer, factor))
        for path, layer in start.layers.items()
        for factor in ("A", "B")
    }
    result = train(model, CONFIGS[name])
    expected, loss = local_loop.train(
        seeded(Mlp), factors, 1.5, batches(), CONFIGS[name], F.cross_entropy
    )
    # The loop is in float64. AdamW divides by small gradients' own size, which magnifies rounding.
    tolerance = 1e-7 if CONFIGS[name].optimizer == "sgd" else 1e-6
    assert largest_difference(result.adapter, expected) <= tolerance
    assert result.loss == pytest.approx(loss, abs=1e-7)
    assert result.steps == 10
    assert result.num_examples == 40
    moved = {name: float(np.abs(result.adapter[name].B).max()) for name in result.adapter}
    assert all(move > 1e-3 for move in moved.values())


def test_the_result_is_the_adapter_that_the_model_carries() -> None:
    model = injected()
    assert train(model).adapter == extract_adapter(model)


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.3}, {"variant": "dora"}])
def test_training_is_deterministic(changes: dict[str, Any]) -> None:
    first = train(injected(**changes), seed=5)
    torch.rand(3)  # whatever else has used torch's generator
    second = train(injected(**changes), seed=5)
    assert first.adapter == second.adapter
    assert first.loss == second.loss


def test_the_seed_decides_the_dropout_and_nothing_else() -> None:
    dropped = [train(injected(lora_dropout=0.3), seed=seed).adapter for seed in (0, 1)]
    assert dropped[0] != dropped[1]
    plain = [train(injected(), seed=seed).adapter for seed in (0, 1)]
    assert plain[0] == plain[1]


def test_torchs_generator_is_left_as_it_was() -> None:
    model = injected(lora_dropout=0.3)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    train(model)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("mode", [True, False])
def test_base_modes_and_flags_stay_as_they_were(mode: bool) -> None:
    """A batch norm in training mode would learn from the client's data."""
    model = injected(Many, target_modules=("conv", "classifier"), lora_dropout=0.1).train(mode)
    fingerprint = base_fingerprint(model)
    base = {name: t for name, t in state(model).items() if "lora_" not in name}
    pictures = np.random.default_rng(0).normal(size=(4, 2, 8, 8)).astype(np.float32)
    batch = {"inputs": pictures, "targets": np.array([0, 1, 2, 0])}
    train(model, batches=[batch] * 3, rule=LocalRule(frozenset({"B"})))
    assert base_fingerprint(model) == fingerprint
    assert all(torch.equal(model.state_dict()[name], t) for name, t in base.items())
    assert {module.training for module in model.modules()} == {mode}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.grad is None


@pytest.mark.parametrize(
    ("variant", "trained"),
    [("lora", "A"), ("lora", "B"), ("dora", "A"), ("dora", "B"), ("dora", "magnitude")],
)
def test_factors_that_a_rule_does_not_train_stay_bit_equal(variant: str, trained: Factor) -> None:
    model = injected(variant=variant)
    with torch.no_grad():  # with B = 0 the gradient of A is 0
        for module in lora_modules(model).values():
            module.lora_B.fill_(0.1)
    before = extract_adapter(model)
    after = train(model, rule=LocalRule(frozenset({trained}))).adapter
    factors = ("A", "B", "magnitude") if variant == "dora" else ("A", "B")
    for path in before:
        changed = {
            name
            for name in factors
            if not np.array_equal(getattr(before[path], name), getattr(after[path], name))
        }
        assert changed == {trained}


def test_dora_trains_its_magnitude_unless_told_otherwise() -> None:
    model = injected(variant="dora")
    before = extract_adapter(model)
    after = train(model).adapter
    assert not np.array_equal(before["first"].magnitude, after["first"].magnitude)


def test_no_batch_means_no_step_and_the_same_adapter() -> None:
    model = injected()
    before = extract_adapter(model)
    result = train(model, batches=[])
    assert result.adapter == before
    assert (result.steps, result.num_examples) == (0, 0)
    assert math.isnan(result.loss)


def test_the_number_of_examples_can_be_given() -> None:
    assert train(injected(), num_examples=17).num_examples == 17


def test_clients_in_turn_do_not_influence_each_other() -> None:
    model = injected()
    start = extract_adapter(model)
    alone = train(injected(), batches=batches(seed=2)).adapter
    train(model, batches=batches(seed=1))
    load_adapter_into(model, start)
    assert train(model, batches=batches(seed=2)).adapter == alone


def test_a_zero_head_learns_through_lora_alone() -> None:
    """How a new classification head travels: base zero, rank at least the number of classes."""
    model = seeded(Mlp)
    nn.init.zeros_(model.head.weight)
    inject_lora(model, replace(LORA, rank=3, target_modules=("head",)))
    features = np.eye(6, dtype=np.float32)[[0, 1, 2] * 4]
    batch = {"inputs": features, "targets": np.array([0, 1, 2] * 4)}
    untrained = train(model, batches=[batch]).loss
    config = replace(CONFIG, learning_rate=0.05)
    assert train(model, config, batches=[batch] * 60).adapter["head"].rank == 3
    assert train(model, config, batches=[batch]).loss < 0.2 * untrained


def test_read_only_batches_are_accepted() -> None:
    batch = dict(batches(1)[0])
    for array in batch.values():
        array.flags.writeable = False
    assert train(injected(), batches=[batch]).steps == 1


def test_a_loss_that_is_not_finite_names_the_step_and_restores_the_model() -> None:
    model = injected(lora_dropout=0.1).train()
    bad = dict(batches(1)[0])
    bad["inputs"] = np.full((4, 6), np.nan, np.float32)
    with pytest.raises(NonFiniteError) as error:
        train(model, batches=[*batches(2), bad], rule=LocalRule(frozenset({"B"})))
    assert str(error.value) == (
        "train_local, step 3: expected a finite loss, found nan; lower learning_rate, set "
        "max_grad_norm, or look for NaN in the client's data"
    )
    assert all(module.training for module in model.modules())
    assert all(module.lora_A.requires_grad for module in lora_modules(model).values())


def test_a_merged_model_is_not_trained() -> None:
    model = injected()
    merge_lora(model)
    with pytest.raises(ConfigError, match=r"train_local: the adapter is merged .* unmerge_lora"):
        train(model)


def test_a_model_that_bypasses_its_layers_is_refused() -> None:
    class Bypass(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.first.weight)

    with pytest.raises(ConfigError) as error:
        train(injected(Bypass))
    assert str(error.value) == (
        "train_local: the loss of task 'classification' does not depend on the adapter; does "
        "Bypass read its layers' weights without calling them?"
    )


def test_a_rule_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="trains magnitude only, and the adapter has none"):
        train(injected(), rule=LocalRule(frozenset({"magnitude"})))


def test_an_own_task_is_followed() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(torch.from_numpy(batch["inputs"])).square().mean()

    task = Task("shrink", "loss", False, loss, lambda model, batch: {})
    model = injected()
    first = train(model, task=task).loss
    assert train(model, task=task).loss < first


def test_gradients_of_the_frozen_base_are_never_computed() -> None:
    model = injected(TiedLm, target_modules=("mix",))
    seen: list[str] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value = F.cross_entropy(model(torch.from_numpy(batch["inputs"])).flatten(0, 1), wanted)
        nodes, names = [value.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None:
                if hasattr(node, "variable"):
                    names.update(n for n, p in model.named_parameters() if p is node.variable)
                nodes.extend(parent for parent, _ in node.next_functions)
        seen.extend(sorted(names))
        return value

    wanted = torch.arange(6)
    task = Task("look", "loss", False, loss, lambda model, batch: {})
    train(model, task=task, batches=[{"inputs": np.arange(6).reshape(2, 3)}])
    assert seen == ["mix.lora_A", "mix.lora_B"]


def test_a_copy_trains_like_its_original() -> None:
    model = injected()
    twin = copy.deepcopy(model)
    assert train(twin).adapter == train(model).adapter
    assert same_state(twin, state(model))
