"""Factors that a client trains and does not share: they stay with it from one round to the next.

A method may share A only, and leave every client a B of its own (FedSA-LoRA, arXiv:2410.01463). The
client then starts a round from what the server sent, with its own factors in place of the server's.
"""

from __future__ import annotations

import numpy as np

from fedlora.adapter import Adapter, Array
from fedlora.federation.own_rows import OwnRows
from fedlora.federation.tasks import TrainTask
from fedlora.flat import RowForm, Segment, segments_of
from fedlora.training import Factor

__all__ = [
    "KIND",
    "kept_factors",
    "kept_segments",
    "read_own_factors",
    "split_row",
    "with_kept",
    "write_own_factors",
]

KIND = "own-factors"  # among the rows that a client keeps


def kept_factors(task: TrainTask) -> frozenset[Factor]:
    """Return the factors that a client trains in this round and does not upload."""
    return (task.order.rule.trained - task.order.uploaded) & {"A", "B"}


def kept_segments(task: TrainTask) -> tuple[Segment, ...]:
    """Return how these factors lie in a row."""
    return segments_of(task.broadcast.trainable, kept_factors(task))


def with_kept(task: TrainTask, row: Array) -> Adapter:
    """Return the adapter that was sent, with a client's own factors in it.

    row: float32, as `kept_segments` says.
    """
    return RowForm.of(task.broadcast.trainable, kept_factors(task)).read(row.tobytes())


def split_row(task: TrainTask, row: Array) -> tuple[Array, Array]:
    """Divide a row of all trained factors into the kept and the uploaded ones."""
    kept = kept_factors(task)
    segments = segments_of(task.broadcast.trainable, task.order.rule.trained)
    mine = np.concatenate([np.full(segment.size, segment.factor in kept) for segment in segments])
    return row[mine], row[~mine]


def read_own_factors(task: TrainTask, own: OwnRows) -> Array | None:
    """Return the row that a client has of its own factors; None in its first round.

    Raises a `FedloraError` when it is of another layout: the run was started with other layers.
    """
    return own.read(KIND, kept_segments(task), task.order.round)


def write_own_factors(task: TrainTask, own: OwnRows, row: Array) -> None:
    """Keep a client's own factors."""
    own.write(KIND, kept_segments(task), task.order.round, row)
