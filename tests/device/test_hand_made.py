"""The bundles that other tests stand on: each graph against NumPy, gradients by differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from fedlora.adapter import Adapter
from fedlora.device.manifest import factor_names, factors_of, verify_files
from tests.device.hand_made import (
    CLASSES,
    FEATURES,
    HEADS,
    SIZE,
    HandMade,
    classifier_logits,
    language_logits,
    mean_loss,
    write_classifier,
    write_language_model,
)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: Any) -> HandMade:
    return write_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def language(tmp_path_factory: Any) -> HandMade:
    return write_language_model(tmp_path_factory.mktemp("language"))


def open_plainly(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def check_gradients(
    made: HandMade,
    session: ort.InferenceSession,
    batch: dict[str, Any],
    plain: Callable[..., float],
) -> None:
    """Compare loss and gradients with central differences of the plain loss in float64."""
    mine, frozen = made.adapter(rank=3, seed=1), made.adapter(rank=2, seed=2)
    feeds = {**batch, **dict(factors_of(mine)), **dict(factors_of(frozen, frozen=True))}
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, feeds), strict=True))
    assert found["loss"] == pytest.approx(plain(mine, frozen), abs=2e-6)  # float32 against float64
    rng = np.random.default_rng(0)
    for path, layer in mine.layers.items():
        for part, name in zip("AB", factor_names(path), strict=True):
            grad = found[name.removesuffix("weight") + "grad"]
            factor = getattr(layer, part)
            assert grad.shape == factor.shape
            way = rng.standard_normal(factor.shape).astype(np.float32)
            step = 1e-3

            def moved(by: float, path: str = path, part: str = part, way: Any = way) -> float:
                layer = mine[path]
                # B is folded in the graph: a step of it is one of B times the scaling.
                size = by / layer.scaling if part == "B" else by
                value = getattr(layer, part).astype(np.float64) + size * way
                changed = replace(layer, **{part: value})
                return plain(Adapter({**mine.layers, path: changed}, mine.config), frozen)

            slope = (moved(step) - moved(-step)) / (2 * step)
            # Factors are rounded to float32: 1e-7 of each over a step of 1e-3.
            assert float((grad * way).sum()) == pytest.approx(slope, rel=3e-4, abs=1e-3)


def test_the_classifier(classifier: HandMade) -> None:
    verify_files(classifier.folder, classifier.manifest)
    x = np.random.default_rng(0).standard_normal((5, FEATURES)).astype(np.float32)
    session = open_plainly(classifier.folder / "infer.onnx")
    (base,) = session.run(None, {"inputs": x})
    np.testing.assert_allclose(base, classifier_logits(classifier.weights, x), atol=1e-5)
    adapter = classifier.adapter(rank=4)
    (with_it,) = session.run(None, {"inputs": x, **dict(factors_of(adapter))})
    expected = classifier_logits(classifier.weights, x, adapter)
    np.testing.assert_allclose(with_it, expected, atol=1e-5)  # float32 against float64


def test_the_classifiers_training_step(classifier: HandMade) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, FEATURES)).astype(np.float32)
    y = rng.integers(0, CLASSES, 16)
    y[3:6] = -100
    check_gradients(
        classifier,
        open_plainly(classifier.folder / "train_16.onnx"),
        {"inputs": x, "targets": y},
        lambda *adapters: mean_loss(classifier_logits(classifier.weights, x, *adapters), y),
    )


def test_the_language_model(language: HandMade) -> None:
    ids = np.random.default_rng(0).integers(0, language.manifest.outputs, (2, 7))
    adapter = language.adapter(rank=4)
    expected = language_logits(language.weights, ids, adapter)
    factors = dict(factors_of(adapter))
    infer = open_plainly(language.folder / "infer.onnx")
    (logits,) = infer.run(None, {"inputs": ids, **factors})
    np.testing.assert_allclose(logits, expected, atol=2e-5)  # float32 against float64
    decode = open_plainly(language.folder / "decode.onnx")
    key = value = np.zeros((2, HEADS, 0, SIZE), np.float32)
    for begin, end in ((0, 4), (4, 5), (5, 7)):
        cache = {"past_key_values.0.key": key, "past_key_values.0.value": value}
        last, key, value = decode.run(None, {"inputs": ids[:, begin:end], **cache, **factors})
        np.testing.assert_allclose(last, expected[:, end - 1], atol=2e-5)
    assert key.shape == value.shape == (2, HEADS, 7, SIZE)


def test_the_language_models_training_step(language: HandMade) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, language.manifest.outputs, (4, 16))
    targets = rng.integers(0, language.manifest.outputs, (4, 16))
    targets[1, 5:] = -100
    check_gradients(
        language,
        open_plainly(language.folder / "train_4x16.onnx"),
        {"inputs": ids, "targets": targets},
        lambda *adapters: mean_loss(language_logits(language.weights, ids, *adapters), targets),
    )
