"""An owner's files as examples, and the part of them that is held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.data.text import encode_messages, load_tokenizer
from fedlora.device.owner_data import read_inputs, read_messages, read_owner_data
from fedlora.errors import ConfigError, DataError, UnknownNameError
from tests.device.hand_made import FEATURES, HandMade, write_classifier, write_language_model
from tests.matching import raises

MESSAGES = [f"the cat sat on the mat{' at' * n}" for n in range(10)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: Any) -> HandMade:
    return write_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def language(tmp_path_factory: Any) -> HandMade:
    return write_language_model(tmp_path_factory.mktemp("language"), buckets=((4, 16), (2, 8)))


def test_the_last_fifth_of_the_messages_is_held_out(language: HandMade, tmp_path: Path) -> None:
    file = tmp_path / "messages.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(MESSAGES).encode() + b"\n  \n")
    found = read_owner_data(str(file), language.folder, language.manifest)
    tokenizer = load_tokenizer(language.folder)
    for part, messages in ((found.train, MESSAGES[:8]), (found.held_out, MESSAGES[8:])):
        expected = encode_messages(messages, tokenizer, 16)  # the longest row of a train graph
        np.testing.assert_array_equal(part.inputs, expected.inputs)
        np.testing.assert_array_equal(part.targets, expected.targets)
    assert found.train.inputs.shape[1] == 16, "a longer message is cut"
    half = read_owner_data(str(file), language.folder, language.manifest, held_out_share=0.5)
    assert (len(half.train), len(half.held_out)) == (5, 5)


def test_json_lines_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "messages.jsonl"
    file.write_text("\n".join(json.dumps({"text": m, "when": 1}) for m in MESSAGES) + "\n\n")
    assert read_messages(file) == MESSAGES
    (tmp_path / "same.txt").write_text("\n".join(MESSAGES))
    assert read_messages(tmp_path / "same.txt") == MESSAGES


@pytest.mark.parametrize("line", ["{", "[]", '"x"', '{"txt": "x"}', '{"text": 3}', '{"text": " "}'])
def test_a_line_that_holds_no_text_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "messages.jsonl"
    file.write_text(f'{{"text": "hello"}}\n{line}\n')
    with raises(DataError, f"{file}, line 2: expected"):
        read_messages(file)


def test_features_hold_out_the_last_rows_of_each_class(
    classifier: HandMade, tmp_path: Path
) -> None:
    targets = np.repeat([0, 2], [10, 5])  # sorted by class, as recordings often are
    inputs = np.arange(15 * FEATURES).reshape(15, FEATURES).astype(np.float64)
    np.savez(tmp_path / "own.npz", inputs=inputs, targets=targets)
    found = read_owner_data(str(tmp_path / "own.npz"), classifier.folder, classifier.manifest)
    np.testing.assert_array_equal(found.held_out.inputs[:, 0] / FEATURES, [8, 9, 14])
    np.testing.assert_array_equal(found.held_out.targets, [0, 0, 2])
    assert found.train.inputs.dtype == np.float32
    both = np.concatenate([found.train.inputs, found.held_out.inputs])
    assert len(np.unique(both[:, 0])) == 15, "every row once"


def test_a_client_of_a_data_set_is_for_trials(language: HandMade) -> None:
    found = read_owner_data(
        "chitchat-small", language.folder, language.manifest, client=_first("chitchat-small")
    )
    share = len(found.held_out) / (len(found.held_out) + len(found.train))
    assert share == pytest.approx(0.2, abs=0.01)
    assert found.train.inputs.shape[1] <= 16


def _first(name: str) -> str:
    from fedlora.data.chitchat import read_messages as chitchat

    assert name == "chitchat-small"
    return min(chitchat("chitchat_12x400.jsonl.gz"))


def arrays(**changed: Any) -> dict[str, Any]:
    good = {"inputs": np.zeros((10, FEATURES)), "targets": np.zeros(10, int)}
    return {name: value for name, value in (good | changed).items() if value is not None}


BAD_ARRAYS = {
    "no targets": (arrays(targets=None), "expected arrays 'inputs' and 'targets', found inputs"),
    "class": (arrays(targets=np.full(10, 3)), "targets: expected 0 to 2, or -100 where not"),
    "negative class": (arrays(targets=np.full(10, -1)), "targets: expected 0 to 2, or -100"),
    "fractions": (arrays(targets=np.zeros(10)), "targets: expected whole numbers, found float64"),
    "width": (arrays(inputs=np.zeros((10, 5))), "inputs: expected (n, 6) float32, found (10, 5)"),
    "texts": (arrays(inputs=np.full((10, 6), "x")), "inputs: expected (n, 6) float32"),
    "NaN": (arrays(inputs=np.full((10, 6), np.nan)), "expected finite features"),
    "lengths": (arrays(targets=np.zeros(9, int)), "expected 10 targets"),
    "too few": (arrays(inputs=np.zeros((3, 6)), targets=np.arange(3)), "to hold out, found none"),
    "none": (arrays(inputs=np.zeros((0, 6)), targets=np.zeros(0, int)), "found none"),
    "pickle": ({"inputs": np.array([{}]), "targets": np.zeros(1, int)}, "expected NumPy's arrays"),
}


@pytest.mark.parametrize(("values", "text"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_arrays_that_do_not_fit_are_one_line(
    classifier: HandMade, tmp_path: Path, values: dict[str, Any], text: str
) -> None:
    path = tmp_path / "own.npz"
    np.savez(path, **values)
    with pytest.raises(DataError) as caught:
        read_owner_data(str(path), classifier.folder, classifier.manifest)
    message = str(caught.value)
    assert text in message
    assert message.startswith(str(path))
    assert (message.count(str(path)), message.count("\n")) == (1, 0)


def test_what_is_no_data_is_one_line(
    classifier: HandMade, language: HandMade, tmp_path: Path
) -> None:
    for made, name, data, text in (
        (language, "a.txt", b"caf\xe9", "expected UTF-8 text, found byte 0xe9 at 3"),
        (language, "b.txt", b"\n \n", "expected examples to train on, found none"),
        (language, "c.txt", b"one message", "expected examples to train on, found none"),
        (classifier, "d.txt", b"hello\nthere", "expected a .npz file with inputs"),
        (classifier, "e.npz", b"PK\x03\x04", "expected NumPy's arrays"),
        (classifier, "f.npz", b"", "expected NumPy's arrays"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with raises(DataError, str(path), text):
            read_owner_data(str(path), made.folder, made.manifest)
    with raises(DataError, "messages.txt: expected a file, found none"):
        read_owner_data("messages.txt", language.folder, language.manifest)
    with raises(UnknownNameError, "unknown data set 'messages'", "chitchat"):
        read_owner_data("messages", language.folder, language.manifest)
    with raises(ConfigError, "expected one of its 10 clients, named by --client, such as 1_left"):
        read_owner_data("watch", classifier.folder, classifier.manifest)
    with raises(ConfigError, "for 'classification', found 'next-token'"):
        read_owner_data("watch", language.folder, language.manifest, client="1_left")
    with raises(ConfigError, "expected a share in (0, 1), found 1"):
        read_owner_data("watch", language.folder, language.manifest, held_out_share=1)


def test_features_to_classify(classifier: HandMade, tmp_path: Path) -> None:
    rows = np.arange(12.0).reshape(2, FEATURES)
    np.save(tmp_path / "x.npy", rows)
    np.savez(tmp_path / "x.npz", inputs=rows)
    for name in ("x.npy", "x.npz"):
        found = read_inputs(tmp_path / name, classifier.manifest)
        np.testing.assert_array_equal(found, rows.astype(np.float32))
    np.savez(tmp_path / "y.npz", x=rows)
    with raises(DataError, "expected an array named 'inputs', found x"):
        read_inputs(tmp_path / "y.npz", classifier.manifest)
    with raises(DataError, "nothing.npy"):
        read_inputs(tmp_path / "nothing.npy", classifier.manifest)
