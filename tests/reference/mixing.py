"""FedDPA's mixture as the paper writes it: one example at a time, the two adapters added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from fedlora.adapter import Adapter, stack
from fedlora.data import Examples, collate
from fedlora.nn import Task, load_adapter_into


def state_of(model: nn.Module, head: nn.Module, examples: Examples, row: int) -> np.ndarray:
    """What enters `head` for one example, alone in its batch; (d,) float64."""
    seen = []
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = collate(examples, [row])["inputs"]
    with torch.no_grad():
        model(torch.from_numpy(ids))
    hook.remove()
    state = seen[0][0]
    return (state[-1] if state.ndim == 2 else state).numpy().astype(np.float64)


def mixture(shared: Adapter, personal: Adapter, weight: float) -> Adapter:
    """The adapter whose products are (1 - w) of the one's and w of the other's."""
    return stack([shared.scaled(1 - weight), personal.scaled(weight)])


def evaluate_one_by_one(
    model: nn.Module,
    head: nn.Module,
    shared: Adapter,
    personal: Adapter,
    samples: tuple[Examples, Sequence[int]],
    examples: Examples,
    task: Task,
    largest: float,
) -> tuple[Counter[str], list[float]]:
    """Sums over all examples, and each one's weight of the personal adapter."""
    load_adapter_into(model, shared)
    known = [state_of(model, head, samples[0], row) for row in samples[1]]
    sums: Counter[str] = Counter()
    weights = []
    for row in range(len(examples)):
        load_adapter_into(model, shared)
        mine = state_of(model, head, examples, row)
        cosines = [mine @ k / np.linalg.norm(mine) / np.linalg.norm(k) for k in known]
        weights.append(float(np.clip(largest * np.mean(cosines), 0, 1)))
        load_adapter_into(model, mixture(shared, personal, weights[-1]))
        sums.update(task.score(model, collate(examples, [row])))
    return sums, weights
