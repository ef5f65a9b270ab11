"""Batches of texts, of one client or of several, as the rows that go through a model.

Where a model takes `segments`, texts share a row and see nothing of one another, so that little of
a pass is padding; where it does not, they are padded on the right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

__all__ = [
    "NOT_COUNTED",
    "Batch",
    "arguments_of",
    "client_rows",
    "packed",
    "packs_texts",
    "stacked",
]

Batch: TypeAlias = Mapping[str, npt.NDArray[Any]]

NOT_COUNTED = -100  # a target that is no part of the loss
PACKED_TOKENS = 512  # of a batch, or of a client in a group, that is packed at all
ROW_TOKENS = 96  # that texts share a row up to: attention grows with the square of a row


def client_rows(
    model: nn.Module, batches: Sequence[Batch]
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Put K clients' texts below one another, client-major, in equal blocks.

    Return the inputs; which positions of them, flattened, are counted; the targets at these; whose
    they are; and the model's further arguments. Where texts can share a row, each client has one.
    """
    rows: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    if packs_texts(model):
        inputs, targets, segments = _rows_of_texts(batches)
        if segments is not None:
            rows = {"segments": segments.to(device)}
    else:
        inputs, targets = stacked(batches)
    inputs, targets = inputs.to(device), targets.to(device)
    counted = (targets != NOT_COUNTED).reshape(-1)
    clients = torch.arange(len(batches), device=device)
    owner = clients.repeat_interleave(targets.numel() // len(batches))[counted]
    return inputs, counted, targets.reshape(-1)[counted], owner, rows


def packs_texts(model: nn.Module) -> bool:
    """Whether several texts can share a row of this model."""
    return {"hidden_only", "segments"} <= arguments_of(model)


def _rows_of_texts(batches: Sequence[Batch]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Put each client's texts in one row: inputs, targets and segments (K, n).

    Where a row would be longer than `PACKED_TOKENS`, the texts keep their own and segments is None.
    A text ends with its last counted target, behind which a causal model has nothing to say.
    """
    parts = []
    for batch in batches:
        inputs, targets = batch["inputs"], batch["targets"]
        if len(inputs) == 1 and targets[0, -1] != NOT_COUNTED:
            parts.append((inputs[0], targets[0], np.zeros(inputs.shape[1], np.int64)))
            continue
        needed = (targets != NOT_COUNTED)[:, ::-1].cumsum(1)[:, ::-1] > 0
        parts.append((inputs[needed], targets[needed], needed.nonzero()[0]))
    width = max(1, *(len(part[0]) for part in parts))
    if width > PACKED_TOKENS:
        return *stacked(batches), None
    rows = [np.full((len(batches), width), fill) for fill in (0, NOT_COUNTED, -1)]
    for k, part in enumerate(parts):
        for row, values in zip(rows, part, strict=True):
            row[k, : len(values)] = values
    ids, wanted, segments = (torch.from_numpy(row) for row in rows)
    one_text = all(len(batch["inputs"]) == 1 for batch in batches)
    return ids, wanted, None if one_text else segments


def stacked(batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Put the batches below one another, client-major, in blocks of equal size.

    Text is padded on the right. A smaller batch is filled up with its own first row, not counted:
    zeros might become NaN in a model that divides by a norm.
    """
    rows = max(len(batch["inputs"]) for batch in batches)
    first = batches[0]
    is_text = first["inputs"].ndim == 2 and first["inputs"].dtype.kind == "i"
    width = max(batch["inputs"].shape[1] for batch in batches)
    shape = (width,) if is_text else first["inputs"].shape[1:]
    inputs = np.zeros((len(batches), rows, *shape), first["inputs"].dtype)
    targets_shape = (width,) if first["targets"].ndim == 2 else ()
    targets = np.full((len(batches), rows, *targets_shape), NOT_COUNTED)
    for k, batch in enumerate(batches):
        found, wanted = batch["inputs"], batch["targets"]
        if is_text:
            inputs[k, : len(found), : found.shape[1]] = found
            inputs[k, len(found) :, : found.shape[1]] = found[:1]
        else:
            inputs[k, : len(found)] = found
            inputs[k, len(found) :] = found[:1]
        if wanted.ndim == 2:
            targets[k, : len(wanted), : wanted.shape[1]] = wanted
        else:
            targets[k, : len(wanted)] = wanted
    return torch.from_numpy(inputs).flatten(0, 1), torch.from_numpy(targets).flatten(0, 1)


def packed(inputs: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Put a small batch's texts in few rows with little padding, each a segment of its own.

    Return inputs (rows, n), counted (rows * n,) and the model's argument `segments` (rows, n); a
    larger batch comes back as it is. A text ends with its last counted target, behind which a
    causal model has nothing to say. Counted positions keep their order.
    """
    by_row = counted.view(inputs.shape)
    needed = by_row.flip(1).cumsum(1).flip(1) > 0
    lengths = needed.sum(1).tolist()
    if not 0 < sum(lengths) <= PACKED_TOKENS:
        return inputs, counted, {}
    rows, starts, width = _places(lengths)
    text, column = needed.nonzero(as_tuple=True)
    place = (torch.tensor(rows) * width + torch.tensor(starts)).to(inputs.device)[text] + column
    size = (rows[-1] + 1) * width
    ids, segments = inputs.new_zeros(size), inputs.new_full((size,), -1)
    ids[place], segments[place] = inputs[text, column], text
    is_counted = counted.new_zeros(size)
    is_counted[place] = by_row[text, column]
    return ids.view(-1, width), is_counted, {"segments": segments.view(-1, width)}


def _places(lengths: Sequence[int]) -> tuple[list[int], list[int], int]:
    """Return each text's row, where it starts there, and the width of the rows."""
    rows, starts, row, end, width = [], [], 0, 0, 1
    for length in lengths:
        if end and end + length > ROW_TOKENS:
            row, end = row + 1, 0
        rows.append(row)
        starts.append(end)
        end += length
        width = max(width, end)
    return rows, starts, width


def arguments_of(model: nn.Module) -> frozenset[str]:
    """Return the names of the arguments of a model's `forward`."""
    return _arguments(type(model).forward)


@lru_cache(maxsize=64)
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
