"""Scores from logits against those that torch adds up, and how many rows are scored at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedlora as fl
from fedlora.data import Examples
from fedlora.device import scoring
from fedlora.device.manifest import Manifest
from fedlora.device.scoring import classification_sums, evaluate, next_token_sums
from fedlora.errors import DataError, NonFiniteError
from fedlora.evaluation import measured
from fedlora.nn import get_task
from fedlora.targets import LayerSpec
from tests.matching import raises

VOCABULARY, CLASSES = 37, 5
TEXT = Manifest(
    base="ab" * 32, base_id="a", task="next-token",
    layers={"a": LayerSpec("linear", (4,), 3)}, lora=fl.LoraConfig(rank=2),
    graphs={}, files={}, outputs=VOCABULARY,
)  # fmt: skip
FEATURES = replace(
    TEXT, task="classification", input_dtype="float32", input_shape=(6,), outputs=CLASSES
)


class Table(nn.Module):
    """Logits by a table; for features by a matrix."""

    def __init__(self, text: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        rows = VOCABULARY if text else 6
        self.table = nn.Parameter(4 * torch.randn(rows, VOCABULARY if text else CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table if x.is_floating_point() else self.table[x]


@dataclass
class Fake:
    """A session that runs a model of torch, and remembers the shapes it was given."""

    manifest: Manifest
    model: nn.Module
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def run(self, inputs: Any) -> Any:
        self.shapes.append(inputs.shape)
        with torch.no_grad():
            return self.model(torch.tensor(inputs)).numpy()


def texts(rows: int = 30) -> Examples:
    random = np.random.default_rng(0)
    counted = np.arange(20) < random.integers(1, 21, rows)[:, None]
    ids, targets = random.integers(1, VOCABULARY, (2, rows, 20))
    return Examples(
        np.where(counted, ids, 0), np.where(counted, targets, -100),
        counted & (random.random((rows, 20)) < 0.4), random.integers(3, 50, rows),
    )  # fmt: skip


def features(rows: int = 40) -> Examples:
    random = np.random.default_rng(0)
    inputs = random.normal(size=(rows, 6)).astype(np.float32)
    return Examples(inputs, random.integers(0, CLASSES, rows))


def batch_of(examples: Examples) -> dict[str, Any]:
    batch = {"inputs": examples.inputs, "targets": examples.targets}
    return batch | ({} if examples.word_starts is None else {"word_starts": examples.word_starts})


@pytest.mark.parametrize("text", [True, False])
def test_sums_are_those_of_torch(text: bool) -> None:
    model, examples = Table(text), texts() if text else features()
    batch = batch_of(examples)
    theirs = get_task("next-token" if text else "classification").score(model, batch)
    logits = Fake(TEXT, model).run(batch["inputs"])
    if text:
        ours = next_token_sums(logits, batch["targets"], batch["word_starts"])
    else:
        ours = classification_sums(logits, batch["targets"])
    nats = theirs.pop("nats")
    # torch rounds each logarithm to float32.
    assert ours.pop("nats") == pytest.approx(nats, rel=1e-6)
    assert ours == theirs
    assert min(theirs.values()) > 0


@pytest.mark.parametrize("text", [True, False])
def test_measures_are_those_of_torch(text: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the rows are scored a few at a time."""
    model, examples = Table(text), texts() if text else features()
    task = get_task("next-token" if text else "classification")
    expected = measured(task.score(model, batch_of(examples)), examples, task, "torch")
    session = Fake(TEXT if text else FEATURES, model)
    assert evaluate(session, examples) == pytest.approx(expected, rel=1e-6)
    names = {"loss", "perplexity", "top1", "top3", "bits_per_character"}
    assert expected.keys() == (names if text else {"loss", "accuracy"})
    if text:
        monkeypatch.setattr(scoring, "SCORED_LOGITS", 40 * VOCABULARY)
        cut = Fake(TEXT, model)
        assert evaluate(cut, examples) == pytest.approx(expected, rel=1e-6)
        assert max(rows * time for rows, time in cut.shapes) <= 40
        assert len(cut.shapes) > len(session.shapes)


def test_texts_without_word_starts_have_no_guesses() -> None:
    examples = texts()
    plain = Examples(examples.inputs, examples.targets)
    values = evaluate(Fake(TEXT, Table(True)), plain)
    assert (values["top1"], values["top3"]) == (0, 0)
    assert values["loss"] == pytest.approx(evaluate(Fake(TEXT, Table(True)), examples)["loss"])


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[1e30, -1e30, 0.0]], np.float32)
    assert classification_sums(logits, np.array([0]))["nats"] == 0
    assert classification_sums(logits, np.array([1]))["nats"] == pytest.approx(2e30)


def test_a_row_without_a_class_does_not_count() -> None:
    examples, model = features(), Table(False)
    kept = np.arange(0, len(examples), 2)
    targets = np.full(len(examples), -100)
    targets[kept] = examples.targets[kept]
    session = Fake(FEATURES, model)
    expected = evaluate(session, examples.take(kept))
    assert evaluate(session, Examples(examples.inputs, targets)) == pytest.approx(expected)


def test_targets_that_are_no_class_are_refused() -> None:
    """A negative one would count from the end of the logits."""
    inputs, session = features().inputs, Fake(FEATURES, Table(False))
    for wrong in (-1, CLASSES):
        with raises(DataError, f"me: targets: expected 0 to {CLASSES - 1}, or -100", f"{wrong}"):
            evaluate(session, Examples(inputs, np.full(len(inputs), wrong)), "me")
    with raises(DataError, "me: expected a target that counts, found -100 everywhere"):
        evaluate(session, Examples(inputs, np.full(len(inputs), -100)), "me")


def test_what_cannot_be_evaluated_is_refused() -> None:
    session = Fake(TEXT, Table(True))
    with raises(DataError, "me: expected held-out examples to evaluate on, found none"):
        evaluate(session, texts().take([]), "me")
    with raises(
        DataError,
        "me: expected targets per token for this bundle's task next-token, found shape (40,)",
    ):
        evaluate(session, features(), "me")
    model = Table(True)
    model.table.data[3] = np.nan
    with raises(NonFiniteError, "me: the held-out loss is nan; lower the learning rate"):
        evaluate(Fake(TEXT, model), texts(), "me")
