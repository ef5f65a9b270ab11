"""Messages become rows of tokens, each alone, with word starts and characters counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from fedlora.bases import tokenizer_file
from fedlora.data import IGNORED
from fedlora.data.chitchat import ENDINGS, ending, split
from fedlora.data.text import encode_classes, encode_messages, load_tokenizer, separator_id
from fedlora.errors import ConfigError, DataError, FormatError


def test_a_message_stands_between_two_separators(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("see you there", add_special_tokens=False).ids
    examples = encode_messages(["see you there"], tokenizer)
    assert examples.inputs[0].tolist() == [0, *ids]
    assert examples.targets[0].tolist() == [*ids, 0]
    assert examples.characters is not None
    assert examples.characters.tolist() == [14]  # 13 and the end


def test_word_starts_are_the_first_token_and_those_with_a_space(tokenizer: Tokenizer) -> None:
    examples = encode_messages(["unbelievable see  you"], tokenizer)
    tokens = [tokenizer.id_to_token(int(i)) or "" for i in examples.targets[0]]
    assert examples.word_starts is not None
    starts = [t for t, s in zip(tokens, examples.word_starts[0], strict=True) if s]
    assert starts == [tokens[0], *[t for t in tokens[1:] if t.startswith("Ġ")]]
    assert not examples.word_starts[0, -1]  # the separator begins no word


def test_a_cut_message_counts_only_the_characters_of_its_targets(tokenizer: Tokenizer) -> None:
    message = "hello hello hello hello"
    offsets = tokenizer.encode(message, add_special_tokens=False).offsets
    examples = encode_messages([message, "hi"], tokenizer, max_length=2)
    assert examples.inputs.shape == (2, 2)
    assert examples.targets[0].tolist() == tokenizer.encode(message).ids[:2]
    assert examples.characters is not None
    assert examples.characters.tolist() == [offsets[1][1], 3]  # two and the end


@settings(max_examples=40, deadline=None)
@given(
    messages=st.lists(st.text(min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=6),
    max_length=st.integers(1, 12),
)
def test_rows_agree_with_the_slow_twin(
    tokenizer: Tokenizer, messages: list[str], max_length: int
) -> None:
    examples = encode_messages(messages, tokenizer, max_length)
    for row, message in enumerate(messages):
        encoding = tokenizer.encode(message, add_special_tokens=False)
        tokens = [0, *encoding.ids, 0]
        want = tokens[1:][:max_length]
        counted = examples.targets[row] != IGNORED
        assert examples.targets[row][counted].tolist() == want
        assert examples.inputs[row][: len(want)].tolist() == tokens[:-1][:max_length]
        starts = [i == 0 or t.startswith("Ġ") for i, t in enumerate(encoding.tokens)]
        assert examples.word_starts is not None
        assert examples.word_starts[row][: len(want)].tolist() == [*starts, False][: len(want)]


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_message_is_refused_and_named(tokenizer: Tokenizer, empty: str) -> None:
    with pytest.raises(DataError, match=r"message 1: expected text, found .*; leave empty"):
        encode_messages(["hi", empty], tokenizer)


def test_text_to_classify_begins_with_the_separator_and_has_no_end(tokenizer: Tokenizer) -> None:
    examples = encode_classes(["hi there", "hi"], [1, 4], tokenizer)
    ids = tokenizer.encode("hi there", add_special_tokens=False).ids
    assert examples.inputs[0].tolist() == [0, *ids]
    assert examples.targets.tolist() == [1, 4]
    assert examples.word_starts is None


def encoders_tokenizer() -> Tokenizer:
    """As a sentence encoder's file has it: its own frame, padding and cutting."""
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "hi": 4, "there": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=6)
    tokenizer.enable_truncation(4)
    return tokenizer


def test_an_encoder_gets_its_frame_and_no_padding_of_the_tokenizers() -> None:
    theirs = encoders_tokenizer()
    tokenizer = load_tokenizer(theirs)
    examples = encode_classes(["hi there", "hi " * 9, "hi"], [1, 0, 1], tokenizer, max_length=8)
    assert examples.inputs.tolist() == [
        [2, 4, 5, 3, 0, 0, 0, 0],
        [2, 4, 4, 4, 4, 4, 4, 3],
        [2, 4, 3, 0, 0, 0, 0, 0],
    ]
    assert encode_messages(["hi"], tokenizer).targets.tolist() == [[4, 3]]
    assert len(theirs.encode("hi").ids) == 6  # the caller's own object is as it was


@pytest.mark.parametrize(("max_length", "row"), [(1, [2]), (2, [2, 3]), (3, [2, 4, 3])])
def test_a_frame_is_cut_like_everything_else(max_length: int, row: list[int]) -> None:
    tokenizer = load_tokenizer(encoders_tokenizer())
    assert encode_classes(["hi there"], [0], tokenizer, max_length).inputs.tolist() == [row]


ENDED = [
    ("Really?! ", "Really", "!"),
    ("well...", "well", "…"),
    ("well…", "well", "…"),
    ("ok :)", "ok :)", "none"),
    ("Yes.", "Yes", "."),
    ("what ?", "what", "?"),
    ("...", "", "…"),
]


@pytest.mark.parametrize(("message", "text", "label"), ENDED)
def test_the_last_character_decides_how_a_message_ends(message: str, text: str, label: str) -> None:
    assert ending(message) == (text, ENDINGS.index(label))


@given(st.integers(0, 1200))
def test_the_last_fifth_in_time_is_the_test_part(count: int) -> None:
    train, validation, test = split(np.arange(count), 0.2, 0.0)
    assert test.tolist() == list(range(count))[int(0.8 * count) :]
    assert len(validation) == 0
    assert len(train) + len(test) == count


def test_a_tokenizer_is_read_from_a_file_a_folder_or_an_object(tokenizer: Tokenizer) -> None:
    path = tokenizer_file("tiny-chat")
    assert path is not None
    for source in (path, str(path), path.parent, tokenizer):
        assert load_tokenizer(source).encode("hi there").ids == tokenizer.encode("hi there").ids


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer: this data is text and expected one"):
        load_tokenizer(None)
    with pytest.raises(ConfigError, match=r"expected the file .*tokenizer\.json, found none"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizers\.Tokenizer, found int"):
        load_tokenizer(3)
    (tmp_path / "tokenizer.json").write_text('{"x":')
    with pytest.raises(FormatError, match=r"tokenizer\.json: expected a tokenizer, found"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"expected one of the tokens <\|endoftext\|>"):
        separator_id(Tokenizer(models.BPE()))
