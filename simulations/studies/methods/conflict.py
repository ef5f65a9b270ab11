"""Wearers of a watch who contradict one another: one meaning, or one axis, is another's opposite.

From the clients of the data set "watch", ten wrists of people whom the base has never seen:

    labels     every client calls the exercises by names of its own: the classes are permuted
    axes       every client wears the watch its own way round: axes have their signs flipped
    agreeing   nothing changed: the same few windows, so that both can be compared with it

Each client has few windows to train on, so that there is something to be gained from the others.
What is permuted or flipped is the same in all of a client's parts, and in every run. Windows are
given as the base's convolutions see them, as in `wearers`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from fedlora.data import ClientData, Examples
from fedlora.data.watch import LABELS, client_ids, read_client
from fedlora.randomness import rng
from simulations.studies.methods.wearers import pooled

__all__ = ["agreeing", "axes", "labels"]

TRAIN, VALIDATION, TEST = 42, 21, 63  # windows of a client at most
_Change = Callable[[str, Examples], Examples]


@cache
def labels() -> dict[str, ClientData]:
    """Return the clients by id, the classes of each permuted."""
    return _clients(_permuted)


@cache
def axes() -> dict[str, ClientData]:
    """Return the clients by id, the axes of each flipped or not, by chance."""
    return _clients(_flipped)


@cache
def agreeing() -> dict[str, ClientData]:
    """Return the clients by id as they are."""
    return _clients(lambda _, examples: examples)


def _clients(change: _Change) -> dict[str, ClientData]:
    found = {}
    for client in client_ids("clients"):
        data = read_client(client, test_share=0.3, validation_share=0.15)
        parts = zip(
            (data.train, data.validation, data.test), (TRAIN, VALIDATION, TEST), strict=True
        )
        changed = (change(client, _few(part, count)) for part, count in parts)
        found[client] = pooled(ClientData(client, *changed))
    return found


def _few(examples: Examples, count: int) -> Examples:
    """Take at most `count`, evenly spread: they are sorted by class, and by time within one."""
    count = min(count, len(examples))
    return examples.take(np.linspace(0, len(examples) - 1, count).round().astype(np.int64))


def _permuted(client: str, examples: Examples) -> Examples:
    names = rng(0, "conflict", "labels", client).permutation(len(LABELS))
    return Examples(examples.inputs, names[examples.targets])


def _flipped(client: str, examples: Examples) -> Examples:
    count = examples.inputs.shape[1]
    signs = rng(0, "conflict", "axes", client).choice([-1.0, 1.0], size=(count, 1))
    return Examples((examples.inputs * signs).astype(np.float32), examples.targets)
