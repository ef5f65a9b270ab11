"""Activations below the first adapted block: kept, exact, bounded, and left alone where unsafe."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from fedlora.adapter import LoraConfig
from fedlora.data import Examples, draw_batches
from fedlora.nn import Batch, Task, extract_adapter, get_task, inject_lora, prefix, train_local
from fedlora.nn.cohort import Job, train_cohort, train_group
from fedlora.nn.inject import kept_activations
from fedlora.nn.kept import KeptActivations
from fedlora.nn.llama import Llama, LlamaConfig
from fedlora.training import TrainConfig
from tests.nn.models import seeded

CONFIG = TrainConfig(local_steps=3, batch_size=3, learning_rate=1e-2)
CLASSIFICATION, NEXT_TOKEN = get_task("classification"), get_task("next-token")


def bert(layers: str = "last:2", **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=128, num_labels=3, max_position_embeddings=32, pad_token_id=0, **changes,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    inject_lora(model, LoraConfig(rank=2, lora_alpha=4, target_modules=("query",), layers=layers))
    return model


def hf_llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=128, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    inject_lora(model, LoraConfig(rank=2, lora_alpha=4, layers="last:1"))
    return model


def own_llama() -> nn.Module:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(50, 64, 4, 4, 2, 128)).eval()
    inject_lora(model, LoraConfig(rank=2, lora_alpha=4, layers="last:2"))
    return model


class Blocks(nn.Module):
    """(b, 6) features through a Sequential of linear blocks to 3 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.blocks(self.first(x)))
        return y


class Skips(Blocks):
    """What enters the blocks is also read above them."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks[0](self.first(x))
        y: Tensor = self.out(self.blocks[2](self.blocks[1](h)) + self.blocks[0](2 * h))
        return y


class Noisy(Blocks):
    """Dropout that nothing switches off."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.nn.functional.dropout(self.first(x), 0.5, training=True)
        y: Tensor = self.out(self.blocks(h))
        return y


class MeanOverPadding(nn.Module):
    """(b, T) ids to 3 logits; no mask, so that padding is part of the mean in the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x).tanh() + x.mean(1, keepdim=True)
        y: Tensor = self.out(x.mean(1))
        return y


def plain_model(kind: type[nn.Module], targets: str = r"blocks\.2|out") -> nn.Module:
    model = seeded(kind)
    inject_lora(model, LoraConfig(rank=3, lora_alpha=4, target_modules=targets))
    return model


def texts(seed: int, *, classes: bool, count: int = 5) -> Examples:
    random = np.random.default_rng(seed)
    ids = np.zeros((count, 12), np.int64)
    targets = np.full((count, 12), -100)
    for n, length in enumerate(random.integers(2, 13, count)):
        ids[n, :length] = random.integers(1, 50, length)
        targets[n, : length - 1], targets[n, length - 1] = ids[n, 1:length], 0
    return Examples(ids, random.integers(0, 3, count) if classes else targets)


def features(seed: int, count: int = 5) -> Examples:
    random = np.random.default_rng(seed)
    return Examples(random.normal(size=(count, 6)).astype(np.float32), np.arange(count) % 3)


MODELS: dict[str, tuple[Any, Task, Any]] = {
    "BERT": (bert, CLASSIFICATION, lambda s: texts(s, classes=True)),
    "BERT, head only": (
        lambda: bert("last:1"),
        CLASSIFICATION,
        lambda s: texts(s, classes=True),
    ),
    "transformers' Llama": (hf_llama, NEXT_TOKEN, lambda s: texts(s, classes=False)),
    "our Llama, texts sharing rows": (own_llama, NEXT_TOKEN, lambda s: texts(s, classes=False)),
    "our Llama, a text a row": (own_llama, NEXT_TOKEN, lambda s: texts(s, count=1, classes=False)),
    "Sequential": (lambda: plain_model(Blocks), CLASSIFICATION, features),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_models_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "LEAST_PARAMETERS", 1)


@contextmanager
def switched_off() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "LEAST_PARAMETERS", 1 << 40)
        yield


def jobs(model: nn.Module, examples: Any, count: int = 3, round: int = 1) -> list[Job]:
    start = extract_adapter(model)
    found = []
    for k in range(count):
        mine = examples(k)
        batches = list(draw_batches(mine, CONFIG, 0, f"c{k}", round))
        found.append(Job(f"c{k}", start, batches, len(batches), CONFIG))
    return found


def rows(model: nn.Module, work: list[Job], task: Task) -> np.ndarray:
    return np.stack([trained.row for trained in train_group(model, work, task)])


@pytest.mark.parametrize("name", MODELS)
def test_training_from_kept_activations_equals_plain_training(name: str) -> None:
    make, task, examples = MODELS[name]
    with switched_off():
        expected = rows(make(), jobs(make(), examples), task)
    model = make()
    found = rows(model, jobs(model, examples), task)
    kept = kept_activations(model)
    assert list(kept.verdicts.values()) == [True]
    assert kept.served > 3  # every step, beside the trial
    # AdamW turns a difference in a tiny gradient's last bits into one of the learning rate's size.
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_one_client_at_a_time_uses_them_too(name: str) -> None:
    make, task, examples = MODELS[name]
    results = {}
    for kept in (False, True):
        model = make()
        batches = list(draw_batches(examples(0), CONFIG, 0, "c0", 1))
        if kept:
            results[kept] = train_local(model, batches, CONFIG, task=task)
            assert list(kept_activations(model).verdicts.values()) == [True]
        else:
            with switched_off():
                results[kept] = train_local(model, batches, CONFIG, task=task)
    assert results[True].loss == pytest.approx(results[False].loss, rel=1e-6)
    for path, layer in results[False].adapter.layers.items():
        np.testing.assert_allclose(results[True].adapter[path].B, layer.B, atol=2e-5)


@pytest.mark.parametrize("length", [5, 12])
def test_logits_of_one_row_are_equal_bit_for_bit(length: int) -> None:
    model = bert()
    ids = np.arange(1, length + 1)[None]
    batch: Batch = {"inputs": ids, "targets": np.array([1])}
    plain = model(torch.from_numpy(ids), attention_mask=torch.ones(1, length)).logits
    losses = lambda some: [CLASSIFICATION.loss(model, some[0]).detach()]  # noqa: E731
    with prefix.cached_prefix(model, losses) as expect:
        expect([batch])
        served = kept_activations(model).served
        cached = model(torch.from_numpy(ids), attention_mask=torch.ones(1, length)).logits
    assert kept_activations(model).served == served + 1
    assert torch.equal(cached, plain)


def test_what_is_kept_does_not_depend_on_which_batch_came_first() -> None:
    """So that a resumed run, which begins with nothing kept, has the bits of an unbroken one."""
    model = bert()
    examples = MODELS["BERT"][2]
    rows(model, jobs(model, examples, round=1), CLASSIFICATION)
    unbroken = rows(model, jobs(model, examples, round=2), CLASSIFICATION)
    kept_activations(model).clear()
    resumed = rows(model, jobs(model, examples, round=2), CLASSIFICATION)
    np.testing.assert_array_equal(resumed, unbroken)


def test_each_example_is_computed_once() -> None:
    model = own_llama()
    work = jobs(model, MODELS["our Llama, texts sharing rows"][2])
    calls = []
    model.get_submodule("model.layers.0").register_forward_hook(
        lambda module, args, out: calls.append(len(args[0]))
    )
    rows(model, work, NEXT_TOKEN)
    first = len(calls)
    rows(model, work, NEXT_TOKEN)
    # The second time the hook sees only passes that step over the block.
    assert len(calls) - first == CONFIG.local_steps
    assert len(kept_activations(model)) <= 3 * 5 + 3  # examples, and the trial's halves


def test_little_memory_changes_no_result() -> None:
    model = bert()
    work = jobs(model, MODELS["BERT"][2])
    expected = rows(model, work, CLASSIFICATION)
    tight = bert()
    kept_activations(tight).limit = 4 * 64 * 30
    np.testing.assert_array_equal(rows(tight, work, CLASSIFICATION), expected)
    assert 0 < kept_activations(tight).bytes <= 4 * 64 * 30


def test_longest_unused_goes_first() -> None:
    kept = KeptActivations(limit=8)
    for key in "ab":
        kept.put(key, torch.zeros(1))
    kept.get("a")
    kept.put("c", torch.zeros(1))
    assert [kept.get(key) is not None for key in "abc"] == [True, False, True]
    assert kept.bytes == 8
    assert len(pickle.loads(pickle.dumps(kept))) == 0


def test_copies_of_a_model_share_what_is_kept() -> None:
    model = bert()
    assert kept_activations(copy.deepcopy(model)) is kept_activations(model)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "skip": (lambda: plain_model(Skips), features, "another result"),
    "dropout": (lambda: plain_model(Noisy), features, "another result"),
    "adapted below": (
        lambda: plain_model(Blocks, r"first|blocks\.2"),
        features,
        "'first' is adapted and comes before",
    ),
    "padding that is seen": (
        lambda: plain_model(MeanOverPadding),
        lambda s: texts(s, classes=True),
        "another result",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_model_that_cannot_start_in_the_middle_is_trained_plainly(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, examples, reason = REFUSED[name]
    torch.manual_seed(5)
    with switched_off():
        expected = rows(make(), jobs(make(), examples), CLASSIFICATION)
    model = make()
    with caplog.at_level(logging.INFO, "fedlora.nn.prefix"):
        found = rows(model, jobs(model, examples), CLASSIFICATION)
    assert list(kept_activations(model).verdicts.values()) == [False]
    assert reason in caplog.text
    if name != "dropout":
        np.testing.assert_array_equal(found, expected)


def test_adapted_first_block_or_a_small_prefix_leaves_everything_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = plain_model(Blocks, r"blocks\.0")
    train_cohort(model, jobs(model, features), CLASSIFICATION)
    assert kept_activations(model).verdicts == {}
    monkeypatch.undo()
    model = plain_model(Blocks)
    train_cohort(model, jobs(model, features), CLASSIFICATION)
    assert kept_activations(model).verdicts == {}


def test_an_id_0_at_the_end_of_a_text_is_computed_and_padding_is_not() -> None:
    model = hf_llama()
    ids = np.array([[4, 7, 0, 0, 0], [4, 7, 9, 8, 3]])
    targets = np.array([[7, 0, 0, -100, -100], [7, 9, 8, 3, 1]])
    batch: Batch = {"inputs": ids, "targets": targets}
    job = Job("c", extract_adapter(model), [batch] * 2, 2, CONFIG)
    with switched_off():
        expected = rows(model, [job], NEXT_TOKEN)
    np.testing.assert_allclose(rows(model, [job], NEXT_TOKEN), expected, atol=2e-5)
    lengths = {len(key[-1]) // 8 for key in kept_activations(model)._values}
    assert {3, 5} <= lengths


def test_it_can_be_switched_off() -> None:
    model = bert()
    for enabled in (True, False):
        kept_activations(model).enabled = enabled
        with prefix.cached_prefix(model, lambda batches: []) as expect:
            assert (expect is prefix._ignored) is not enabled
