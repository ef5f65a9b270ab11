"""Factors that a client trains and does not share: they stay with it from one round to the next.

A method may share A only, and leave every client a B of its own (FedSA-LoRA, arXiv:2410.01463). The
client then starts a round from what the server sent, with its own factors in place of the server's.
"""

from __future__ import annotations

import numpy as np
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedlora.adapter import Adapter, Array
from fedlora.errors import FederationError
from fedlora.federation.tasks import TrainTask
from fedlora.flat import RowForm, Segment, segments_of
from fedlora.training import Factor

__all__ = ["kept_factors", "kept_segments", "read_state", "split_row", "with_kept", "write_state"]

_NAME = "private"  # of the records in a client's `Context.state`


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


def read_state(task: TrainTask, state: RecordDict) -> Array | None:
    """Return the row that a client's state holds; None in its first round.

    Raises `FederationError` when it is of another layout: the run was started with other layers.
    """
    factors, layout = state.get(_NAME), state.get(f"{_NAME}-layout")
    if not isinstance(factors, ArrayRecord) or not isinstance(layout, ConfigRecord):
        return None
    expected = [str(segment) for segment in kept_segments(task)]
    if layout["segments"] != expected:
        raise FederationError(
            f"this client's own factors: expected {len(expected)} as in this run, found others; "
            "forget them, or start a new run"
        )
    row: Array = factors["factors"].numpy()
    return row


def write_state(task: TrainTask, state: RecordDict, row: Array) -> None:
    """Keep a client's own factors in its state."""
    state[_NAME] = ArrayRecord({"factors": FlowerArray(np.ascontiguousarray(row))})
    segments = [str(segment) for segment in kept_segments(task)]
    state[f"{_NAME}-layout"] = ConfigRecord({"segments": segments})
