"""Losses and scores against the same written as loops over tokens."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.adapter import LoraConfig
from fedlora.errors import ConfigError, UnknownNameError
from fedlora.nn import Batch, Task, get_task, inject_lora, rows, tasks
from fedlora.nn.llama import Llama, LlamaConfig
from tests.nn.models import Mlp, TiedLm, seeded

NEXT = get_task("next-token")
CLASSES = get_task("classification")


def sentences(vocabulary: int = 11, seed: int = 0) -> Batch:
    """Three sentences of 4, 2 and 0 counted targets, right-padded to 6."""
    random = np.random.default_rng(seed)
    targets = random.integers(0, vocabulary, (3, 6))
    targets[0, 4:] = targets[1, 2:] = targets[2] = -100
    targets[0, 1] = -100
    starts = np.zeros((3, 6), bool)
    starts[0, [0, 1, 3]] = starts[1, 1] = True  # one of them where nothing is counted
    return {
        "inputs": random.integers(0, vocabulary, (3, 6)),
        "targets": targets,
        "word_starts": starts,
    }


def by_hand(logits: np.ndarray, batch: Batch) -> dict[str, float]:
    sums = dict.fromkeys(("nats", "tokens", "top1", "top3", "word_starts"), 0.0)
    for row, sentence in enumerate(batch["targets"]):
        for column, target in enumerate(sentence):
            if target == -100:
                continue
            values = logits[row, column].astype(np.float64)
            sums["nats"] += np.log(np.exp(values).sum()) - values[target]
            sums["tokens"] += 1
            if batch["word_starts"][row, column]:
                best = np.argsort(-values, kind="stable")[:3]
                sums["word_starts"] += 1
                sums["top1"] += best[0] == target
                sums["top3"] += target in best
    return sums


class Wrapped(nn.Module):
    """Returns its logits as an object, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = seeded(TiedLm)

    def forward(self, ids: Tensor) -> Any:
        return types.SimpleNamespace(logits=self.inner(ids))


def llama() -> nn.Module:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(11, 8, 1, 2, 2, 12)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


@pytest.mark.parametrize("make", [lambda: seeded(TiedLm), Wrapped, llama])
def test_next_token_score_and_loss_are_those_of_a_loop(make: Any) -> None:
    model, batch = make(), sentences()
    with torch.no_grad():
        out = model(torch.tensor(batch["inputs"]))
    expected = by_hand((out if isinstance(out, Tensor) else out.logits).numpy(), batch)
    found = NEXT.score(model, batch)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found["tokens"] == 5
    assert found["word_starts"] == 3
    loss = float(NEXT.loss(model, batch).detach())
    assert loss == pytest.approx(expected["nats"] / 5, rel=1e-6)


def test_top1_and_top3_count_hits() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.row = nn.Parameter(torch.tensor([0.0, 3.0, 2.0, 1.0]))

        def forward(self, ids: Tensor) -> Tensor:
            return self.row.expand(*ids.shape, 4)

    targets = np.array([[1, 2, 3, 0]])
    batch = {"inputs": targets * 0, "targets": targets, "word_starts": np.ones((1, 4), bool)}
    found = NEXT.score(Fixed(), batch)
    assert (found["top1"], found["top3"], found["word_starts"]) == (1, 3, 4)


def test_scores_of_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = llama(), sentences()
    whole = NEXT.score(model, batch)
    monkeypatch.setattr(tasks, "SCORED_LOGITS", 1)  # one row at a time
    assert NEXT.score(model, batch) == pytest.approx(whole, rel=1e-6)


def test_logits_in_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    model = seeded(TiedLm)
    model.lm_head.register_forward_hook(lambda m, i, out: seen.append(out.numel()))
    monkeypatch.setattr(tasks, "SCORED_LOGITS", 2 * 6 * 11)
    NEXT.score(model, sentences())
    assert seen == [2 * 6 * 11, 1 * 6 * 11]


def test_a_batch_without_counted_targets_has_no_loss_and_no_gradient() -> None:
    model = seeded(TiedLm)
    inject_lora(model, LoraConfig(rank=2))
    batch = dict(sentences(), targets=np.full((3, 6), -100))
    loss = NEXT.loss(model, batch)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters() if p.grad is not None)
    assert NEXT.score(model, batch) == dict.fromkeys(NEXT.score(model, batch), 0.0)


def test_the_heads_gradient_is_the_same_at_counted_positions_only() -> None:
    """`Llama` computes its head only where a target counts; the plain way is the truth."""
    batch, gradients = sentences(), []
    for plain in (False, True):
        model = llama()
        inject_lora(model, LoraConfig(rank=2, target_modules=("q_proj", "down_proj", "lm_head")))
        if plain:
            logits = model(torch.tensor(batch["inputs"])).flatten(0, 1)
            targets = torch.tensor(batch["targets"]).flatten()
            loss = nn.functional.cross_entropy(logits, targets, ignore_index=-100)
        else:
            loss = NEXT.loss(model, batch)
        wanted = [p for n, p in model.named_parameters() if n.endswith("lora_B")]
        gradients.append(torch.autograd.grad(loss, wanted))
    for found, expected in zip(*gradients, strict=True):
        assert float(expected.abs().max()) > 1e-4
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_classification_sums_are_those_of_a_loop() -> None:
    model = seeded(Mlp)
    inputs = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)
    batch = {"inputs": inputs, "targets": np.arange(9) % 3}
    with torch.no_grad():
        logits = model(torch.tensor(inputs)).double().numpy()
    pairs = list(zip(logits, np.arange(9) % 3, strict=True))
    nats = [np.log(np.exp(row).sum()) - row[target] for row, target in pairs]
    correct = sum(int(row.argmax() == target) for row, target in pairs)
    expected = {"nats": sum(nats), "examples": 9, "correct": correct}
    assert CLASSES.score(model, batch) == pytest.approx(expected, rel=1e-6)
    assert float(CLASSES.loss(model, batch).detach()) == pytest.approx(np.mean(nats), rel=1e-6)


def test_names_metrics_and_directions() -> None:
    assert (NEXT.name, NEXT.metric, NEXT.higher_is_better) == ("next-token", "loss", False)
    assert CLASSES.metric == "accuracy"
    assert CLASSES.higher_is_better


def test_a_function_can_return_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("own_tasks")
    own = Task("own", "loss", False, NEXT.loss, NEXT.score)
    module.make = lambda: own
    module.wrong = lambda: 3
    monkeypatch.setitem(sys.modules, "own_tasks", module)
    assert get_task("own_tasks:make") is own
    with pytest.raises(ConfigError) as error:
        get_task("own_tasks:wrong")
    assert str(error.value) == (
        "task: expected 'own_tasks:wrong' to return a fedlora.nn.Task, found int"
    )


@pytest.mark.parametrize("name", ["no_such_module_here:make", "math:no_such"])
def test_a_task_that_cannot_be_imported_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"task: cannot import {name!r}: "):
        get_task(name)


@pytest.mark.parametrize("name", ["math:", ":make"])
def test_half_a_function_is_no_task(name: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown task {name!r}; known: .*module:function"):
        get_task(name)


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as error:
        get_task("next_token")
    assert str(error.value) == "unknown task 'next_token'; did you mean 'next-token'?"


def test_texts_that_share_a_row_are_scored_as_if_each_were_alone():
    """Packed without padding: 1e-5 for rotary positions that start elsewhere."""
    model = Llama(LlamaConfig(50, 16, 2, 2, 1, 24))
    generator = np.random.default_rng(0)
    lengths = [5, 1, 9, 3]
    inputs = np.zeros((4, 9), np.int64)
    targets = np.full((4, 9), -100, np.int64)
    alone = []
    for row, length in enumerate(lengths):
        inputs[row, :length] = generator.integers(1, 50, length)
        targets[row, :length] = generator.integers(1, 50, length)
        targets[row, 0] = -100 if length > 1 else targets[row, 0]  # not every target counts
        logits = model(torch.from_numpy(inputs[row : row + 1, :length]))[0]
        wanted = torch.from_numpy(targets[row, :length])
        alone.append(F.cross_entropy(logits, wanted, reduction="sum"))
    counted = int((targets >= 0).sum())
    loss = get_task("next-token").loss(model, {"inputs": inputs, "targets": targets})
    assert loss.item() == pytest.approx(sum(alone).item() / counted, abs=1e-5)


def client_batches() -> list[Batch]:
    """Batches of 3, 1 and 2 sentences, of which some are shorter and one has nothing counted."""
    first, second = sentences(), sentences(seed=1)
    one = {name: values[:1, :4] for name, values in second.items()}
    return [first, one, {name: values[1:] for name, values in second.items()}]


def packing() -> nn.Module:
    torch.manual_seed(0)
    return Llama(LlamaConfig(11, 16, 1, 2, 2, 24)).eval()


@pytest.mark.parametrize("model", [packing, lambda: seeded(TiedLm)], ids=["packed", "padded"])
def test_scores_of_many_clients_are_those_of_each_alone(model):
    model, batches = model(), client_batches()
    assert NEXT.scores is not None
    for sums, batch in zip(NEXT.scores(model, batches), batches, strict=True):
        alone = NEXT.score(model, batch)
        assert sums.keys() == alone.keys()
        # float32 with other orders of summation; counts are exact
        assert sums.pop("nats") == pytest.approx(alone.pop("nats"), rel=1e-5)
        assert sums == alone


@pytest.mark.parametrize("width", [1, 6, 9])
def test_texts_in_several_rows_score_as_in_one(width, monkeypatch):
    """Of every width: a row a text, some rows, and one; counts are exact, sums are float32's."""
    model, batch = packing(), sentences()
    whole, loss = NEXT.score(model, batch), NEXT.loss(model, batch)
    monkeypatch.setattr(rows, "ROW_TOKENS", width)
    cut = NEXT.score(model, batch)
    assert cut.pop("nats") == pytest.approx(whole.pop("nats"), rel=1e-5)
    assert cut == whole
    torch.testing.assert_close(NEXT.loss(model, batch), loss, rtol=1e-5, atol=0)


def test_a_text_that_does_not_fit_begins_a_row():
    assert rows._places([60, 36, 1, 200, 5]) == ([0, 0, 1, 2, 3], [0, 60, 0, 0, 0], 200)


def test_scores_without_marked_word_starts_count_none():
    batch = {name: v for name, v in sentences().items() if name != "word_starts"}
    assert NEXT.scores is not None
    (sums,) = NEXT.scores(packing(), [batch])
    assert (sums["tokens"], sums["word_starts"], sums["top3"]) == (5, 0, 0)


def test_scores_of_classes_do_not_count_the_rows_that_fill_a_block_up():
    model, random = seeded(Mlp), np.random.default_rng(0)
    batches = [
        {
            "inputs": random.normal(size=(rows, 6)).astype(np.float32),
            "targets": random.integers(0, 3, rows),
        }
        for rows in (1, 4, 2)
    ]
    assert CLASSES.scores is not None
    for sums, batch in zip(CLASSES.scores(model, batches), batches, strict=True):
        alone = CLASSES.score(model, batch)
        assert sums.pop("nats") == pytest.approx(alone.pop("nats"), rel=1e-5)
        assert sums == alone
