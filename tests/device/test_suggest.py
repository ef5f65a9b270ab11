"""Suggested words against every word that there is, and what counts as a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from fedlora.device import Session
from fedlora.device.decoding import Decoder
from fedlora.device.suggest import Words, is_word, split_text, suggest
from fedlora.errors import ConfigError, DataError
from tests.device.hand_made import HandMade, language_logits, write_language_model
from tests.matching import raises
from tests.reference.words import word_probabilities


@pytest.fixture(scope="module")
def language(tmp_path_factory: Any) -> HandMade:
    return write_language_model(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="module")
def session(language: HandMade) -> Session:
    return Session(language.folder, adapter=language.adapter(2), threads=1)


def tiny_chat() -> Tokenizer:
    folder = Path(__file__).parents[2] / "fedlora/bases/files/tiny-chat"
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("text", "before", "need"),
    [
        ("the ", "the", " "),
        ("the cat sat on  ", "the cat sat on", " "),
        ("the c", "the", " c"),
        ("the hom", "the", " hom"),
        ("the cat.", "the cat.", " "),
        ("a.h", "a.", "h"),
        ("", "", ""),
        ("th", "", "th"),
    ],
)
def test_the_beam_finds_what_trying_all_words_finds(
    language: HandMade, session: Session, text: str, before: str, need: str
) -> None:
    tokenizer = session.bundle.tokenizer()
    assert split_text(text) == (before, need.encode())
    spelling = [
        tokenizer.id_to_token(i).replace("Ġ", " ") if i else ""
        for i in range(tokenizer.get_vocab_size())
    ]
    adapter = language.adapter(2)
    context = [0, *tokenizer.encode(before).ids]
    pieces = max(2, len(need.strip()))
    every = word_probabilities(
        lambda ids: language_logits(language.weights, ids, adapter),
        context, spelling, need, pieces,
    )  # fmt: skip
    words = Words.of(tokenizer, language.manifest.outputs)
    decoder = Decoder(session.bundle, session._active.feeds)

    def beam(k: int, width: int | None) -> dict[str, float]:
        found = suggest(decoder, tokenizer, words, text, k, width=width, pieces=pieces)
        return {suggestion.word: suggestion.probability for suggestion in found}

    # So wide, and so many words wanted, that nothing is given up: the same words, all of them.
    found = beam(len(every), 100_000)
    assert found.keys() == every.keys()
    for word, probability in found.items():
        # float32 against float64: a logit is off by 2e-6 or so, and so is its power.
        assert probability == pytest.approx(every[word], rel=3e-5)
    best = sorted(every, key=lambda word: -every[word])[:3]
    narrow = beam(3, None)
    assert list(narrow) == best
    for word in best:
        # What is left out are other pieces of the same word.
        assert 0.9 * every[word] <= narrow[word] <= 1.00003 * every[word]


def test_it_is_the_same_word_by_word_as_at_once(language: HandMade) -> None:
    typing, texts = Session(language.folder, threads=1), ["t", "th", "the", "the ", "the c", "th"]
    for text in texts:
        fresh = Session(language.folder, threads=1).suggest(text)
        found = typing.suggest(text)
        assert [one.word for one in found] == [one.word for one in fresh]
        np.testing.assert_allclose(
            [one.probability for one in found], [one.probability for one in fresh], rtol=1e-4
        )  # the cache is read in parts: other sums in float32, multiplied over the pieces


def test_words_follow_the_adapter(language: HandMade) -> None:
    session = Session(language.folder, threads=1)
    base = session.suggest("the ")
    session.add("mine", language.adapter(2))
    assert session.suggest("the ", adapter="mine") != base
    assert session.suggest("the ") == base


def test_without_a_cache_it_is_the_same(language: HandMade, tmp_path: Path) -> None:
    write_language_model(tmp_path, decode=False)
    uncached, cached = Session(tmp_path, threads=1), Session(language.folder, threads=1)
    for text in ("the ", "the c", ""):
        slow, fast = uncached.suggest(text), cached.suggest(text)
        assert [one.word for one in slow] == [one.word for one in fast]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see you at ", ("see you at", b" ")),
        ("see you at\n", ("see you at", b" ")),
        ("see you at th", ("see you at", b" th")),
        ("ok, i don't", ("ok, i", b" don't")),
        ("ok, i don'", ("ok, i", b" don'")),
        ("''", ("''", b" ")),
        ("(he", ("(", b"he")),
        ("wow!", ("wow!", b" ")),
        ("caf\u00e9", ("", "caf\u00e9".encode())),
        ("cafe\u0301 ", ("cafe\u0301", b" ")),
        ("  ", ("", b"")),
        ("", ("", b"")),
        ("Th", ("", b"Th")),
    ],
)
def test_where_the_wanted_word_begins(text: str, expected: tuple[str, bytes]) -> None:
    assert split_text(text) == expected


def test_the_first_word_of_a_sentencepiece_message_has_its_space() -> None:
    assert split_text("th", b" ") == ("", b" th")
    assert split_text("", b" ") == ("", b" ")


def test_what_a_word_is() -> None:
    assert all(map(is_word, ["a", "don't", "l’an", "2nd", "café", "cafe\u0301", "日本"]))
    assert not any(map(is_word, ["", "'t", "a-b", "a b", "don'", "😀", "a.", " a", "_"]))


def test_tokens_of_a_real_vocabulary() -> None:
    tokenizer = tiny_chat()
    words = Words.of(tokenizer, 2048)
    one = tokenizer.get_vocab()
    for text in ("Ġthe", "Ġ"):
        assert words.begins[one[text]]
        assert words.ends[one[text]]
        assert not words.continues[one[text]]
    for text in ("ing", "'s", "a"):
        assert words.continues[one[text]]
        assert not words.ends[one[text]]
    for text in (".", "!", ",", "'", "<|endoftext|>"):
        assert words.ends[one[text]]
        assert not words.continues[one[text]]
    assert words.first == b""
    for text in ("héllo", "日本 🎉"):  # bytes as the tokenizer itself puts them together
        ids = tokenizer.encode(text).ids
        assert b"".join(words.spelling[i] for i in ids).decode() == text
    th = words.allowed(b"", b" th")
    assert {tokenizer.id_to_token(i) for i in th} >= {"Ġ", "Ġt", "Ġthe", "Ġth"}
    assert all(words.spelling[i] in b" th" or words.spelling[i].startswith(b" th") for i in th)


def test_wrong_arguments(session: Session) -> None:
    with raises(ConfigError, "k: expected a whole number >= 1, found 0"):
        session.suggest("the ", 0)
    with raises(DataError, "expected text, found NoneType"):
        session.suggest(None)  # type: ignore[arg-type]
