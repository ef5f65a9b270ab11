"""One step for all clients of a group: clipping, pulls, corrections and the update, per client.

Each client is moved as `torch.optim` would move it alone; its numbers lie in the stacks of a group
(`fedlora.nn.batched`), so that one fused kernel steps all neighbours with equal settings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fedlora.errors import ShapeMismatchError
from fedlora.flat import segments_of
from fedlora.nn.batched import LayerStack
from fedlora.nn.jobs import Job
from fedlora.training import TrainConfig

__all__ = ["StackOptimizer", "settings_of"]


class StackOptimizer:
    """Steps the stacks of a group: one fused kernel for each run of clients with equal settings."""

    def __init__(self, stacks: Sequence[LayerStack], jobs: Sequence[Job]) -> None:
        self.factors = [(stack, name) for stack in stacks for name in stack.trained]
        values = [stack.all(name) for stack, name in self.factors]
        keyed = groupby(range(len(jobs)), key=lambda k: settings_of(jobs[k].config))
        runs = [list(run) for _, run in keyed]
        self.runs = [_Run(jobs[run[0]].config, run[0], run[-1] + 1, values) for run in runs]
        self.limits = _column([job.config.max_grad_norm or math.inf for job in jobs], values[0])
        self.pulls = _column([job.rule.proximal_weight for job in jobs], values[0])
        self.starts = [value.clone() for value in values] if self.pulls.any() else []
        self.clips = bool(self.limits.isfinite().any())
        self.shifts = _shifts(stacks, jobs) if jobs[0].rule.correction is not None else []

    @torch.no_grad()
    def step(self, clients: int) -> None:
        """Move the first `clients` clients by their gradients."""
        # A layer that this pass did not call has no gradient, and stays, as it would alone.
        # With a correction its gradient is zero, and it is corrected, as it would be alone.
        found = []
        for i, (stack, name) in enumerate(self.factors):
            if stack.has_gradient(name):
                found.append(i)
            elif self.shifts:
                stack.gradients[name].zero_()
                found.append(i)
        values = [self.factors[i][0].values[self.factors[i][1]] for i in found]
        gradients = [self.factors[i][0].gradients[self.factors[i][1]] for i in found]
        if self.starts:
            pulls = self.pulls[:clients].view(-1, 1, 1)
            for i, value, gradient in zip(found, values, gradients, strict=True):
                gradient += pulls * (value - self.starts[i][:clients])
        if self.clips:
            _clip(gradients, self.limits[:clients])
        if self.shifts:
            for i, gradient in zip(found, gradients, strict=True):
                gradient += self.shifts[i][:clients]
        for run in self.runs:
            if run.start < clients:
                run.step(found, values, gradients, min(run.stop, clients))


class _Run:
    """Neighbouring clients of a group with the same optimizer, and their moments."""

    def __init__(self, config: TrainConfig, start: int, stop: int, values: list[Tensor]) -> None:
        self.config, self.start, self.stop = config, start, stop
        mine = [value[start:stop] for value in values]
        self.first: list[Tensor] = []
        self.second: list[Tensor] = []
        if config.optimizer == "adamw" or config.momentum:
            self.first = [torch.zeros_like(value) for value in mine]
        if config.optimizer == "adamw":
            self.second = [torch.zeros_like(value) for value in mine]
        self.steps = [torch.zeros((), device=value.device) for value in mine]

    def step(
        self, which: list[int], values: list[Tensor], gradients: list[Tensor], stop: int
    ) -> None:
        config, count = self.config, stop - self.start
        values = [value[self.start : stop] for value in values]
        gradients = [gradient[self.start : stop] for gradient in gradients]
        first = [self.first[i][:count] for i in which] if self.first else []
        if config.optimizer == "sgd":
            sgd(
                values,
                gradients,
                [*first] if first else [None for _ in values],
                fused=True,
                lr=config.learning_rate,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )
            return
        adamw(
            values,
            gradients,
            first,
            [self.second[i][:count] for i in which],
            [],
            [self.steps[i] for i in which],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            eps=1e-8,
            maximize=False,
        )


def _shifts(stacks: Sequence[LayerStack], jobs: Sequence[Job]) -> list[Tensor]:
    """Return the jobs' corrections, a tensor a factor, as the factors lie in the stacks.

    stacks: by path, as the numbers of a correction are. Padding has no correction and stays zero.
    """
    found = [torch.zeros_like(stack.all(name)) for stack in stacks for name in stack.trained]
    for k, job in enumerate(jobs):
        segments = segments_of(job.start, job.rule.trained)
        row, start = job.correction, 0
        expected = sum(segment.size for segment in segments)
        if row is None or row.shape != (expected,):
            shape = None if row is None else row.shape
            raise ShapeMismatchError(
                f"train_group, client {job.client_id!r}: expected a correction of ({expected},), "
                f"found {shape}"
            )
        for into, segment in zip(found, segments, strict=True):
            values = np.array(row[start : start + segment.size]).reshape(segment.shape)
            start += segment.size
            values = values if segment.factor == "A" else values.T
            into[k, : len(values)] = torch.from_numpy(np.ascontiguousarray(values)).to(into.device)
    return found


def settings_of(config: TrainConfig) -> tuple[str, float, float, float]:
    """Return what neighbours must have alike to be stepped by one kernel."""
    return config.optimizer, config.learning_rate, config.weight_decay, config.momentum


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def _clip(gradients: list[Tensor], limits: Tensor) -> None:
    """Scale each client's gradients to its limit, as `torch.nn.utils.clip_grad_norm_` does."""
    squares = [gradient.flatten(1).square().sum(1) for gradient in gradients]
    norms = torch.stack(squares).sum(0).sqrt()
    scales = (limits / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient *= scales.view(-1, 1, 1)
