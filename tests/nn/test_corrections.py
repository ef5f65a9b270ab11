"""Corrections of the gradient (control variates): both engines equal the loop written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.adapter import Adapter, LoraConfig
from fedlora.errors import ConfigError, ShapeMismatchError
from fedlora.federation.control import next_control
from fedlora.flat import pack, segments_of
from fedlora.nn import Batch, extract_adapter, get_task, inject_lora, load_adapter_into, train_local
from fedlora.nn.cohort import Job, group_jobs, train_cohort, train_group
from fedlora.training import Factor, LocalRule, TrainConfig
from tests.nn.models import Mlp, seeded
from tests.reference import local_loop

CLASSES = get_task("classification")
SGD = TrainConfig(local_steps=10, learning_rate=0.1, optimizer="sgd")
SCAFFOLD = LocalRule(frozenset({"A", "B"}), correction="scaffold")
CONFIGS = {
    "plain": SGD,
    "clipped": replace(SGD, max_grad_norm=0.05),
    "decay": replace(SGD, weight_decay=0.01),
}
# Float32 sums in another order, in ten steps of 0.1 on factors of size 1.
CLOSE = 1e-6


class Skipping(Mlp):
    """Never calls `second`."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.first(x).relu())
        return out


def batches(count: int = 10, rows: int = 4, seed: int = 0) -> list[Batch]:
    random = np.random.default_rng(seed)
    return [
        {
            "inputs": random.normal(size=(rows, 6)).astype(np.float32),
            "targets": random.integers(0, 3, rows),
        }
        for _ in range(count)
    ]


def injected(kind: type[nn.Module] = Mlp) -> tuple[nn.Module, Adapter]:
    """A model, and an adapter for it whose B is random."""
    model = seeded(kind)
    inject_lora(model, LoraConfig(rank=2, lora_alpha=3), seed=3)
    random = np.random.default_rng(5)
    start = extract_adapter(model).map(
        lambda layer: replace(layer, B=random.normal(0, 0.1, layer.B.shape).astype(np.float32))
    )
    return model, start


def row_for(start: Adapter, rule: LocalRule = SCAFFOLD, seed: int = 0) -> np.ndarray:
    size = sum(segment.size for segment in segments_of(start, rule.trained))
    return np.random.default_rng(seed).normal(0, 0.05, size).astype(np.float32)


def job(start: Adapter, some: Sequence[Batch], config: TrainConfig = SGD, **options: Any) -> Job:
    options = {"rule": SCAFFOLD} | options
    return Job(options.pop("name", "c"), start, some, len(some), config, **options)


def alone(model: nn.Module, one: Job) -> Adapter:
    load_adapter_into(model, one.start)
    return train_local(
        model, one.batches, one.config, task=CLASSES, rule=one.rule, correction=one.correction
    ).adapter


def difference(one: Adapter, other: Adapter) -> float:
    both = frozenset({"A", "B"})
    rows = [pack(adapter, segments_of(adapter, both)) for adapter in (one, other)]
    return float(np.abs(rows[0] - rows[1]).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_ten_corrected_steps_equal_the_loop_written_by_hand(name: str) -> None:
    model, start = injected()
    row, config = row_for(start), CONFIGS[name]
    names = [f"{s.path}.{s.factor}" for s in segments_of(start, SCAFFOLD.trained)]
    shapes = [s.shape for s in segments_of(start, SCAFFOLD.trained)]
    cuts = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    correction = {
        name: torch.tensor(part.reshape(shape))
        for name, part, shape in zip(names, np.split(row, cuts), shapes, strict=True)
    }
    factors = {
        f"{path}.{factor}": torch.tensor(getattr(layer, factor))
        for path, layer in start.layers.items()
        for factor in ("A", "B")
    }
    expected, _ = local_loop.train(
        seeded(Mlp), factors, 1.5, batches(), config, F.cross_entropy, correction=correction
    )
    found = alone(model, job(start, batches(), config, correction=row))
    for path in found:
        for factor in ("A", "B"):
            np.testing.assert_allclose(
                getattr(found[path], factor), expected[f"{path}.{factor}"], rtol=0, atol=CLOSE
            )
    plain = alone(model, job(start, batches(), config, rule=LocalRule()))
    assert difference(found, plain) > 0.01


def mixed_jobs(start: Adapter) -> list[Job]:
    """Other steps, limits, pulls and corrections in one group."""
    return [
        job(
            start,
            batches(count, rows=1 + k, seed=k),
            config,
            name=f"c{k}",
            rule=replace(SCAFFOLD, proximal_weight=(0.0, 0.5)[k % 2]),
            correction=row_for(start, seed=k),
        )
        for k, (count, config) in enumerate(zip((3, 10, 7), CONFIGS.values(), strict=True))
    ]


@pytest.mark.parametrize("kind", [Mlp, Skipping])
def test_a_cohort_gives_what_each_gets_alone(kind: type[nn.Module]) -> None:
    model, start = injected(kind)
    jobs = mixed_jobs(start)
    for one, trained in zip(jobs, train_group(model, jobs, CLASSES), strict=True):
        mine = alone(model, one)
        assert difference(trained.adapter(), mine) <= CLOSE
        rows = [pack(a, segments_of(a, SCAFFOLD.trained)) for a in (trained.adapter(), mine)]
        before = pack(start, segments_of(start, SCAFFOLD.trained))
        zero = np.zeros_like(before)
        own = [next_control(zero, zero, before, row, one.steps, one.config)[0] for row in rows]
        # It divides the factors' difference by steps times learning rate, 0.3 at the least.
        assert float(np.abs(own[0] - own[1]).max()) <= CLOSE / 0.3


@pytest.mark.parametrize("trained", ["A", "B"])
def test_one_factor_can_be_corrected_alone(trained: Factor) -> None:
    model, start = injected()
    rule = LocalRule(frozenset({trained}), correction="scaffold")
    jobs = [
        job(start, batches(seed=k), rule=rule, correction=row_for(start, rule, k)) for k in range(3)
    ]
    other = "A" if trained == "B" else "B"
    for one, found in zip(jobs, train_cohort(model, jobs, CLASSES), strict=True):
        mine = alone(model, one)
        assert difference(found.adapter(), mine) <= CLOSE
        for path in start:
            np.testing.assert_array_equal(getattr(mine[path], other), getattr(start[path], other))


def test_the_next_variate_is_the_mean_of_the_clipped_gradients() -> None:
    """Which is why the correction comes after clipping; own and c cancel out of it."""
    model, start = injected()
    config, before = CONFIGS["clipped"], pack(start, segments_of(start, SCAFFOLD.trained))
    own, server = row_for(start, seed=1), row_for(start, seed=2)
    once = replace(config, local_steps=1)
    found = alone(model, job(start, batches(1), once, correction=server - own))
    after = pack(found, segments_of(found, SCAFFOLD.trained))
    following, change = next_control(own, server, before, after, 1, once)
    load_adapter_into(model, start)
    loss = CLASSES.loss(model, batches(1)[0])
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(sum(g.square().sum() for g in gradients)) ** 0.5
    assert norm > 0.05  # it is clipped
    assert float(np.linalg.norm(following)) == pytest.approx(0.05, rel=1e-3)
    np.testing.assert_allclose(following - own, change, rtol=0, atol=1e-7)


def test_a_layer_that_is_not_called_is_corrected_all_the_same() -> None:
    """Its gradient is zero, and so is its next variate, whatever c and c_k were."""
    model, start = injected(Skipping)
    row = row_for(start)
    found = alone(model, job(start, batches(4), correction=row))
    places = [
        np.full(s.size, s.path == "second" and s.factor == "B")
        for s in segments_of(start, SCAFFOLD.trained)
    ]
    expected = start["second"].B - 4 * 0.1 * row[np.concatenate(places)].reshape(
        start["second"].B.shape
    )
    np.testing.assert_allclose(found["second"].B, expected, rtol=0, atol=CLOSE)


# What does not fit together: the job's changes, the error, and words of its text.
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no row": ({}, ConfigError, "expected one for 'scaffold' as its rule's correction, found none"),
    "no rule": (
        {"rule": LocalRule(), "correction": np.zeros(3, np.float32)},
        ConfigError,
        "expected none as its rule's correction, found one",
    ),
    "adamw": (
        {"config": replace(SGD, optimizer="adamw"), "correction": np.zeros(3, np.float32)},
        ConfigError,
        "control variates: expected optimizer = 'sgd' without momentum, found 'adamw'; ",
    ),
    "momentum": (
        {"config": replace(SGD, momentum=0.5), "correction": np.zeros(3, np.float32)},
        ConfigError,
        "found 'sgd' with momentum 0.5; ",
    ),
    "another size": (
        {"correction": np.zeros(3, np.float32)},
        ShapeMismatchError,
        "expected a correction of (80,), found (3,)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_both_engines(case: str) -> None:
    changes, kind, text = BAD[case]
    model, start = injected()
    size = len(row_for(start))
    text = text.replace("(80,)", f"({size},)")
    one = job(start, batches(2), **changes)
    with pytest.raises(kind) as caught:
        alone(model, one)
    assert str(caught.value).startswith("train_local: ")
    assert text in str(caught.value)
    with pytest.raises(kind) as caught:
        train_group(model, [one], CLASSES)
    assert str(caught.value).startswith("train_group, client 'c': ")
    assert text in str(caught.value)


def test_groups_are_corrected_or_not() -> None:
    model, start = injected()
    plain = job(start, batches(2), rule=LocalRule(SCAFFOLD.trained))
    corrected = job(start, batches(2), correction=row_for(start))
    assert sorted(group_jobs([plain, corrected], 2048)) == [[0], [1]]
    with pytest.raises(ConfigError, match="a rule with correction None as the first client's"):
        train_group(model, [plain, corrected], CLASSES)
