"""Messages as token ids, for learning the next token or a class. NumPy, and tokenizers when used.

A message stands alone: a separator token, its tokens, the separator again. To be classified it is
framed as encoders know it, where the tokenizer has their tokens: [CLS], its tokens, [SEP].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedlora.data.examples import IGNORED, Examples
from fedlora.errors import ConfigError, DataError, FormatError, MissingExtraError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "TokenizerLike",
    "encode_classes",
    "encode_messages",
    "load_tokenizer",
    "separator_id",
]

TokenizerLike: TypeAlias = Any  # a path, a tokenizers.Tokenizer, or a fast one of transformers
SEPARATORS = (
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<s>", "<bos>", "[SEP]"
)  # fmt: skip
WORD_PREFIXES = ("Ġ", "▁")  # how byte-level BPE and SentencePiece write a leading space


def load_tokenizer(source: TokenizerLike) -> Tokenizer:
    """Return a tokenizer from a tokenizer.json, its folder, or a tokenizer object.

    One that pads or cuts (a file may say so, as that of all-MiniLM-L6-v2 does) is copied without
    that: here lengths are data. Raises `MissingExtraError` without the package tokenizers,
    `FormatError` for a damaged file, and `ConfigError`.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtraError("reading text", "text") from error
    if source is None:
        raise ConfigError(
            "tokenizer: this data is text and expected one, found None; pass the base's tokenizer"
        )
    if isinstance(source, str | Path):
        path = Path(source)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ConfigError(f"tokenizer: expected the file {path}, found none")
        try:
            return _plain(Tokenizer.from_file(str(path)))
        except Exception as error:  # its errors have no class of their own
            text = " ".join(str(error).split())[:120]
            raise FormatError(f"{path}: expected a tokenizer, found {text}") from None
    tokenizer = getattr(source, "backend_tokenizer", source)
    if not isinstance(tokenizer, Tokenizer):
        raise ConfigError(
            "tokenizer: expected a tokenizer.json, its folder or a tokenizers.Tokenizer, "
            f"found {type(source).__name__}"
        )
    return _plain(tokenizer)


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    if tokenizer.padding is None and tokenizer.truncation is None:
        return tokenizer
    copied = type(tokenizer).from_str(tokenizer.to_str())
    copied.no_padding()
    copied.no_truncation()
    return copied


def separator_id(tokenizer: Tokenizer) -> int:
    """Return the id of the token between messages: <|endoftext|>, or how the text begins or ends.

    Raises `ConfigError` when the tokenizer has none.
    """
    for name in SEPARATORS:
        found = tokenizer.token_to_id(name)
        if found is not None:
            return int(found)
    raise ConfigError(f"tokenizer: expected one of the tokens {', '.join(SEPARATORS)}, found none")


def encode_messages(
    messages: Sequence[str], tokenizer: Tokenizer, max_length: int = 64
) -> Examples:
    """Encode messages for next-token prediction, one row each, right-padded with 0.

    tokens = [separator] + message + [separator]; inputs = tokens[:-1], targets = tokens[1:], both
    cut to `max_length`. `word_starts` marks the targets that begin a word: the first one and those
    with a leading space, never the separator. `characters` counts what the targets spell, the end
    of the message as one character: it is predicted like the others, and it is one key.
    """
    separator, starts = separator_id(tokenizer), _word_starts(tokenizer)
    ids = _encode(tokenizer, messages)
    lengths = np.array([min(len(row) + 1, max_length) for row in ids], np.int64)
    width = int(lengths.max(initial=1))
    inputs = np.zeros((len(ids), width), np.int64)
    targets = np.full((len(ids), width), IGNORED, np.int64)
    characters = np.array([len(message) + 1 for message in messages], np.int64)
    for index, (row, length) in enumerate(zip(ids, lengths, strict=True)):
        inputs[index, :length] = [separator, *row[: length - 1]]
        targets[index, :length] = [*row, separator][:length]
        if len(row) >= length:  # cut: the end is not among the targets
            offsets = tokenizer.encode(messages[index], add_special_tokens=False).offsets
            characters[index] = offsets[length - 1][1]
    counted = (targets >= 0) & (targets != separator)
    word_starts = starts[np.where(counted, targets, 0)] & counted
    word_starts[:, 0] = True
    word_starts &= targets != separator
    return Examples(inputs, targets, word_starts, characters)


def encode_classes(
    messages: Sequence[str], classes: Sequence[int], tokenizer: Tokenizer, max_length: int = 64
) -> Examples:
    """Encode messages to be classified, cut to `max_length`.

    inputs = [separator] + message; for an encoder's tokenizer [CLS] + message + [SEP].
    """
    before, after = _frame(tokenizer)
    room = max(max_length - len(before) - len(after), 0)
    encoded = _encode(tokenizer, messages)
    rows = [[*before, *ids[:room], *after][:max_length] for ids in encoded]
    inputs = np.zeros((len(rows), max((len(row) for row in rows), default=1)), np.int64)
    for index, row in enumerate(rows):
        inputs[index, : len(row)] = row
    return Examples(inputs, np.array(classes, np.int64))


def _frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return what stands before and behind a message that is classified."""
    begin, end = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    if begin is None or end is None:
        return [separator_id(tokenizer)], []
    return [begin], [end]


def _encode(tokenizer: Tokenizer, messages: Sequence[str]) -> list[list[int]]:
    for index, message in enumerate(messages):
        if not isinstance(message, str) or not message.strip():
            raise DataError(
                f"message {index}: expected text, found {message!r}; leave empty messages out"
            )
    # "fast" leaves out the offsets, which are a third of the time.
    encoded = tokenizer.encode_batch_fast(list(messages), add_special_tokens=False)
    return [encoding.ids for encoding in encoded]


def _word_starts(tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    """(vocabulary,) whether a token begins with a space, for every id."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    starts = np.zeros(max(vocabulary.values()) + 1, bool)
    starts[[i for token, i in vocabulary.items() if token.startswith(WORD_PREFIXES)]] = True
    return starts
