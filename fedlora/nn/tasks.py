"""What is learned: the loss that training follows and the sums that evaluation adds up.

A batch is a dict of NumPy arrays, "inputs", "targets" and whatever else a task needs. A model takes
the inputs as its first argument and returns logits, or an object that has them as `.logits`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.errors import ConfigError, unknown_name
from fedlora.imports import import_function, is_function
from fedlora.nn.outputs import counted_logits, logits_at, logits_of, nats_at
from fedlora.nn.rows import NOT_COUNTED, Batch, client_rows, packed, packs_texts, stacked

__all__ = ["Task", "get_task", "scored_positions"]

SCORED_LOGITS = 1 << 24  # at most about this many logits exist at once while scoring: 64 MB


@dataclass(frozen=True, slots=True)
class Task:
    """A loss to train with and a score to report.

    `loss` returns a scalar tensor, the mean over the batch's counted targets. `score` returns sums
    that may be added over batches: "nats" with "tokens" or "examples", and what the task counts.

    `losses` takes a batch of each of K clients and returns their K losses, in one pass through the
    model in which the rows are client-major, in K blocks of equal size: what `loss` would return
    for each. A task without it is trained one client at a time. `scores` is to `score` what
    `losses` is to `loss`.
    """

    name: str
    metric: Literal["loss", "accuracy"]
    higher_is_better: bool
    loss: Callable[[nn.Module, Batch], Tensor]
    score: Callable[[nn.Module, Batch], dict[str, float]]
    losses: Callable[[nn.Module, Sequence[Batch]], Tensor] | None = None
    scores: Callable[[nn.Module, Sequence[Batch]], list[dict[str, float]]] | None = None


def get_task(name: str) -> Task:
    """Return the task "next-token" or "classification", or what "module:function" returns.

    Raises `UnknownNameError` for another name, and `ConfigError` when the function cannot be
    imported or returns no `Task`.
    """
    if name in TASKS:
        return TASKS[name]
    if not is_function(name):
        raise unknown_name("task", name, (*TASKS, "module:function"))
    task = import_function(name, "task")()
    if not isinstance(task, Task):
        raise ConfigError(
            f"task: expected {name!r} to return a fedlora.nn.Task, found {type(task).__name__}"
        )
    return task


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean nats over the targets that are not -100; 0 for a batch without any."""
    inputs, targets = _tensors(model, batch)
    counted = (targets != NOT_COUNTED).reshape(-1)
    wanted = targets.reshape(-1)[counted]
    rows: dict[str, Tensor] = {}
    if packs_texts(model):
        inputs, counted, rows = packed(inputs, counted)
    return nats_at(model, inputs, counted, wanted, rows).sum() / max(len(wanted), 1)


@torch.no_grad()
def next_token_score(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Sums over counted targets: nats; at word starts, right first and top three guesses."""
    inputs, targets = _tensors(model, batch)
    starts = batch.get("word_starts", np.zeros(targets.shape, bool))
    word_starts = torch.tensor(starts, device=targets.device)
    sums = dict.fromkeys(("nats", "tokens", "top1", "top3", "word_starts"), 0.0)
    for rows in _row_chunks(model, inputs):
        counted = (targets[rows] != NOT_COUNTED).reshape(-1)
        wanted = targets[rows].reshape(-1)[counted]
        at_start = word_starts[rows].reshape(-1)[counted]
        logits = logits_at(model, inputs[rows], counted)
        nats = F.cross_entropy(logits, wanted, reduction="none").double()
        best = logits[at_start].topk(min(3, logits.shape[-1])).indices
        hits = best == wanted[at_start, None]
        sums["nats"] += float(nats.sum())
        sums["tokens"] += len(wanted)
        sums["top1"] += int(hits[:, :1].sum())
        sums["top3"] += int(hits.sum())
        sums["word_starts"] += int(at_start.sum())
    return sums


def next_token_losses(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """(K,) `next_token_loss` of each client's batch.

    Where texts can share a row, each client has one: half of a batch of short texts is padding.
    """
    inputs, counted, wanted, owner, rows = client_rows(model, batches)
    nats = nats_at(model, inputs, counted, wanted, rows)
    counts = torch.bincount(owner, minlength=len(batches)).clamp(min=1)
    return nats.new_zeros(len(batches)).index_add(0, owner, nats) / counts


@torch.no_grad()
def next_token_scores(model: nn.Module, batches: Sequence[Batch]) -> list[dict[str, float]]:
    """Return `next_token_score` of each client's batch, from one pass; see `scored_positions`."""
    inputs, counted, wanted, owner, rows = client_rows(model, batches)
    logits = counted_logits(model, inputs, counted, rows)
    # In the order of the counted targets, which packing and padding leave as it is.
    marked = [
        np.broadcast_to(batch.get("word_starts", np.False_), batch["targets"].shape)[
            batch["targets"] != NOT_COUNTED
        ]
        for batch in batches
    ]
    at_start = torch.from_numpy(np.concatenate(marked)).to(owner.device)
    nats = F.cross_entropy(logits, wanted, reduction="none").double()
    best = logits[at_start].topk(min(3, logits.shape[-1])).indices
    hits = best == wanted[at_start, None]
    starting = owner[at_start]
    sums = {
        "nats": _by_client(owner, nats, len(batches)),
        "tokens": torch.bincount(owner, minlength=len(batches)),
        "top1": _by_client(starting, hits[:, :1].sum(1), len(batches)),
        "top3": _by_client(starting, hits.sum(1), len(batches)),
        "word_starts": torch.bincount(starting, minlength=len(batches)),
    }
    return _rows(sums)


def classification_losses(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """(K,) `classification_loss` of each client's batch."""
    inputs, targets = stacked(batches)
    device = next(model.parameters()).device
    inputs, targets = inputs.to(device), targets.to(device)
    logits = logits_of(model, inputs, masked=True)
    nats = F.cross_entropy(logits, targets, reduction="none", ignore_index=NOT_COUNTED)
    counts = (targets != NOT_COUNTED).view(len(batches), -1).sum(1)
    return nats.view(len(batches), -1).sum(1) / counts


@torch.no_grad()
def classification_scores(model: nn.Module, batches: Sequence[Batch]) -> list[dict[str, float]]:
    """Return `classification_score` of each client's batch, from one pass."""
    inputs, targets = stacked(batches)
    device = next(model.parameters()).device
    inputs, targets = inputs.to(device), targets.to(device)
    logits = logits_of(model, inputs, masked=True)
    nats = F.cross_entropy(logits, targets, reduction="none", ignore_index=NOT_COUNTED)
    correct = logits.argmax(-1) == targets  # a filled-up row has no class
    return _rows(
        {
            "nats": nats.double().view(len(batches), -1).sum(1),
            "examples": (targets != NOT_COUNTED).view(len(batches), -1).sum(1),
            "correct": correct.view(len(batches), -1).sum(1),
        }
    )


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean nats over the batch's examples."""
    inputs, targets = _tensors(model, batch)
    return F.cross_entropy(logits_of(model, inputs, masked=True), targets)


@torch.no_grad()
def classification_score(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Sums of nats, examples and examples whose most probable class is the right one."""
    inputs, targets = _tensors(model, batch)
    logits = logits_of(model, inputs, masked=True)
    nats = F.cross_entropy(logits, targets, reduction="none").double()
    correct = logits.argmax(-1) == targets
    return {
        "nats": float(nats.sum()),
        "examples": float(len(targets)),
        "correct": float(correct.sum()),
    }


TASKS = {
    "next-token": Task(
        "next-token",
        "loss",
        False,
        next_token_loss,
        next_token_score,
        next_token_losses,
        next_token_scores,
    ),
    "classification": Task(
        "classification",
        "accuracy",
        True,
        classification_loss,
        classification_score,
        classification_losses,
        classification_scores,
    ),
}


def scored_positions(model: nn.Module) -> int:
    """Return how many positions `scores` may be given at once: about `SCORED_LOGITS` logits."""
    return max(1, SCORED_LOGITS // _vocabulary(model))


def _by_client(owner: Tensor, values: Tensor, clients: int) -> Tensor:
    return values.new_zeros(clients).index_add(0, owner, values)


def _rows(sums: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """Turn a column per sum into a dictionary per client."""
    columns = {name: column.tolist() for name, column in sums.items()}
    return [
        {name: float(column[k]) for name, column in columns.items()}
        for k in range(len(next(iter(columns.values()))))
    ]


def _tensors(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    return _tensor(batch["inputs"], device), _tensor(batch["targets"], device)


def _tensor(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Share the array's memory where torch allows that; it warns about read-only arrays."""
    if not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(array).to(device)


def _row_chunks(model: nn.Module, inputs: Tensor) -> list[slice]:
    """Cut a batch by rows so that about `SCORED_LOGITS` logits exist at once, at least one row."""
    rows = max(1, scored_positions(model) // inputs.shape[1])
    return [slice(start, start + rows) for start in range(0, inputs.shape[0], rows)]


def _vocabulary(model: nn.Module) -> int:
    head = getattr(model, "lm_head", None)
    if size := getattr(head, "out_features", None):
        return int(size)
    config = getattr(model, "config", None)
    return int(getattr(config, "vocab_size", None) or 1 << 16)
