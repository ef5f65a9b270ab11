"""The session: logits against NumPy, adapters swapped, refused and served beside one another."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedlora as fl
from fedlora.device import Session, open_bundle
from fedlora.errors import (
    BaseMismatchError,
    ConfigError,
    DataError,
    DigestMismatchError,
    FedloraError,
    FormatError,
    LayerMismatchError,
    NonFiniteError,
    ShapeMismatchError,
    UnknownNameError,
    UnsupportedError,
)
from tests.device.hand_made import (
    ATTENTION,
    CLASSES,
    FEATURES,
    HandMade,
    classifier_logits,
    language_logits,
    rewrite_manifest,
    write_classifier,
    write_language_model,
)
from tests.matching import raises

ROUNDING = 2e-5  # float32 against float64


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: Any) -> HandMade:
    return write_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def language(tmp_path_factory: Any) -> HandMade:
    return write_language_model(tmp_path_factory.mktemp("language"))


def numbers(rows: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal((rows, FEATURES)).astype(np.float32)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_logits_are_those_of_numpy_and_the_base_comes_back_bit_for_bit(
    classifier: HandMade, language: HandMade, rank: int, low_memory: bool
) -> None:
    ids = np.random.default_rng(0).integers(0, language.manifest.outputs, (3, 9))
    for made, inputs, plain in (
        (classifier, numbers(5), classifier_logits),
        (language, ids, language_logits),
    ):
        session = Session(made.folder, threads=1, low_memory=low_memory)
        base = session.run(inputs)
        np.testing.assert_allclose(base, plain(made.weights, inputs), atol=ROUNDING)
        adapter = made.adapter(rank)
        session.swap(adapter)
        assert session.adapter is adapter
        expected = plain(made.weights, inputs, adapter)
        found = session.run(inputs)
        np.testing.assert_allclose(found, expected, atol=ROUNDING, rtol=1e-5)
        assert np.abs(found - base).max() > 0.1  # it does something
        session.swap(None)
        assert session.adapter is None
        np.testing.assert_array_equal(session.run(inputs), base)


def test_a_stack_and_an_adapter_of_some_layers_are_served_as_they_are(
    classifier: HandMade,
) -> None:
    first, second = classifier.adapter(2, seed=1), classifier.adapter(3, seed=2, layers=["fc2"])
    x = numbers(4)
    session = Session(classifier.folder, adapter=fl.stack([first, second]), threads=1)
    both = classifier_logits(classifier.weights, x, first, second)
    np.testing.assert_allclose(session.run(x), both, atol=ROUNDING)
    session.swap(second)  # nothing of the stack's fc1 stays behind
    expected = classifier_logits(classifier.weights, x, second)
    np.testing.assert_allclose(session.run(x), expected, atol=ROUNDING)


def test_a_web_bundle_is_fed_zeros(tmp_path: Path) -> None:
    made = write_classifier(tmp_path, web=True)
    session, x = Session(tmp_path, threads=1), numbers(4)
    np.testing.assert_allclose(session.run(x), classifier_logits(made.weights, x), atol=ROUNDING)
    adapter = made.adapter(layers=["fc1"])
    session.swap(adapter)
    expected = classifier_logits(made.weights, x, adapter)
    np.testing.assert_allclose(session.run(x), expected, atol=ROUNDING)


def other_shape(made: HandMade) -> fl.Adapter:
    layer = fl.LoraLayer(np.ones((2, FEATURES + 1)), np.ones((8, 2)), 1.0)
    return replace(made.adapter(), layers={"fc1": layer})


def not_finite(made: HandMade) -> fl.Adapter:
    layer = made.adapter()["fc1"]
    too_large = replace(layer, B=np.full(layer.B.shape, 1e30), scaling=1e30)
    return replace(made.adapter(), layers={"fc1": too_large})


def dora(made: HandMade) -> fl.Adapter:
    layer = replace(made.adapter()["fc1"], magnitude=np.ones(8))
    config = replace(made.manifest.lora, variant="dora")
    return fl.Adapter({"fc1": layer}, config, made.manifest.base)


REFUSED: dict[str, tuple[Callable[[HandMade], Any], type[FedloraError], tuple[str, ...]]] = {
    "other base": (
        lambda made: replace(made.adapter(), base="ff" * 32),
        BaseMismatchError,
        ("base c1c1c1c1c1c1 (hand-made-classifier)", "found one of ffffffffffff"),
    ),
    "unknown layer": (
        lambda made: replace(made.adapter(), layers={"fc3": made.adapter()["fc1"]}),
        LayerMismatchError,
        ("layer 'fc3'", "did you mean 'fc"),
    ),
    "other shape": (
        other_shape,
        ShapeMismatchError,
        ("layer 'fc1': expected linear (6,) -> 8, found linear (7,) -> 8",),
    ),
    "other kind": (
        lambda made: replace(
            made.adapter(), layers={"fc1": replace(made.adapter()["fc1"], kind="embedding")}
        ),
        ShapeMismatchError,
        ("expected linear", "found embedding"),
    ),
    "too large once folded": (not_finite, NonFiniteError, ("fc1.lora_B.weight", "scaling")),
    "DoRA": (dora, UnsupportedError, ("DoRA", "fedlora export --merge")),
    "unknown name": (lambda made: "bob", UnknownNameError, ("unknown adapter 'bob'", "alice")),
    "not an adapter": (lambda made: {"fc1": 1}, ConfigError, ("expected an Adapter, found dict",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_the_old_adapter_stays(
    classifier: HandMade, case: str
) -> None:
    make, kind, texts = REFUSED[case]
    session, x, mine = Session(classifier.folder, threads=1), numbers(4), classifier.adapter()
    session.add("alice", mine)
    session.swap("alice")
    before = session.run(x)
    with raises(kind, *texts):
        session.swap(make(classifier))
    if case != "unknown name":
        with raises(kind, *texts):
            session.add("alice", make(classifier))
    assert session.adapter is mine
    np.testing.assert_array_equal(session.run(x), before)
    np.testing.assert_array_equal(session.run(x, adapter="alice"), before)


def test_a_file_is_checked_before_it_is_served(classifier: HandMade, tmp_path: Path) -> None:
    path, x = tmp_path / "mine.safetensors", numbers(4)
    adapter = classifier.adapter(4)
    fl.save_adapter(adapter, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    session = Session(classifier.folder, threads=1)
    assert session.load(path, sha256=digest) == adapter
    served = session.run(x)
    expected = classifier_logits(classifier.weights, x, adapter)
    np.testing.assert_allclose(served, expected, atol=ROUNDING)
    with raises(DigestMismatchError, "mine.safetensors"):
        session.load(path, sha256="0" * 64)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with raises(DigestMismatchError, "damaged"):
        session.load(path)
    with raises(FormatError, "nowhere.safetensors"):
        session.load(tmp_path / "nowhere.safetensors")
    np.testing.assert_array_equal(session.run(x), served)


def test_a_merged_bundle_takes_no_adapter(tmp_path: Path) -> None:
    made = write_classifier(tmp_path)
    rewrite_manifest(tmp_path, replace(made.manifest, merged="ab" * 32))
    session = Session(tmp_path, threads=1)
    with raises(BaseMismatchError, "abababababab is merged"):
        session.swap(made.adapter())


def test_adapters_in_turn_are_as_each_alone(classifier: HandMade) -> None:
    shared = Session(classifier.folder, threads=1)
    adapters = {name: classifier.adapter(rank, rank) for name, rank in (("a", 2), ("b", 5))}
    alone = {}
    for name, adapter in adapters.items():
        shared.add(name, adapter)
        alone[name] = Session(classifier.folder, adapter=adapter, threads=1)
    alone[None] = Session(classifier.folder, threads=1)
    names = np.random.default_rng(0).choice(["a", "b", ""], 300)

    def served(index: int) -> bool:
        name = str(names[index]) or None
        x = numbers(3, index)
        return np.array_equal(shared.run(x, adapter=name), alone[name].run(x))

    assert all(served(index) for index in range(100))
    with ThreadPoolExecutor(3) as threads:  # requests of several threads do not mix either
        assert all(threads.map(served, range(300)))
    assert shared.names == ("a", "b")
    assert shared.adapter is None  # a request's adapter is that request's alone
    shared.swap("a")
    shared.remove("a")
    assert shared.adapter is adapters["a"]
    with raises(UnknownNameError, "unknown adapter 'a'"):
        shared.run(numbers(1), adapter="a")


def test_predictions(classifier: HandMade) -> None:
    session, x = Session(classifier.folder, threads=1), numbers(5)
    logits = classifier_logits(classifier.weights, x)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = session.predict(x)
    for row, prediction in zip(expected, found, strict=True):
        np.testing.assert_allclose(prediction.probabilities, row, atol=ROUNDING)
        assert prediction.index == row.argmax()
        assert prediction.label == ("rest", "walk", "run")[row.argmax()]
        assert prediction.probability == prediction.probabilities[prediction.index]
    assert len(found[0].probabilities) == CLASSES
    with raises(DataError, "expected numbers, found text"):
        session.predict(["a", "b"])


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (np.zeros((2, FEATURES + 1)), "expected (batch, 6), none of them 0, found (2, 7)"),
        (np.zeros((0, FEATURES)), "none of them 0, found (0, 6)"),
        (np.zeros(FEATURES), "found (6,)"),
        (np.array([["a"] * FEATURES]), "expected float32, found <U1"),
        (np.array([[None] * FEATURES]), "expected float32, found object"),
    ],
)
def test_inputs_that_do_not_fit(classifier: HandMade, inputs: Any, text: str) -> None:
    session = Session(classifier.folder, threads=1)
    with raises(DataError, "inputs: ", text):
        session.run(inputs)


def test_tokens_that_do_not_fit(language: HandMade) -> None:
    session = Session(language.folder, threads=1)
    with raises(DataError, "inputs: expected int64, found float64"):
        session.run(np.zeros((1, 3)))
    with raises(DataError, "inputs: expected (batch, time)"):
        session.run(np.zeros(3, int))
    with raises(DataError, "inputs: ONNX Runtime cannot run the graph", "out of"):
        session.run(np.array([[language.manifest.outputs]]))
    with raises(DataError, "inputs: expected token ids >= 0, found -1"):
        session.run(np.array([[3, -1]]))
    with raises(ConfigError, "found next-token; use generate or suggest"):
        session.predict("a")


def test_what_a_classifier_cannot_do(classifier: HandMade) -> None:
    session = Session(classifier.folder, threads=1)
    with raises(ConfigError, "expected a bundle of a language model"):
        session.generate("a")
    with raises(ConfigError, "expected a bundle of a language model"):
        session.suggest("a")


def test_sessions_of_one_bundle_map_its_weights_once(language: HandMade) -> None:
    one, two = open_bundle(language.folder, threads=1), open_bundle(language.folder, threads=1)
    assert one._base is two._base
    session = Session(one)
    assert session.bundle is one
    mapped = [
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(language.folder) in line
    ]
    assert len(mapped) == 1
    graph = one.session("infer.onnx")
    values = graph.fedlora_keeps[1]
    name = f"{ATTENTION}.q_proj.weight"
    address = one._base.data.ctypes.data
    offset = values[name].data_ptr() - address
    assert 0 <= offset < one._base.data.nbytes  # no copy


def test_a_graph_outlives_the_bundle_that_it_came_from(language: HandMade) -> None:
    import gc

    graph = open_bundle(language.folder, threads=1, low_memory=True).session("infer.onnx")
    gc.collect()
    ids = np.zeros((1, 4), np.int64)
    expected = language_logits(language.weights, ids)
    np.testing.assert_allclose(graph.run(None, {"inputs": ids})[0], expected, atol=ROUNDING)


def test_a_graph_that_is_not_there(classifier: HandMade) -> None:
    bundle = open_bundle(classifier.folder, threads=1)
    with raises(ConfigError, "infer.onnx, train_16.onnx", "found 'decode.onnx'"):
        bundle.session("decode.onnx")
    assert bundle.session("train_16.onnx") is bundle.session("train_16.onnx")
    with raises(ConfigError, "no tokenizer.json"):
        bundle.tokenizer()
    with raises(ConfigError, "threads"):
        open_bundle(classifier.folder, threads=0)


def test_no_torch_and_no_onnx_package_is_imported(language: HandMade) -> None:
    code = f"""
import sys
from fedlora.device import Session
session = Session({str(language.folder)!r}, threads=1)
"".join(session.generate("the cat", 3)), session.suggest("the ")
print([name for name in ("torch", "onnx", "transformers", "flwr", "safetensors.torch")
       if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_onnxruntime_the_error_names_the_extra() -> None:
    code = """
import sys
sys.modules["onnxruntime"] = None
import fedlora.device
import fedlora.device.manifest
try:
    fedlora.device.Session
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "run pip install 'fedlora[device]'" in done.stdout
