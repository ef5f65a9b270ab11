"""Text that continues a message: tokens one by one, streamed as whole characters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedlora.adapter import Array
from fedlora.data.text import SEPARATORS, separator_id
from fedlora.device.decoding import Decoder
from fedlora.errors import ConfigError, DataError
from fedlora.randomness import rng

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["choose", "end_ids", "generate", "prompt_ids"]

UNFINISHED = "\ufffd"  # how a tokenizer spells bytes that are not yet a character


def generate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Yield pieces of text; see `Session.generate`. Arguments are checked before the first one.

    Raises `ConfigError` and `DataError`.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if type(max_tokens) is not int or max_tokens < 0:
        raise ConfigError(f"max_tokens: expected a whole number >= 0, found {max_tokens!r}")
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature: expected a number >= 0, found {temperature!r}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k: expected a whole number >= 1, found {top_k!r}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p: expected a probability in (0, 1], found {top_p!r}")
    if not all(isinstance(text, str) and text for text in stop):
        raise ConfigError(f"stop: expected texts that are not empty, found {stop!r}")
    ids = prompt_ids(tokenizer, prompt)
    tokens = _tokens(decoder, ids, max_tokens, end_ids(tokenizer), temperature, top_k, top_p, seed)
    return _until(_pieces(tokenizer, ids, tokens), stop)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the separator and the tokens of a message's beginning, as the base was trained."""
    if not isinstance(prompt, str):
        raise DataError(f"expected text, found {type(prompt).__name__}")
    return [separator_id(tokenizer), *tokenizer.encode(prompt, add_special_tokens=False).ids]


def end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end a message."""
    found = (tokenizer.token_to_id(name) for name in SEPARATORS)
    return frozenset(index for index in found if index is not None)


def choose(
    logits: Array,
    uniform: float,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """Return a token for (vocabulary,) logits and a number that is uniform in [0, 1).

    Tokens are sorted by probability, equal ones by number, cut, and drawn by the inverse of the
    cumulative sum. top_p keeps the fewest tokens whose sum reaches it (arXiv:1904.09751, section
    3.1); after top_k, of what that left.
    """
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[:top_k]
    scaled = logits[order].astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):  # a tiny temperature: all but the first are 0
        weights = np.exp((scaled - scaled[0]) / temperature)
    sums = np.cumsum(weights)
    if top_p is not None:
        kept = int(np.searchsorted(sums, top_p * sums[-1])) + 1
        order, sums = order[:kept], sums[:kept]
    # The last one may be reached by rounding alone.
    drawn = int(np.searchsorted(sums, uniform * sums[-1], side="right"))
    return int(order[min(drawn, len(order) - 1)])


def _tokens(
    decoder: Decoder,
    ids: Sequence[int],
    max_tokens: int,
    ends: frozenset[int],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> Iterator[int]:
    if max_tokens == 0:
        return
    random = rng(seed, "generate")
    read = decoder.start(np.array([ids], np.int64))
    for step in range(max_tokens):
        logits: npt.NDArray[np.float32] = read.logits[0]
        if not np.isfinite(logits).all():
            raise DataError(
                "the model's logits are not finite: the adapter or the bundle is not sound"
            )
        token = choose(logits, random.random(), temperature, top_k, top_p)
        if token in ends:
            return
        yield token
        if step + 1 < max_tokens:
            read = decoder.more(read, np.array([[token]], np.int64))


def _pieces(tokenizer: Tokenizer, ids: Sequence[int], tokens: Iterator[int]) -> Iterator[str]:
    """Yield the text of tokens as soon as their characters are whole.

    A token's text depends on what is before it (a leading space, bytes of a character), so a few
    tokens are decoded again each time, and what is new is the difference.
    """
    known = list(ids[-4:])  # enough for the bytes of one character
    shown = tokenizer.decode(known)
    for token in tokens:
        known.append(token)
        text = tokenizer.decode(known)
        if len(text) > len(shown) and not text.endswith(UNFINISHED):
            yield text[len(shown) :]
            known = known[-4:]
            shown = tokenizer.decode(known)
    text = tokenizer.decode(known)
    if len(text) > len(shown):
        yield text[len(shown) :]


def _until(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """Yield text up to the first of the `stop` texts; hold back what may be the start of one."""
    held = ""
    for piece in pieces:
        held += piece
        found = [held.find(text) for text in stop if text in held]
        if found:
            held = held[: min(found)]
            break
        sizes = (n for text in stop for n in range(1, len(text)) if held.endswith(text[:n]))
        size = len(held) - max(sizes, default=0)
        if size:
            yield held[:size]
            held = held[size:]
    if held:
        yield held
