"""K clients' adapters on one frozen layer, one client after another, with autograd's gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Client = tuple[Tensor, Tensor, float]  # A (rank, in), B (out, rank), scaling


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, clients: Sequence[Client]) -> Tensor:
    """(K * b, ..., in) to (K * b, ..., out): ``x W.T + bias + scaling * x A.T B.T`` by client."""
    parts = [
        F.linear(rows, weight, bias) + scaling * F.linear(F.linear(rows, A), B)
        for rows, (A, B, scaling) in zip(x.chunk(len(clients)), clients, strict=True)
    ]
    return torch.cat(parts)


def embedding(
    ids: Tensor, weight: Tensor, clients: Sequence[Client], padding: int | None = None
) -> Tensor:
    """(K * b, ...) to (K * b, ..., dim): row i of the table gets ``scaling * B A[:, i]``."""
    parts = [
        F.embedding(rows, weight)
        + scaling * F.linear(F.embedding(rows, A.t(), padding_idx=padding), B)
        for rows, (A, B, scaling) in zip(ids.chunk(len(clients)), clients, strict=True)
    ]
    return torch.cat(parts)
