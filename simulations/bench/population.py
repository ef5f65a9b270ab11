"""Synthetic clients, as "module:function": random tokens, drawn when a client is asked for.

The shape comes from the environment (`Shape.environment`), since the function of a data set takes
no arguments, and a simulation in other processes inherits it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

import numpy as np

from fedlora.data import ClientData, Examples, FederatedData
from fedlora.randomness import rng

__all__ = ["FUNCTION", "Shape", "synthetic"]

FUNCTION = "simulations.bench.population:synthetic"
VARIABLE = "FEDLORA_BENCH_POPULATION"
SHORTEST = 4  # tokens, where lengths are mixed


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of a synthetic population."""

    clients: int
    rows: int = 8  # training examples of a client
    length: int = 32  # tokens
    mixed: bool = False  # each row of its own length, uniform from SHORTEST to `length`
    vocabulary: int = 256
    classes: int = 0  # 0: next-token
    test_rows: int = 1

    def environment(self) -> dict[str, str]:
        """The variable by which `synthetic` gets this shape."""
        return {VARIABLE: json.dumps(asdict(self))}


def synthetic() -> FederatedData:
    """Return the population that the environment describes; the default one has 64 clients."""
    shape = Shape(**json.loads(os.environ.get(VARIABLE, '{"clients": 64}')))
    nothing = _draw(shape, "nobody", 0)

    def read(client_id: str) -> ClientData:
        train = _draw(shape, client_id, shape.rows)
        test = _draw(shape, f"{client_id}/test", shape.test_rows) if shape.test_rows else nothing
        return ClientData(client_id, train, nothing, test)

    ids = tuple(f"c{index:06d}" for index in range(shape.clients))
    labels = tuple(f"class {index}" for index in range(shape.classes)) or None
    task = "classification" if shape.classes else "next-token"
    return FederatedData(FUNCTION, task, ids, read, labels)


def _draw(shape: Shape, name: str, rows: int) -> Examples:
    """Ids from 1: 0 is padding. What is to be learned is noise; the work is that of real text."""
    generator = rng(0, "bench", name)
    ids = generator.integers(1, shape.vocabulary, (rows, shape.length + 1))
    inputs, targets = ids[:, :-1].copy(), ids[:, 1:].copy()
    if shape.classes:
        targets = generator.integers(0, shape.classes, rows)
    if shape.mixed:
        lengths = generator.integers(SHORTEST, shape.length + 1, rows)
        padding = np.arange(shape.length) >= lengths[:, None]
        inputs[padding] = 0
        if not shape.classes:
            targets[padding] = -100
    for array in (inputs, targets):
        array.flags.writeable = False  # `Examples` copies what could still change
    return Examples(inputs, targets)
