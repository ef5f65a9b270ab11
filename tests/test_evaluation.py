"""Many adapters evaluated at once against `evaluate`, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from torch import nn

from fedlora import evaluation
from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.data import Examples, load_data
from fedlora.errors import DataError, NonFiniteError
from fedlora.evaluation import Trial, evaluate, evaluate_many
from fedlora.nn import Task, extract_adapter, get_task, inject_lora, load_base
from fedlora.simulation.threads import one_torch_thread
from tests.nn.models import Many, Mlp, TiedLm, seeded

# Sums of float32 in another order. A perplexity e^loss and bits move with the loss.
CLOSE = {"abs": 2e-5, "rel": 2e-5}


def shaken(adapter: Adapter, seed: int, size: float = 0.1) -> Adapter:
    """An adapter of the same shape whose B is not zero."""
    random = np.random.default_rng(seed)

    def layer(old: LoraLayer) -> LoraLayer:
        B = size * random.normal(size=old.B.shape)
        return LoraLayer(old.A, B.astype(np.float32), old.scaling, old.magnitude, old.kind)

    layers = {path: layer(old) for path, old in adapter.layers.items()}
    return Adapter(layers, adapter.config, adapter.base)


def features(rows: int, shape: tuple[int, ...], seed: int) -> Examples:
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(rows, *shape)).astype(np.float32)
    return Examples(inputs, random.integers(0, 3, rows))


def texts(rows: int, seed: int) -> Examples:
    random = np.random.default_rng(seed)
    width = 3 + seed % 4
    targets = random.integers(0, 11, (rows, width))
    for row in range(rows):
        targets[row, random.integers(1, width + 1) :] = -100
    starts = random.random((rows, width)) < 0.5
    inputs = np.where(targets == -100, 0, random.integers(0, 11, (rows, width)))
    return Examples(inputs, targets, starts & (targets >= 0), random.integers(1, 9, rows))


def trials_of(model: nn.Module, parts: Sequence[Examples], rank: int = 2) -> list[Trial]:
    """For each part: the initial adapter, one that everyone shares, and two of its own."""
    initial = extract_adapter(model)
    shared = shaken(initial, 99)
    return [
        Trial(adapter, part, f"client {k}, {name}")
        for k, part in enumerate(parts)
        for name, adapter in (
            ("base", initial),
            ("global", shared),
            ("own", shaken(initial, 2 * k)),
            ("personal", shaken(initial, 2 * k + 1)),
        )
    ]


def assert_as_alone(
    model: nn.Module, trials: Sequence[Trial], task: Task, *, together: bool = True
) -> None:
    found = evaluate_many(model, trials, task, together=together)
    for trial, scores in zip(trials, found, strict=True):
        alone = evaluate(model, trial.adapter, trial.examples, task, trial.who)
        assert isinstance(scores, dict), scores
        assert scores == pytest.approx(alone, **CLOSE)


def injected(kind: type[nn.Module], targets: str | list[str], **options: object) -> nn.Module:
    model = seeded(kind)
    inject_lora(model, LoraConfig(rank=2, target_modules=targets, **options), seed=0)
    return model


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("positions", [7, 40, 512])
def test_texts_of_many_clients_score_as_alone(monkeypatch, positions, together):
    monkeypatch.setattr(evaluation, "TEXT_POSITIONS", positions)
    model = injected(TiedLm, ["embed", "mix"])
    parts = [texts(rows, seed) for seed, rows in enumerate((1, 4, 2, 9, 1, 3))]
    assert_as_alone(model, trials_of(model, parts), get_task("next-token"), together=together)


@pytest.mark.parametrize(
    ("kind", "targets", "shape", "options"),
    [
        (Mlp, "all-linear", (6,), {}),
        (Mlp, "all-linear", (6,), {"lora_dropout": 0.5}),
        (Mlp, "all-linear", (6,), {"variant": "dora"}),
        (Many, ["conv", "classifier"], (2, 8, 8), {}),
    ],
    ids=["linear", "dropout", "dora", "convolution"],
)
@pytest.mark.parametrize("positions", [8, 60, 8192])
def test_features_of_many_clients_score_as_alone(
    monkeypatch, kind, targets, shape, options, positions
):
    monkeypatch.setattr(evaluation, "FEATURE_POSITIONS", positions)
    model = injected(kind, targets, **options)
    parts = [features(rows, shape, seed) for seed, rows in enumerate((1, 5, 2, 30, 3))]
    assert_as_alone(model, trials_of(model, parts), get_task("classification"))


def test_messages_score_as_alone_on_the_bundled_base():
    base = load_base("tiny-chat")
    data = load_data("chitchat-small", tokenizer=base.tokenizer, clients=3)
    inject_lora(base.model, LoraConfig(rank=4, target_modules="all-linear"), seed=0)
    initial = extract_adapter(base.model)
    tests = [data.client(client).test for client in data.client_ids]
    # many messages: a pass for itself; few: clients share passes
    parts = [tests[0].take(range(60)), *(part.take(range(2 + k)) for k, part in enumerate(tests))]
    trials = [
        Trial(shaken(initial, k, 0.02) if k % 2 else initial, part, f"trial {k}")
        for k, part in enumerate(parts * 2)
    ]
    with one_torch_thread():
        assert_as_alone(base.model, trials, get_task("next-token"))


def test_adapters_of_different_ranks_share_a_pass():
    model = seeded(Mlp)
    inject_lora(model, LoraConfig(rank=3, target_modules="all-linear"), seed=0)
    wide = shaken(extract_adapter(model), 1)
    narrow = shaken(extract_adapter(injected(Mlp, "all-linear")), 2)
    trials = [Trial(a, features(2, (6,), k), str(k)) for k, a in enumerate((wide, narrow))]
    assert_as_alone(model, trials, get_task("classification"))


def test_few_examples_of_many_clients_take_one_pass():
    model = injected(Mlp, "all-linear")
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    initial = extract_adapter(model)
    trials = [Trial(shaken(initial, k), features(3, (6,), k), str(k)) for k in range(10)]
    evaluate_many(model, trials, get_task("classification"))
    assert len(passes) == 1


def test_an_adapter_that_overflows_is_an_error_of_its_own_trials_only():
    model = injected(Mlp, "all-linear")
    initial = extract_adapter(model)
    broken = shaken(initial, 1, 1e30)
    examples = features(3, (6,), 0)
    good = Trial(shaken(initial, 2), examples, "good")
    found = evaluate_many(
        model, [good, Trial(broken, examples, "bad"), good], get_task("classification")
    )
    assert isinstance(found[1], NonFiniteError)
    assert str(found[1]).startswith("bad: the held-out loss is")
    alone = evaluate(model, good.adapter, examples, get_task("classification"), "good")
    assert found[0] == pytest.approx(alone, **CLOSE)
    assert found[0] == found[2]


def test_a_task_without_scores_is_evaluated_trial_by_trial():
    model = injected(Mlp, "all-linear")
    task = replace(get_task("classification"), scores=None)
    assert_as_alone(model, trials_of(model, [features(2, (6,), 0), features(3, (6,), 1)]), task)


def test_a_trial_without_examples_is_refused_and_named():
    model = injected(Mlp, "all-linear")
    empty = Trial(extract_adapter(model), features(0, (6,), 0), "client 'c'")
    with pytest.raises(DataError, match="client 'c': expected held-out examples"):
        evaluate_many(model, [empty], get_task("classification"))
