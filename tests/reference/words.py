"""P(next word) by trying all of them: the slow twin of the keyboard's beam."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Logits = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]  # (rows, time) → (rows, time, V)


def word_probabilities(
    logits_of: Logits, before: Sequence[int], spelling: Sequence[str], need: str, pieces: int
) -> dict[str, float]:
    """Return P(word, and then its end | tokens before) of all words of at most `pieces` tokens.

    spelling: of each token, with its leading space; "" for the token that ends a message. need:
    what a word must begin with, with the space before it if there is one. A word is letters alone.
    """
    tokens = [i for i, text in enumerate(spelling) if text.strip().isalpha() or text == " "]
    ends = [i for i, text in enumerate(spelling) if not text or not text[0].isalpha()]
    found: dict[str, float] = {}
    for number in range(1, pieces + 1):
        rows = [
            row
            for row in itertools.product(tokens, repeat=number)
            if _is_a_word("".join(spelling[i] for i in row), need)
        ]
        for start in range(0, len(rows), 4096):
            part = np.array(rows[start : start + 4096])
            ids = np.concatenate([np.tile(before, (len(part), 1)), part], axis=1)
            logits = logits_of(ids)[:, len(before) - 1 :].astype(np.float64)
            p = np.exp(logits - logits.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            chosen = np.take_along_axis(p[:, :-1], part[..., None], -1)[..., 0].prod(1)
            for row, probability in zip(part, chosen * p[:, -1, ends].sum(-1), strict=True):
                word = "".join(spelling[i] for i in row).strip()
                found[word] = found.get(word, 0.0) + float(probability)
    return found


def _is_a_word(text: str, need: str) -> bool:
    letters = text.removeprefix(" ") if need.startswith(" ") else text
    return text.startswith(need) and letters.isalpha()
