"""Generated text: the same with a cache as without, cut and drawn as its options say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from fedlora.device import Session
from fedlora.device.decoding import Decoder
from fedlora.device.generate import _pieces, _until, choose
from fedlora.errors import ConfigError, DataError, FormatError
from tests.device.hand_made import HandMade, language_logits, write_language_model
from tests.matching import raises


@pytest.fixture(scope="module")
def language(tmp_path_factory: Any) -> HandMade:
    return write_language_model(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def session(language: HandMade) -> Session:
    return Session(language.folder, adapter=language.adapter(4), threads=1)


@pytest.fixture(scope="module")
def uncached(tmp_path_factory: Any) -> Session:
    made = write_language_model(tmp_path_factory.mktemp("uncached"), decode=False)
    return Session(made.folder, adapter=made.adapter(4), threads=1)


def test_greedy_text_is_the_most_probable_token_each_time(
    language: HandMade, session: Session
) -> None:
    tokenizer = session.bundle.tokenizer()
    ids = [0, *tokenizer.encode("the cat sat").ids]
    begin = len(ids)
    adapter = language.adapter(4)
    while len(ids) < begin + 20:
        ids.append(int(language_logits(language.weights, np.array([ids]), adapter)[0, -1].argmax()))
        if ids[-1] == 0:
            ids.pop()
            break
    expected = tokenizer.decode(ids[begin:])
    assert "".join(session.generate("the cat sat", 20)) == expected
    assert len(expected) > 10


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9}, {"temperature": 1.5, "top_k": 9}])
def test_a_cache_changes_nothing(
    session: Session, uncached: Session, options: dict[str, Any]
) -> None:
    assert Decoder(session.bundle, {}).cached
    assert not Decoder(uncached.bundle, {}).cached
    for prompt in ("", "the cat", "see you at the "):
        with_it = list(session.generate(prompt, 25, seed=7, **options))
        assert with_it == list(uncached.generate(prompt, 25, seed=7, **options))
        assert with_it


def test_a_cache_that_is_resumed_changes_nothing(language: HandMade, session: Session) -> None:
    decoder = Decoder(session.bundle, {})
    for text in ("the cat", "the cat sat", "the cat s", "home", "home", "the"):
        ids = np.array([[0, *session.bundle.tokenizer().encode(text).ids]])
        found = decoder.resume(ids)
        np.testing.assert_array_equal(found.ids, ids)
        expected = language_logits(language.weights, ids)[:, -1]
        np.testing.assert_allclose(found.logits, expected, atol=2e-5)  # float32, float64


def test_the_seed_decides(session: Session) -> None:
    def text(seed: int) -> str:
        return "".join(session.generate("the", 30, temperature=1.0, seed=seed))

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(5)}) == 5


def test_an_adapter_that_is_swapped_meanwhile_changes_nothing(
    language: HandMade, session: Session
) -> None:
    whole = list(session.generate("the", 12))
    stream = session.generate("the", 12)
    first = next(stream)
    mine = session.adapter
    session.swap(None)
    rest = list(stream)
    base = list(session.generate("the", 12))
    session.swap(mine)
    assert [first, *rest] == whole != base


def test_it_stops_before_a_text(session: Session) -> None:
    whole = "".join(session.generate("the", 30))
    stop = whole[7:10]
    expected = whole[: whole.index(stop)]
    assert "".join(session.generate("the", 30, stop=[stop, "zzz"])) == expected
    assert "".join(session.generate("the", 0)) == ""


def test_what_may_be_the_start_of_a_stop_is_held_back() -> None:
    assert list(_until(iter(["a<", "b<e", "nd", ">c"]), ["<end>"])) == ["a", "<b"]
    assert list(_until(iter(["a<", "e"]), ["<end>"])) == ["a", "<e"]
    assert list(_until(iter(["xy", "z"]), ["y", "xyz"])) == ["x"]


def test_pieces_are_whole_characters() -> None:
    tiny = Path(__file__).parents[2] / "fedlora/bases/files/tiny-chat/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(tiny))
    for text in ("héllo wörld", "日本 🎉🎉 ok", "a  b", "naïve café ☕"):
        ids = tokenizer.encode(text).ids
        pieces = list(_pieces(tokenizer, [0], iter(ids)))
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)
        assert len(pieces) > 1
    broken = tokenizer.encode("🎉").ids[:-1]  # the model's own bytes may be no character
    assert "".join(_pieces(tokenizer, [0], iter(broken))) == tokenizer.decode(broken)


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    uniform = (np.arange(1000) + 0.5) / 1000

    def shares(temperature: float, **cut: Any) -> list[float]:
        drawn = [choose(logits, u, temperature, **cut) for u in uniform]
        return [drawn.count(token) / 1000 for token in range(4)]

    assert shares(0) == [0, 1, 0, 0]
    assert shares(1e-30) == [0, 1, 0, 0]
    # One of a thousand equal steps may fall on the other side of a border by rounding.
    assert shares(1) == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=1.1e-3)
    squares = np.array([0.01, 0.16, 0.04, 0.09]) / 0.3
    assert shares(0.5) == pytest.approx(squares.tolist(), abs=1.1e-3)
    assert shares(1, top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=1.1e-3)
    assert shares(1, top_p=0.65) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=1.1e-3)
    assert shares(1, top_p=0.75) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], abs=1.1e-3)
    assert shares(1, top_k=3, top_p=0.4) == [0, 1, 0, 0]  # 0.4 of 0.9 is less than the first
    assert shares(1, top_k=99, top_p=1.0) == shares(1)


def test_equal_logits_are_taken_in_order() -> None:
    assert choose(np.zeros(5, np.float32), 0.0, 0) == 0
    assert choose(np.zeros(5, np.float32), 0.99, 1.0, top_k=2) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_tokens": -1}, "max_tokens: expected a whole number >= 0, found -1"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(
    session: Session, options: dict[str, Any], text: str
) -> None:
    with raises(ConfigError, text):
        session.generate("the", **options)


def test_a_prompt_that_is_no_text(session: Session) -> None:
    with raises(DataError, "expected text, found list"):
        session.generate(["the"])  # type: ignore[arg-type]


def test_a_model_that_breaks_says_so(tmp_path: Path) -> None:
    made = write_language_model(tmp_path)
    session = Session(tmp_path, threads=1)
    huge = made.adapter()
    huge = huge.map(lambda layer: type(layer)(layer.A * 1e18, layer.B * 1e18, 1.0))
    session.swap(huge)  # each factor is finite, their product is not
    with raises(DataError, "logits are not finite"):
        list(session.generate("the", 5))
    with raises(DataError, "logits are not finite"):
        session.suggest("the ")


def test_a_cache_of_another_form_is_named(tmp_path: Path) -> None:
    import onnx

    from tests.device.hand_made import rewrite_manifest

    made = write_language_model(tmp_path)
    model = onnx.load(tmp_path / "decode.onnx", load_external_data=False)
    for value in model.graph.input:
        if value.name == "past_key_values.0.key":
            value.type.tensor_type.shape.dim[1].dim_param = "heads"
    (tmp_path / "decode.onnx").write_bytes(model.SerializeToString())
    rewrite_manifest(tmp_path, made.manifest)
    with raises(FormatError, "past_key_values.0.key", "fixed heads and size"):
        list(Session(tmp_path, threads=1).generate("the", 5))
