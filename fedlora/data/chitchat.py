"""BYU ChitChat: real people's chat messages, one client a person, in the order they were typed.

From chitchat-dataset 0.9.0 (MIT; `files/LICENSE.chitchat`). The file has the 117 people with the
most messages that are not keyboard mashing, 302 to 1,000 each. None of their messages was seen by
the bundled base tiny-chat.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fedlora.data.client import ClientData
from fedlora.data.text import encode_classes, encode_messages

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "AUTHORS",
    "ENDINGS",
    "authors",
    "ending",
    "read_author_client",
    "read_ending_client",
    "read_messages",
    "read_text_client",
    "split",
]

ENDINGS = (".", "!", "?", "…", "none")
AUTHORS = 20


@cache
def read_messages(file: str) -> dict[str, tuple[str, ...]]:
    """Return every user's messages in `file` of this package's data, oldest first."""
    with gzip.open(files("fedlora.data") / "files" / file, "rt", encoding="utf-8") as lines:  # type: ignore[call-overload]
        records = [json.loads(line) for line in lines]
    return {r["user"]: tuple(text for _, text in r["messages"]) for r in records}


def split(messages: Any, test_share: float, validation_share: float) -> tuple[Any, Any, Any]:
    """Cut a sequence by time: train, then validation, then test = messages[int(0.8 * n):].

    >>> split("abcdefghij", 0.2, 0.1)
    ('abcdefg', 'h', 'ij')
    """
    middle = int(round((1 - test_share - validation_share) * len(messages), 6))
    stop = int(round((1 - test_share) * len(messages), 6))
    return messages[:middle], messages[middle:stop], messages[stop:]


def read_text_client(
    client_id: str,
    messages: Sequence[str],
    tokenizer: Tokenizer,
    *,
    test_share: float,
    validation_share: float,
    max_length: int,
) -> ClientData:
    """Encode one person's messages for next-token prediction, cut by time."""
    parts = split(messages, test_share, validation_share)
    train, validation, test = (encode_messages(part, tokenizer, max_length) for part in parts)
    return ClientData(client_id, train, validation, test)


def read_ending_client(
    client_id: str,
    messages: Sequence[str],
    tokenizer: Tokenizer,
    *,
    test_share: float,
    validation_share: float,
    max_length: int,
) -> ClientData:
    """Encode one person's messages without their endings, to be classified by them.

    Messages that consist of an ending alone are left out.
    """
    parts = []
    for part in split(messages, test_share, validation_share):
        pairs = [(text, label) for text, label in map(ending, part) if text]
        parts.append(
            encode_classes([t for t, _ in pairs], [c for _, c in pairs], tokenizer, max_length)
        )
    return ClientData(client_id, *parts)


def authors(messages: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return the `AUTHORS` users with the most messages, sorted; of equals the first names."""
    ranked = sorted(messages, key=lambda user: (-len(messages[user]), user))
    return tuple(sorted(ranked[:AUTHORS]))


def read_author_client(
    client_id: str,
    messages: Sequence[str],
    tokenizer: Tokenizer,
    label: int,
    *,
    test_share: float,
    validation_share: float,
    max_length: int,
) -> ClientData:
    """Encode one author's messages, cut by time; the class of each is the author's place."""
    parts = split(messages, test_share, validation_share)
    return ClientData(
        client_id,
        *(encode_classes(part, [label] * len(part), tokenizer, max_length) for part in parts),
    )


def ending(message: str) -> tuple[str, int]:
    """Return a message without its ending and the ending's place in `ENDINGS`.

    The last character decides; "..." counts as "…". All marks and spaces at the end are removed.

    >>> ending("Really?! "), ending("well..."), ending("ok :)")
    (('Really', 1), ('well', 3), ('ok :)', 4))
    """
    text = message.rstrip()
    mark = "…" if text.endswith("...") else text[-1:]
    label = ENDINGS.index(mark) if mark in ENDINGS[:4] else ENDINGS.index("none")
    return (text.rstrip(".!?… \t\n") if mark in ENDINGS[:4] else text), label
