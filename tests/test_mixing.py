"""Personal and global adapter mixed for each input, against one example at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedlora import mixing
from fedlora.adapter import LoraConfig
from fedlora.data import ClientData, Examples, load_data
from fedlora.errors import ConfigError, DataError
from fedlora.evaluation import Trial, evaluate
from fedlora.mixing import SAMPLES, evaluate_mixed, head_inputs
from fedlora.nn import extract_adapter, get_task, inject_lora, load_base
from fedlora.randomness import rng
from tests.nn.models import Many, Mlp, TiedLm, seeded
from tests.reference.mixing import evaluate_one_by_one
from tests.test_evaluation import CLOSE, features, shaken, texts

CLASSES, TOKENS = get_task("classification"), get_task("next-token")


def assert_as_one_by_one(
    model, head, data, examples, task, *, largest=0.9, together=True, size=0.5
):
    initial = extract_adapter(model)
    shared, personal = shaken(initial, 1, size), shaken(initial, 2, size)
    found = evaluate_mixed(
        model, data, Trial(personal, examples, "c"), task,
        shared=shared, largest=largest, seed=3, together=together,
    )  # fmt: skip
    count = min(SAMPLES, len(data.train))
    chosen = rng(3, "mixing", data.client_id).choice(len(data.train), count, replace=False)
    sums, weights = evaluate_one_by_one(
        model, head, shared, personal, (data.train, chosen), examples, task, largest
    )
    assert found["loss"] == pytest.approx(sums["nats"] / sums.get("tokens", len(examples)), **CLOSE)
    for name, total in (("accuracy", "correct"), ("top1", "top1")):
        if name in found:
            assert found[name] == sums[total] / sums.get("word_starts", len(examples))
    assert found["personal_weight"] == pytest.approx(np.mean(weights), **CLOSE)
    assert np.ptp(weights) > 1e-3  # so that it matters which example gets which weight
    return found


def client(train: Examples) -> ClientData:
    return ClientData("c", train, train.take([]), train.take([]))


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("positions", [6, 8192])
@pytest.mark.parametrize(
    ("kind", "targets", "shape", "head"),
    [
        (Mlp, "all-linear", (6,), "head"),
        (Many, ["conv", "classifier"], (2, 8, 8), "classifier"),
    ],
    ids=["linear", "convolution"],
)
def test_features_are_mixed_as_one_by_one(
    monkeypatch, kind, targets, shape, head, positions, together
):
    monkeypatch.setattr(mixing, "FEATURE_POSITIONS", positions)
    model = seeded(kind)
    inject_lora(model, LoraConfig(rank=2, target_modules=targets), seed=0)
    data, examples = client(features(9, shape, 1)), features(7, shape, 2)
    top = dict(model.named_modules())[head]
    assert_as_one_by_one(model, top, data, examples, CLASSES, together=together)


@pytest.mark.parametrize("positions", [9, 512])
def test_texts_are_mixed_as_one_by_one(monkeypatch, positions):
    monkeypatch.setattr(mixing, "TEXT_POSITIONS", positions)
    model = seeded(TiedLm)
    inject_lora(model, LoraConfig(rank=2, target_modules=["embed", "mix"]), seed=0)
    data, examples = client(texts(3, 1)), texts(8, 2)
    assert_as_one_by_one(model, model.lm_head, data, examples, TOKENS)


@pytest.mark.parametrize("classes", [None, 20], ids=["tokens", "new head"])
def test_the_bundled_language_model_is_mixed_as_one_by_one(classes):
    base = load_base("tiny-chat", num_classes=classes)
    name = "chitchat-small" if classes is None else "chitchat-punctuation"
    data = load_data(name, tokenizer=base.tokenizer, clients=1)
    pattern = {} if classes is None else {"zero_head": 20}
    lora = LoraConfig(rank=2, target_modules="all-linear", rank_pattern=pattern)
    inject_lora(base.model, lora, seed=0)
    person = next(data.clients())
    head = base.model.lm_head if classes is None else base.model.zero_head
    task = TOKENS if classes is None else CLASSES
    assert_as_one_by_one(base.model, head, person, person.test.take(range(12)), task, size=0.05)


def mlp_client() -> tuple[nn.Module, ClientData, Examples]:
    model = seeded(Mlp)
    inject_lora(model, LoraConfig(rank=2, target_modules="all-linear"), seed=0)
    return model, client(features(4, (6,), 1)), features(5, (6,), 2)


@pytest.mark.parametrize("without", ["weight", "training examples"])
def test_nothing_personal_is_the_global_adapter(without):
    model, data, examples = mlp_client()
    shared = shaken(extract_adapter(model), 1)
    largest = 0.0 if without == "weight" else 1.0
    data = data if without == "weight" else replace(data, train=examples.take([]))
    trial = Trial(shaken(shared, 2), examples, "c")
    found = evaluate_mixed(model, data, trial, CLASSES, shared=shared, largest=largest, seed=0)
    expected = evaluate(model, shared, examples, CLASSES, "c")
    assert found == pytest.approx(expected | {"personal_weight": 0.0}, **CLOSE)


def test_an_input_like_all_samples_gets_the_personal_adapter():
    model, data, examples = mlp_client()
    shared = shaken(extract_adapter(model), 1)
    personal = shaken(shared, 2)
    same = examples.take([0, 0, 0])  # an input that is each of the samples has cosine 1
    trial = Trial(personal, same, "c")
    found = evaluate_mixed(
        model, replace(data, train=same), trial, CLASSES, shared=shared, largest=1.0, seed=0
    )
    expected = evaluate(model, personal, same, CLASSES, "c")
    assert found == pytest.approx(expected | {"personal_weight": 1.0}, **CLOSE)


def test_the_samples_are_keyed_by_seed_and_client():
    model, _, examples = mlp_client()
    data = client(features(40, (6,), 1))
    shared = shaken(extract_adapter(model), 1, 0.5)
    trial = Trial(shaken(shared, 2, 0.5), examples, "c")

    def weight(data: ClientData, seed: int) -> float:
        found = evaluate_mixed(model, data, trial, CLASSES, shared=shared, largest=1.0, seed=seed)
        return found["personal_weight"]

    assert weight(data, 0) == weight(data, 0)
    assert weight(data, 0) != weight(data, 1)
    assert weight(data, 0) != weight(replace(data, client_id="d"), 0)


def test_a_task_without_scores_is_mixed_example_by_example():
    model, data, examples = mlp_client()
    task = replace(CLASSES, scores=None)
    assert_as_one_by_one(model, model.head, data, examples, task)


def test_afterwards_the_model_serves_one_adapter_again():
    model, data, examples = mlp_client()
    shared = shaken(extract_adapter(model), 1)
    trial = Trial(shaken(shared, 2), examples, "c")
    evaluate_mixed(model, data, trial, CLASSES, shared=shared, largest=1.0, seed=0)
    assert extract_adapter(model) == shared
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_mixed_is_refused():
    model, data, examples = mlp_client()
    shared = extract_adapter(model)
    with pytest.raises(DataError, match="c: expected held-out examples to evaluate on"):
        evaluate_mixed(
            model, data, Trial(shared, examples.take([]), "c"), CLASSES,
            shared=shared, largest=1.0, seed=0,
        )  # fmt: skip

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum(-1, keepdim=True) * self.weight

    batch = {"inputs": np.ones((2, 6), np.float32), "targets": np.zeros(2, np.int64)}
    with pytest.raises(ConfigError, match=r"kind 'mixed': .* found Sum that calls none"):
        head_inputs(Sum(), batch)


def test_states_of_padded_texts_are_those_at_their_last_positions():
    model = seeded(TiedLm)
    inputs = np.array([[3, 4, 0], [3, 4, 5]])
    targets = np.array([[1, 2, -100], [1, 2, 3]])
    found = head_inputs(model, {"inputs": inputs, "targets": targets})
    alone = head_inputs(model, {"inputs": inputs[:1, :2], "targets": targets[:1, :2]})
    torch.testing.assert_close(found[:1], alone)
    assert not torch.allclose(found[0], found[1])
