"""Deal pooled examples out to clients: evenly, skewed by label, or by group. NumPy only.

Each function returns one array of indices a client, sorted; every example is in exactly one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedlora.data.client import ClientData, FederatedData
from fedlora.data.examples import IGNORED, Examples
from fedlora.errors import ConfigError, DataError
from fedlora.randomness import rng

__all__ = ["dirichlet_partition", "group_partition", "iid_partition", "repartitioned"]

Indices: TypeAlias = npt.NDArray[np.int64]
Shares: TypeAlias = npt.NDArray[np.float64]


def iid_partition(
    num_examples: int, clients: int, seed: int, min_examples: int = 1
) -> list[Indices]:
    """Deal examples out at random, so that sizes differ by one at most.

    Raises `DataError` when there are too few for `min_examples` each.
    """
    _require(num_examples, clients, min_examples)
    order = rng(seed, "partition", "iid").permutation(num_examples)
    return [np.sort(part) for part in np.array_split(order, clients)]


def dirichlet_partition(
    labels: npt.ArrayLike, clients: int, alpha: float, seed: int, min_examples: int = 1
) -> list[Indices]:
    """Deal each label's examples out in proportions drawn from Dirichlet(alpha) (1909.06335).

    A small `alpha` gives each label to few clients. The proportions depend on (seed, label,
    clients, alpha) alone, so that a train and a test part that are dealt out one after the other
    get the same. A client below `min_examples` is filled up from the largest ones.

    Raises `DataError` when there are too few examples for that, and `ConfigError`.
    """
    classes = np.asarray(labels)
    if not 0 < alpha < np.inf:
        raise ConfigError(f"alpha: expected a finite number > 0, found {alpha!r}")
    _require(len(classes), clients, min_examples)
    parts: list[list[Indices]] = [[np.empty(0, np.int64)] for _ in range(clients)]
    for label in np.unique(classes):
        shares = _dirichlet(rng(seed, "partition", "dirichlet", str(label)), alpha, clients)
        rows = np.flatnonzero(classes == label)
        rng(seed, "partition", "order", str(label)).shuffle(rows)
        cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.append(piece)
    dealt = [np.concatenate(part) for part in parts]
    return [np.sort(part) for part in _filled(dealt, min_examples)]


def group_partition(groups: Sequence[str]) -> dict[str, Indices]:
    """Give each group, such as a person or a device, to a client of its own, by sorted name."""
    names = np.asarray(groups, dtype=str)
    return {str(name): np.flatnonzero(names == name) for name in np.unique(names)}


def repartitioned(
    data: FederatedData, how: str, alpha: float, clients: int, seed: int
) -> FederatedData:
    """Pool the clients' examples and deal them out anew, `how` being "iid" or "dirichlet".

    Train, validation and test are dealt out one by one, by the same proportions, so that nothing
    moves between them. The new ids are "p0000" and so on. Raises `ConfigError` and `DataError`.
    """
    old = list(data.clients())
    if how == "dirichlet" and old[0].train.targets.ndim != 1:
        raise ConfigError(
            f"partition: 'dirichlet' needs labels, and data {data.id!r} is for {data.task!r}; "
            "use 'iid' or 'natural'"
        )
    dealt: list[list[Examples]] = []
    for part, least in (("train", 1), ("validation", 0), ("test", 0)):
        pool = _joined([getattr(client, part) for client in old])
        if how == "dirichlet":
            shares = dirichlet_partition(pool.targets, clients, alpha, seed, least)
        else:
            shares = iid_partition(len(pool), clients, seed, least)
        dealt.append([pool.take(rows) for rows in shares])
    names = tuple(f"p{index:04d}" for index in range(clients))
    made = {name: ClientData(name, *parts) for name, *parts in zip(names, *dealt, strict=True)}
    shown = f"dirichlet with alpha {alpha:g}" if how == "dirichlet" else how
    notes = [f"the examples of {len(old)} clients were pooled and dealt out to {clients}: {shown}"]
    if empty := sum(len(client.test) == 0 for client in made.values()):
        notes.append(f"{empty} of {clients} clients have no test examples")
    return FederatedData(
        data.id, data.task, names, made.__getitem__, data.labels, (*data.notes, *notes)
    )


def _joined(parts: Sequence[Examples]) -> Examples:
    """Put examples one after another; rows of text are padded to the widest."""
    width = max(part.inputs.shape[-1] for part in parts)

    def join(name: str, fill: int) -> npt.NDArray[Any] | None:
        arrays = [getattr(part, name) for part in parts]
        if any(array is None for array in arrays):
            return None
        if parts[0].is_text and arrays[0].ndim == 2:
            arrays = [
                np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=fill)
                for array in arrays
            ]
        return np.concatenate(arrays)

    inputs, targets = join("inputs", 0), join("targets", IGNORED)
    if inputs is None or targets is None:  # cannot be: every Examples has both
        raise DataError("expected inputs and targets")
    return Examples(inputs, targets, join("word_starts", 0), join("characters", 0))


def _dirichlet(generator: np.random.Generator, alpha: float, clients: int) -> Shares:
    """Draw proportions; by logarithms, since the gamma draws of a tiny alpha are all zero."""
    # Gamma(a) = Gamma(a + 1) * U^(1/a), Marsaglia and Tsang (2000), section 6.
    logs = np.log(generator.gamma(alpha + 1, size=clients))
    logs += np.log(1 - generator.random(clients)) / alpha
    shares = np.exp(logs - logs.max())
    return np.asarray(shares / shares.sum())


def _filled(parts: list[Indices], min_examples: int) -> list[Indices]:
    """Move the last examples of the largest clients to those below the minimum."""
    for index in range(len(parts)):
        while len(parts[index]) < min_examples:
            giver = max(range(len(parts)), key=lambda other: len(parts[other]))
            spare = min(len(parts[giver]) - min_examples, min_examples - len(parts[index]))
            parts[index] = np.concatenate([parts[index], parts[giver][-spare:]])
            parts[giver] = parts[giver][:-spare]
    return parts


def _require(num_examples: int, clients: int, min_examples: int) -> None:
    if clients < 1:
        raise ConfigError(f"clients: expected a whole number >= 1, found {clients}")
    if num_examples < clients * min_examples:
        raise DataError(
            f"partition: expected at least {clients * min_examples} examples for {clients} clients "
            f"of {min_examples} or more, found {num_examples}; ask for fewer clients"
        )
