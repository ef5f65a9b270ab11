"""The personal and the global adapter mixed for each input: FedDPA's way to serve (2403.19211).

The more an input is like what its person trained on, the more of the personal adapter it gets:

    w = mixing_weight * mean over S of cos(h(input), h(sample_s)), cut to [0, 1]
    every layer: (1 - w) * global product + w * personal product, beside the frozen one

h is the input of the model's last linear layer under the global adapter: a text's state at its last
position (as in the paper), a watch's features. The samples are S training examples of the person.
The personal adapter starts from the global one, as in the paper's FedDPA-F; the authors' program
looks at h under the local adapter and has a `mixing_weight` of 0.5 and S = 5 too.

In next-token prediction the weight of a message is that of the whole message, also where its first
words are predicted; a keyboard would know that much only at the message's end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.adapter import Adapter
from fedlora.data import Batch, ClientData, Examples, collate, eval_batches
from fedlora.errors import ConfigError
from fedlora.evaluation import FEATURE_POSITIONS, TEXT_POSITIONS, Trial, measured, require_examples
from fedlora.nn import Task, load_adapter_into
from fedlora.nn.inject import lora_modules
from fedlora.nn.layers import LoraLinear, LoraModule
from fedlora.nn.local import evaluating
from fedlora.nn.outputs import logits_of
from fedlora.nn.serving import serving
from fedlora.nn.tasks import scored_positions
from fedlora.randomness import rng

__all__ = ["SAMPLES", "evaluate_mixed", "head_inputs"]

SAMPLES = 5  # training examples of a person that an input is compared with


def evaluate_mixed(
    model: nn.Module,
    data: ClientData,
    trial: Trial,
    task: Task,
    *,
    shared: Adapter,
    largest: float,
    seed: int,
    together: bool = True,
) -> dict[str, float]:
    """Return what `fedlora.evaluation.evaluate` does, each example with a mixture of its own.

    trial: the personal adapter and the examples; shared: the global adapter. data: the client, from
    whose training part the samples are drawn, keyed by (seed, client); without any w is 0. largest:
    `mixing_weight` above. together: whether examples may share a pass; not for a model whose rows
    reach one another. The model is left with the global adapter.

    Beside the task's measures there is ``personal_weight``, the mean of w.

    Raises what `evaluate` raises.
    """
    examples = trial.examples
    require_examples(examples, trial.who)
    together = together and task.scores is not None
    positions = FEATURE_POSITIONS
    if examples.is_text:
        positions = min(TEXT_POSITIONS, scored_positions(model))
    sums: dict[str, float] = defaultdict(float)
    total_weight = 0.0
    with serving(model, shared):
        samples = _samples(model, data, seed)
    for batch in eval_batches(examples, positions if together else 1):
        with serving(model, shared):
            weights = _weights(model, batch, samples, largest)
        rows = [
            {name: value[n : n + 1] for name, value in batch.items()} for n in range(len(weights))
        ]
        with evaluating(model), _mixed(model, shared, trial.adapter, weights):
            if task.scores is not None and together:
                found = task.scores(model, rows)
            else:
                found = [task.score(model, row) for row in rows]
        for one in found:
            for name, value in one.items():
                sums[name] += value
        total_weight += float(weights.sum())
    values = measured(sums, examples, task, trial.who)
    return values | {"personal_weight": total_weight / len(examples)}


@torch.no_grad()
def head_inputs(model: nn.Module, batch: Batch) -> Tensor:
    """(n, d) float32: for each row what the last linear layer that the model calls is given.

    Of a state at every position, the one at the text's last position; of other further dimensions
    the mean. Raises `ConfigError` for a model that calls no linear layer.
    """
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[:] = args[:1]

    linears = [m for m in model.modules() if isinstance(m, nn.Linear | LoraLinear)]
    hooks = [module.register_forward_pre_hook(note) for module in linears]
    try:
        inputs = torch.tensor(batch["inputs"], device=next(model.parameters()).device)
        logits_of(model, inputs, masked=True)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ConfigError(
            f"personalization.kind 'mixed': expected a model with a linear layer at its end, found "
            f"{type(model).__name__} that calls none; use kind = 'personal'"
        )
    states = seen[0].float()
    examples = Examples(batch["inputs"], batch["targets"])
    if examples.is_text and states.ndim == 3 and states.shape[1] == inputs.shape[1]:
        last = torch.from_numpy(examples.lengths - 1).to(states.device)
        return states[torch.arange(len(states)), last]
    return states.flatten(1, -2).mean(dim=1) if states.ndim > 2 else states


def _samples(model: nn.Module, data: ClientData, seed: int) -> Tensor | None:
    """(S, d) states of `SAMPLES` of the client's training examples, or of all; None without any.

    The model serves the global adapter, here and in `_weights`.
    """
    count = min(SAMPLES, len(data.train))
    if count == 0:
        return None
    chosen = rng(seed, "mixing", data.client_id).choice(len(data.train), count, replace=False)
    return head_inputs(model, collate(data.train, np.sort(chosen)))


def _weights(model: nn.Module, batch: Batch, samples: Tensor | None, largest: float) -> Tensor:
    """(n,) float32: each row's weight of the personal adapter; 0 without samples."""
    if samples is None:
        return torch.zeros(len(batch["inputs"]))
    cosines = F.normalize(head_inputs(model, batch), dim=1) @ F.normalize(samples, dim=1).T
    return (largest * cosines.mean(dim=1)).clamp(0.0, 1.0)


@contextmanager
def _mixed(model: nn.Module, shared: Adapter, personal: Adapter, weights: Tensor) -> Iterator[None]:
    """Let row n of each adapted layer have ``weights[n]`` of the personal adapter in this block.

    A layer is its frozen product and a low-rank one, so that mixing two layers' outputs mixes their
    low-rank products; the frozen one, computed twice, stays what it is.
    """
    load_adapter_into(model, shared)
    modules = lora_modules(model)
    try:
        for path, module in modules.items():
            own = type(module)(module.base_layer, personal[path], 0.0)
            # On the instance, which `nn.Module.__call__` looks at first.
            object.__setattr__(module, "forward", _forward(path, module, own, weights))
        yield
    finally:
        for module in modules.values():
            vars(module).pop("forward", None)


def _forward(
    path: str, module: LoraModule, own: LoraModule, weights: Tensor
) -> Callable[..., Tensor]:
    general = module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        low = general(x, *args, **kwargs)
        if len(low) % len(weights):
            raise ConfigError(
                f"layer {path!r}: expected the rows of {len(weights)} examples in dimension 0, "
                f"found shape {tuple(x.shape)}; use personalization.kind = 'personal'"
            )
        each = weights.to(low).repeat_interleave(len(low) // len(weights))
        high: Tensor = own(x, *args, **kwargs)
        return torch.lerp(low, high, each.view(-1, *(1,) * (low.ndim - 1)))

    return forward
