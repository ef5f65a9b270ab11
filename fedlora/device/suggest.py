"""Whole words for a keyboard: a beam over the pieces that a tokenizer makes words of.

A word's probability, given the text before it, is that of its pieces, times that of anything after
them that ends it: a space, a mark, the end of the message. Ways of writing the same word in
different pieces are added up. The text is read once; every step of the beam is one batch that
starts from its cache. A word that is being typed is taken back to its beginning and its letters are
demanded of the pieces, since "th" is not the first piece of " the".

The beam gives up a beginning once the k-th best whole word is more probable than it, since no word
is more probable than its beginning. What it can miss is little: beginnings that were not among the
`width` best, and rare ways of writing a word that was found in another.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedlora.data.text import SEPARATORS
from fedlora.device.decoding import Decoder
from fedlora.device.generate import prompt_ids
from fedlora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Suggestion", "Words", "is_word", "split_text", "suggest"]

MAX_PIECES = 12  # of one word
APOSTROPHES = "'’"
Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A word, and its probability given the text before it."""

    word: str
    probability: float


@dataclass(frozen=True)
class Words:
    """What each token of a vocabulary can be in a word. Masks are (vocabulary,)."""

    spelling: Sequence[bytes]  # by id; b"" for what spells nothing
    begins: Mask  # a space and the beginning of a word, or the space alone
    continues: Mask  # part of a word, or bytes of a character
    ends: Mask  # what comes after a word: a space, a mark, the end of the message
    first: bytes  # what a message's first word begins with: a space, for some tokenizers
    in_order: Sequence[bytes]  # the spellings, sorted, and their ids
    ids_in_order: Ids

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocabulary: int) -> Words:
        """Look at a tokenizer's tokens; `vocabulary` is the number of the model's logits."""
        tokens = tokenizer.get_vocab(with_added_tokens=True)
        byte_level = any(token.startswith("Ġ") for token in tokens)
        spelling = [b""] * vocabulary
        begins, continues, ends = (np.zeros(vocabulary, bool) for _ in range(3))
        special = {
            index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        special |= {tokens[name] for name in SEPARATORS if name in tokens}
        for token, index in tokens.items():
            if index >= vocabulary:
                continue
            if index in special:
                ends[index] = True
                continue
            spelt = _spelling(token, byte_level)
            spelling[index] = spelt
            begins[index] = spelt[:1] == b" " and _may_be_part(spelt[1:])
            continues[index] = bool(spelt) and _may_be_part(spelt)
            ends[index] = bool(spelt) and not continues[index] and _ends_a_word(spelt)
        order = sorted(range(vocabulary), key=spelling.__getitem__)
        encoded = tokenizer.encode("a", add_special_tokens=False).ids
        first = b" " if encoded and spelling[encoded[0]][:1] == b" " else b""
        in_order = [spelling[index] for index in order]
        return cls(spelling, begins, continues, ends, first, in_order, np.array(order, np.int64))

    def allowed(self, spelt: bytes, need: bytes) -> Ids:
        """Return the tokens that may follow `spelt` in a word that begins with `need`."""
        mask = self.begins if not spelt and need[:1] == b" " else self.continues
        rest = need[len(spelt) :]
        if not rest:
            return np.flatnonzero(mask)
        # Tokens that are a part of the rest stand in what was typed; the others go beyond it.
        parts = [self._range(rest[:n], rest[:n] + b"\0") for n in range(1, len(rest) + 1)]
        beyond = self._range(rest + b"\0", rest[:-1] + bytes([rest[-1] + 1]))
        return np.concatenate([*parts, beyond[mask[beyond]]])

    def _range(self, low: bytes, high: bytes) -> Ids:
        return self.ids_in_order[bisect_left(self.in_order, low) : bisect_left(self.in_order, high)]


def suggest(
    decoder: Decoder,
    tokenizer: Tokenizer,
    words: Words,
    text: str,
    k: int = 3,
    *,
    width: int | None = None,
    pieces: int = MAX_PIECES,
) -> list[Suggestion]:
    """Return at most k words, the most probable first; see `Session.suggest`.

    width: of the beam, 8 or 2 k unless given. pieces: the most of one word. Raises `ConfigError`
    and `DataError`.
    """
    if type(k) is not int or k < 1:
        raise ConfigError(f"k: expected a whole number >= 1, found {k!r}")
    width = max(8, 2 * k) if width is None else width
    if not isinstance(text, str):
        raise DataError(f"expected text, found {type(text).__name__}")
    before, need = split_text(text, words.first)
    read = decoder.resume(np.array([prompt_ids(tokenizer, before)], np.int64))
    found: dict[str, float] = {}
    spelt, p = [b""], np.ones(1)
    for piece in range(pieces + 1):
        following = _softmax(read.logits)
        scores, rows, tokens = [], [], []
        for row, done in enumerate(spelt):
            word = _whole_word(done, need)
            if word is not None:
                ended = float(following[row, words.ends].sum())
                found[word] = found.get(word, 0.0) + p[row] * ended
            ids = words.allowed(done, need)
            scores.append(p[row] * following[row, ids])
            rows.append(np.full(len(ids), row, np.intp))
            tokens.append(ids)
        if piece == pieces:
            break
        least = sorted(found.values(), reverse=True)[k - 1] if len(found) >= k else 0.0
        score = np.concatenate(scores)
        best = np.argsort(-score, kind="stable")[:width]
        best = best[score[best] > least]
        if not len(best):
            break
        of, token = np.concatenate(rows)[best], np.concatenate(tokens)[best]
        p = score[best]
        spelt = [spelt[row] + words.spelling[id] for row, id in zip(of, token, strict=True)]
        read = decoder.more(read.rows(of), token[:, None])
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return [Suggestion(word, float(probability)) for word, probability in ranked[:k]]


def split_text(text: str, first: bytes = b"") -> tuple[str, bytes]:
    """Return the text before the word that is wanted, and the bytes that it begins with.

    first: what a message's first word begins with.

    >>> split_text("see you at the ")
    ('see you at the', b' ')
    >>> split_text("see you at th")
    ('see you at', b' th')
    """
    start = len(text)
    while start and _is_letter(text[start - 1]):
        start -= 1
    # An apostrophe between letters belongs to the word.
    while start > 1 and text[start - 1] in APOSTROPHES and _is_letter(text[start - 2]):
        start -= 1
        while start and _is_letter(text[start - 1]):
            start -= 1
    before, typed = text[:start], text[start:].encode()
    if not before.strip():
        return "", first + typed
    if before[-1].isspace() or not typed:
        return before.rstrip(), b" " + typed
    return before, typed


def is_word(text: str) -> bool:
    """Whether a text is letters and digits, with apostrophes between them."""
    return bool(text) and _is_letter(text[0]) and _may_be_part(text.encode())


def _whole_word(spelt: bytes, need: bytes) -> str | None:
    if len(spelt) < len(need):
        return None
    try:
        word = spelt.removeprefix(b" ").decode()
    except UnicodeDecodeError:  # part of a character
        return None
    return word if is_word(word) else None


def _may_be_part(spelt: bytes) -> bool:
    """Whether bytes can stand in a word: letters, apostrophes before letters, broken characters."""
    try:
        text = spelt.decode()
    except UnicodeDecodeError:
        return True  # seen when the word is whole
    return all(
        _is_letter(letter) or (letter in APOSTROPHES and _is_letter(text[i + 1 : i + 2]))
        for i, letter in enumerate(text)
    )


def _ends_a_word(spelt: bytes) -> bool:
    return not _is_letter(spelt.decode()[0])


def _is_letter(letter: str) -> bool:
    """Whether a character is a letter, a digit, or a sign that goes with one (an accent)."""
    return letter.isalnum() or (bool(letter) and unicodedata.category(letter)[0] == "M")


def _spelling(token: str, byte_level: bool) -> bytes:
    """Return the bytes that a token stands for."""
    if byte_level:
        if all(letter in _BYTES for letter in token):
            return bytes(_BYTES[letter] for letter in token)
        return token.encode()  # a token that was added as it is
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace("▁", " ").encode()


def _byte_table() -> dict[str, int]:
    """Return how byte-level BPE writes each byte: itself if it prints in Latin-1, else moved up.

    The others follow from U+0100 on, in order; so the space, 0x20, is Ġ, U+0120.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printed}
    others = (byte for byte in range(256) if byte not in printed)
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_table()


def _softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return probabilities along the last axis; raises `DataError` if they are none."""
    if not np.isfinite(logits).all():
        raise DataError("the model's logits are not finite: the adapter or the bundle is not sound")
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    probabilities: npt.NDArray[np.float64] = powers / powers.sum(-1, keepdims=True)
    return probabilities
