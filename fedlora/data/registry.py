"""The data sets that fedlora knows by name, and those that a user's function returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fedlora.data import chitchat, watch
from fedlora.data.client import ClientData, FederatedData
from fedlora.data.examples import Examples
from fedlora.data.partition import repartitioned
from fedlora.data.text import TokenizerLike, load_tokenizer
from fedlora.errors import ConfigError, DataError, unknown_name
from fedlora.imports import import_function, is_function
from fedlora.randomness import rng

__all__ = ["DataInfo", "list_data", "load_data"]


@dataclass(frozen=True, slots=True)
class DataInfo:
    """What `fedlora data list` shows of one data set."""

    id: str
    task: str
    clients: int
    examples: int  # messages, or windows
    licence: str
    description: str
    groups: tuple[str, ...] = ("clients",)
    labels: tuple[str, ...] | None = None


DATA = {
    info.id: info
    for info in (
        DataInfo("chitchat", "next-token", 117, 79262, "MIT", "Chat messages of 117 people"),
        DataInfo(
            "chitchat-authors",
            "classification",
            chitchat.AUTHORS,
            20000,
            "MIT",
            "Which of 20 people wrote this chat message? Each has one class: deal them out anew",
            labels=tuple(f"author {number}" for number in range(chitchat.AUTHORS)),
        ),
        DataInfo("chitchat-small", "next-token", 12, 4575, "MIT", "Chat messages of 12 people"),
        DataInfo(
            "chitchat-punctuation",
            "classification",
            117,
            79262,
            "MIT",
            "How 117 people end a chat message: . ! ? … or with none of them",
            labels=chitchat.ENDINGS,
        ),
        DataInfo(
            "watch",
            "classification",
            10,
            4099,
            "BSD-3-Clause",
            "Seven exercises from a smartwatch, 5 persons x 2 wrists (group base: 5 others)",
            ("base", "clients"),
            watch.LABELS,
        ),
    )
}
TASKS = ("classification", "next-token")
PARTITIONS = ("dirichlet", "iid", "natural")


def list_data() -> tuple[DataInfo, ...]:
    """Return the data sets of this package, by id."""
    return tuple(DATA[name] for name in sorted(DATA))


def load_data(
    id: str,
    *,
    task: str | None = None,
    tokenizer: TokenizerLike = None,
    clients: int | None = None,
    seed: int = 0,
    test_share: float = 0.2,
    validation_share: float = 0.0,
    max_length: int = 64,
    partition: str = "natural",
    alpha: float = 0.5,
    group: str = "clients",
) -> FederatedData:
    """Return the clients of a data set; each one's data is read when it is asked for.

    id: one of `list_data`, or "module:function" whose function, called without arguments, returns a
    `FederatedData`, or a mapping from client ids to `ClientData`, `Examples`, a list of messages,
    or a mapping with "inputs" and "targets".
    task: refused when it is not the data's; None takes the data's own.
    tokenizer: a tokenizer.json, its folder or an object; text only. max_length: tokens of a row.
    clients: how many; fewer than there are: a random choice; more: clients drawn again with
    replacement, with ids such as "u7#2" and a note. None: as many as there are.
    test_share, validation_share: of each client's examples, taken from the end of its time.
    partition: "natural", by person; or "iid" or "dirichlet": pool all clients' examples and deal
    them out anew, evenly or with labels skewed by Dirichlet(`alpha`). "dirichlet:0.3" sets `alpha`.
    group: part of the persons; "base" of "watch" are those that its base was trained on.

    Raises `UnknownNameError`, `ConfigError`, `DataError`, and `MissingExtraError` for text.
    """
    _check(test_share, validation_share, max_length, clients)
    partition, alpha = _how_to_partition(partition, alpha)
    reading = partial(
        _Reading, test_share=test_share, validation_share=validation_share, max_length=max_length
    )
    if is_function(id):
        data = _from_function(id, task, tokenizer, reading)
    elif id not in DATA:
        raise unknown_name("data set", id, (*DATA, "module:function"))
    else:
        info = DATA[id]
        if group not in info.groups:
            raise unknown_name(f"group of data {id!r}", group, info.groups)
        if task in TASKS and task != info.task:
            raise ConfigError(f"task: data {id!r} is for {info.task!r}, found {task!r}")
        data = _bundled(info, group, tokenizer, reading)
        data = replace(data, task=task or info.task)
    if partition != "natural":
        return repartitioned(data, partition, alpha, clients or len(data), seed)
    return data if clients is None else _resampled(data, clients, seed)


def _how_to_partition(text: str, alpha: float) -> tuple[str, float]:
    """Split "dirichlet:0.3" into the name and the alpha."""
    name, colon, number = text.partition(":")
    if name not in PARTITIONS or (colon and name != "dirichlet"):
        raise unknown_name("partition", text, (*PARTITIONS, "dirichlet:0.3"))
    if not colon:
        return name, alpha
    try:
        return name, float(number)
    except ValueError:
        raise ConfigError(
            f"partition: expected a number after 'dirichlet:', found {number!r}"
        ) from None


@dataclass(frozen=True, slots=True)
class _Reading:
    """How examples are made of raw data."""

    tokenizer: Any
    test_share: float
    validation_share: float
    max_length: int

    def options(self) -> dict[str, Any]:
        return {
            "test_share": self.test_share,
            "validation_share": self.validation_share,
            "max_length": self.max_length,
        }


def _bundled(
    info: DataInfo, group: str, tokenizer: TokenizerLike, reading: Callable[[Any], _Reading]
) -> FederatedData:
    if info.id == "watch":
        how = reading(None)
        windows = partial(
            watch.read_client, test_share=how.test_share, validation_share=how.validation_share
        )
        return FederatedData(info.id, info.task, watch.client_ids(group), windows, info.labels)
    small = info.id == "chitchat-small"
    messages = chitchat.read_messages(f"chitchat_{'12x400' if small else '117x1000'}.jsonl.gz")
    how = reading(load_tokenizer(tokenizer))
    if info.id == "chitchat-authors":
        people = chitchat.authors(messages)

        def read_author(client_id: str) -> ClientData:
            return chitchat.read_author_client(
                client_id, messages[client_id], how.tokenizer, people.index(client_id),
                **how.options(),
            )  # fmt: skip

        return FederatedData(info.id, info.task, people, read_author, info.labels)
    encode = (
        chitchat.read_ending_client
        if info.id == "chitchat-punctuation"
        else chitchat.read_text_client
    )

    def read(client_id: str) -> ClientData:
        return encode(client_id, messages[client_id], how.tokenizer, **how.options())

    return FederatedData(info.id, info.task, tuple(sorted(messages)), read, info.labels)


def _from_function(
    id: str, task: str | None, tokenizer: TokenizerLike, reading: Callable[[Any], _Reading]
) -> FederatedData:
    found = import_function(id, "data")()
    if isinstance(found, FederatedData):
        return replace(found, task=task) if task else found
    if not isinstance(found, Mapping) or not found:
        raise DataError(
            f"data {id!r}: expected a FederatedData or a mapping with a client or more, "
            f"found {type(found).__name__}"
        )
    for client_id in found:
        if not isinstance(client_id, str) or not client_id or "#" in client_id:
            raise DataError(
                f"data {id!r}: expected ids of clients as text without '#', found {client_id!r}"
            )
    is_text = any(_is_messages(value) for value in found.values())
    how = reading(load_tokenizer(tokenizer) if is_text else None)

    def read(client_id: str) -> ClientData:
        try:
            return _client(client_id, found[client_id], how)
        except DataError as error:
            raise DataError(f"data {id!r}, client {client_id!r}: {error}") from None

    first = read(min(found))
    kind = "next-token" if first.train.targets.ndim == 2 else "classification"
    return FederatedData(id, task or kind, tuple(sorted(found)), read)


def _client(client_id: str, value: Any, how: _Reading) -> ClientData:
    if isinstance(value, ClientData):
        data = value
    elif _is_messages(value):
        data = chitchat.read_text_client(client_id, value, how.tokenizer, **how.options())
    else:
        examples = value if isinstance(value, Examples) else _examples(value)
        rows = np.arange(len(examples))
        parts = chitchat.split(rows, how.test_share, how.validation_share)
        data = ClientData(client_id, *(examples.take(part) for part in parts))
    if len(data.train) == 0:
        raise DataError("expected at least one training example, found none; leave the client out")
    return data


def _examples(value: Any) -> Examples:
    known = {"inputs", "targets", "word_starts", "characters"}
    if not isinstance(value, Mapping) or not {"inputs", "targets"} <= set(value) <= known:
        shown = sorted(value) if isinstance(value, Mapping) else type(value).__name__
        raise DataError(
            "expected ClientData, Examples, a list of messages or a mapping with inputs and "
            f"targets, found {shown}"
        )
    return Examples(**value)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def _resampled(data: FederatedData, clients: int, seed: int) -> FederatedData:
    """Take `clients` of the data's clients; all of them and random second copies when too few."""
    ids = data.client_ids
    generator = rng(seed, "clients", data.id)
    if clients <= len(ids):
        chosen = generator.choice(len(ids), size=clients, replace=False)
        return replace(data, client_ids=tuple(sorted(ids[index] for index in chosen)))
    copies = dict.fromkeys(ids, 1)
    more = []
    for index in generator.integers(len(ids), size=clients - len(ids)):
        copies[ids[index]] += 1
        more.append(f"{ids[index]}#{copies[ids[index]]}")
    note = (
        f"{clients} clients were asked for and there are {len(ids)}: {len(more)} of them are "
        "copies, drawn with replacement"
    )
    return replace(data, client_ids=tuple(sorted((*ids, *more))), notes=(*data.notes, note))


def _check(
    test_share: float, validation_share: float, max_length: int, clients: int | None
) -> None:
    if not (0 <= test_share < 1 and 0 <= validation_share < 1):
        raise ConfigError(
            "test_share and validation_share: expected fractions in [0, 1), "
            f"found {test_share!r} and {validation_share!r}"
        )
    if test_share + validation_share >= 1:
        raise ConfigError(
            "test_share + validation_share: expected less than 1, so that something is left to "
            f"train on, found {test_share + validation_share!r}"
        )
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ConfigError(f"max_length: expected a whole number of tokens >= 1, found {max_length}")
    if clients is not None and (
        isinstance(clients, bool) or not isinstance(clients, int) or clients < 1
    ):
        raise ConfigError(f"clients: expected a whole number >= 1, found {clients!r}")
