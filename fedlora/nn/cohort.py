"""Many clients' local training at once: one forward and backward pass for a whole group.

All clients share the frozen base, so that their batches go through it together, client-major, and
each adapted layer adds its clients' own factors (`fedlora.nn.batched`). The loss is a mean per
client and a sum over clients, gradients are clipped per client, and one fused optimizer steps the
stacks of factors. So each client gets what `train_local` would have given it alone, up to the
order in which floating-point numbers are summed.

Clients that take fewer steps than others in their group leave it when they are done: the group is
sorted by steps, and the stacks are narrowed to those that go on.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.adapter import Adapter, Array
from fedlora.errors import ConfigError, FedloraError, NonFiniteError
from fedlora.nn.batched import LayerStack, batched_layers, why_not_batched
from fedlora.nn.inject import (
    findings_of,
    keeping_adapter,
    load_adapter_into,
    lora_modules,
    require_fitting,
)
from fedlora.nn.jobs import (
    Job,
    Trained,
    client_job,
    group_jobs,
    outlined_job,
    trained_factors,
    usual_positions,
)
from fedlora.nn.local import evaluating, train_local
from fedlora.nn.precision import Precision, computing_in
from fedlora.nn.prefix import cached_prefix
from fedlora.nn.probe import find_leak
from fedlora.nn.rows import Batch
from fedlora.nn.stack_optimizer import StackOptimizer, settings_of
from fedlora.nn.tasks import Task
from fedlora.training import not_finite, require_correction

__all__ = [
    "Job",
    "Trained",
    "client_job",
    "group_jobs",
    "must_train_alone",
    "outlined_job",
    "train_alone",
    "train_cohort",
    "train_group",
    "usual_positions",
    "why_alone",
]

_log = logging.getLogger(__name__)
_PROBING = threading.Lock()


def train_cohort(
    model: nn.Module,
    jobs: Sequence[Job],
    task: Task,
    *,
    positions: int | None = None,
    precision: Precision = "fp32",
) -> list[Trained]:
    """Train all jobs, in groups; results come in the order of `jobs`.

    model: with LoRA injected on the layers of the jobs' adapters; its own factors are not used.
    positions: token positions, or samples of features, in one pass; None: `usual_positions`.
    precision: see `fedlora.nn.precision`.

    Where clients cannot share a pass (see `why_alone`), they are trained one at a time, with a
    warning in the log, once a model, that says why. Raises what `train_group` raises.
    """
    given, jobs = jobs, list(jobs)
    results: dict[int, Trained] = {}
    if must_train_alone(model, jobs, task):
        with keeping_adapter(model):
            for index, job in enumerate(jobs):
                results[index] = train_alone(model, job, task, precision=precision)
    else:
        for group in group_jobs(jobs, positions or usual_positions(model, jobs)):
            some = [jobs[index] for index in group]
            trained = train_group(model, some, task, precision=precision)
            results.update(zip(group, trained, strict=True))
    return [replace(results[index], job=job) for index, job in enumerate(given)]


def why_alone(
    model: nn.Module, task: Task, batches: Sequence[Batch] = (), adapter: Adapter | None = None
) -> str | None:
    """Return why clients of this model and task have to be trained one at a time; None if not.

    With a batch of each of two clients and an adapter that fits the model, the model is also probed
    for rows that reach one another (`find_leak`), once for a model and task. Without, only for what
    its layers tell.
    """
    if task.losses is None:
        return f"task {task.name!r} has no `losses`, the loss of each client in a batch of several"
    modules = lora_modules(model)
    if any(module.dropout for module in modules.values()):
        return "lora_dropout draws from torch's one generator, which clients would share"
    reason = why_not_batched(modules)
    if reason is not None or not batches or adapter is None:
        return reason
    findings, key = findings_of(model), ("leak", task)
    # The probe watches torch's one generator, which a second probe in another thread seeds: both
    # would find that the model draws from it. Copies of a model share their findings.
    with _PROBING:
        if key not in findings:
            findings[key] = find_leak(model, task, batches, adapter)
    found: str | None = findings[key]
    return found


def must_train_alone(model: nn.Module, jobs: list[Job], task: Task) -> bool:
    """Whether these jobs cannot share a pass (`why_alone`); the log says why, once a model.

    The first batches are looked at: a job whose batches can be read only once is replaced in `jobs`
    by one that has them all.
    """
    batches = _first_batches(jobs)
    reason = why_alone(model, task, batches, jobs[0].start if jobs else None)
    if reason is None:
        return False
    findings, key = findings_of(model), ("said", reason)
    if key not in findings:
        findings[key] = True
        _log.warning(
            "clients are trained one at a time, with the same results but slower: %s", reason
        )
    return True


def _first_batches(jobs: list[Job]) -> list[Batch]:
    """Return a batch of each of two jobs with rows of one shape, or of as many as there are.

    Batches that can be iterated over only once are put together again, in `jobs`.
    """
    found: list[Batch] = []
    with_steps = [index for index, job in enumerate(jobs) if job.steps]
    alike = [index for index in with_steps if jobs[index].shape == jobs[with_steps[0]].shape]
    for index in alike[:2]:
        batches = iter(jobs[index].batches)
        for batch in islice(batches, 1):
            found.append(batch)
            if batches is jobs[index].batches:
                jobs[index] = replace(jobs[index], batches=chain([batch], batches))
    return found


def train_group(
    model: nn.Module, jobs: Sequence[Job], task: Task, *, precision: Precision = "fp32"
) -> list[Trained]:
    """Train the jobs of one group together; results in their order.

    The jobs' rules train the same factors, all with a correction or none, and rows of features have
    one shape; everything else may differ from job to job. A client whose loss is not finite comes
    back with its `error`.

    Raises `ConfigError` when there is nothing to train, or a job has fewer batches than steps, and
    for an adapter that is not the model's what `load_adapter_into` raises.
    """
    if not jobs:
        return []
    _check(model, jobs)
    order = sorted(range(len(jobs)), key=lambda k: (-jobs[k].steps, settings_of(jobs[k].config), k))
    group = _Group(model, [jobs[index] for index in order], task)
    with computing_in(model, precision):
        results = dict(zip(order, group.train(), strict=True))
    return [results[index] for index in range(len(jobs))]


def train_alone(
    model: nn.Module, job: Job, task: Task, *, precision: Precision = "fp32"
) -> Trained:
    """Train one job by `train_local`; the same result, and any model and task will do."""
    load_adapter_into(model, job.start)
    try:
        result = train_local(
            model,
            job.batches,
            job.config,
            task=task,
            rule=job.rule,
            correction=job.correction,
            num_examples=job.num_examples,
            seed=job.seed,
            precision=precision,
        )
    except NonFiniteError as error:
        return Trained(job, np.zeros(0, np.float32), math.nan, 0, error)
    layers, names = result.adapter.layers.values(), trained_factors(job)
    row = np.concatenate([getattr(layer, name).reshape(-1) for layer in layers for name in names])
    return Trained(job, row, result.loss, result.steps)


def _check(model: nn.Module, jobs: Sequence[Job]) -> None:
    """Refuse what `train_local` and `load_adapter_into` would refuse; one look a start adapter."""
    if not trained_factors(jobs[0]):
        raise ConfigError("train_cohort: the rule trains magnitude only, and the adapter has none")
    for job in jobs:
        if job.rule.trained != jobs[0].rule.trained:
            raise ConfigError(
                f"train_group, client {job.client_id!r}: expected a rule that trains "
                f"{sorted(jobs[0].rule.trained)} as the first client's does, found "
                f"{sorted(job.rule.trained)}; form groups by group_jobs"
            )
        who = f"train_group, client {job.client_id!r}"
        require_correction(who, job.rule, job.config, job.correction)
        if job.rule.correction != jobs[0].rule.correction:
            raise ConfigError(
                f"{who}: expected a rule with correction {jobs[0].rule.correction!r} as the first "
                f"client's, found {job.rule.correction!r}; form groups by group_jobs"
            )
    for start in {id(job.start): job.start for job in jobs}.values():
        require_fitting(model, start, "train_group")


class _Group:
    """The state of one group while it trains; its jobs are sorted by steps, most first."""

    def __init__(self, model: nn.Module, jobs: Sequence[Job], task: Task) -> None:
        self.model, self.jobs, self.task = model, jobs, task
        self.modules = lora_modules(model)
        device = next(iter(self.modules.values())).lora_A.device
        trained = jobs[0].rule.trained
        self.stacks = {
            path: LayerStack([job.start[path] for job in jobs], trained, device)
            for path in sorted(self.modules)
        }
        self.optimizer = StackOptimizer(list(self.stacks.values()), jobs)
        self.losses: list[list[float]] = [[] for _ in jobs]
        self.errors: list[FedloraError | None] = [None] * len(jobs)

    def train(self) -> list[Trained]:
        batches = [iter(job.batches) for job in self.jobs]
        with (
            evaluating(self.model),
            batched_layers(self.modules, self.stacks),
            cached_prefix(self.model, self._measured) as expect,
        ):
            for step in range(max((job.steps for job in self.jobs), default=0)):
                active = sum(job.steps > step for job in self.jobs)
                now = [self._next(batches[k], k, step) for k in range(active)]
                for stack in self.stacks.values():
                    stack.next_step(active)
                expect(now)
                self._step(now, step)
        rows = self._rows()
        return [self._trained(k, row) for k, row in enumerate(rows)]

    def _next(self, batches: Iterator[Batch], k: int, step: int) -> Batch:
        for batch in batches:
            return batch
        raise ConfigError(
            f"train_group, client {self.jobs[k].client_id!r}: expected {self.jobs[k].steps} "
            f"batches, one a step, found {step}"
        )

    def _step(self, batches: list[Batch], step: int) -> None:
        assert self.task.losses is not None  # asked for by `why_alone`
        losses = self.task.losses(self.model, batches)
        if not losses.requires_grad:
            raise ConfigError(
                f"train_cohort: the loss of task {self.task.name!r} does not depend on the "
                f"adapters; does {type(self.model).__name__} read its layers' weights without "
                "calling them?"
            )
        for k, loss in enumerate(losses.detach().tolist()):
            self.losses[k].append(loss)
            if not math.isfinite(loss) and self.errors[k] is None:
                self.errors[k] = not_finite("train_local", loss, step + 1)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step(len(batches))

    def _measured(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Losses and gradients of the first clients on some batches, without a step."""
        assert self.task.losses is not None
        active = len(next(iter(self.stacks.values())).values["A"])
        try:
            for stack in self.stacks.values():
                stack.next_step(len(batches))
            losses = self.task.losses(self.model, batches)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            return [
                losses.detach(),
                *(
                    stack.gradients[name].clone()
                    for stack in self.stacks.values()
                    for name in stack.trained
                    if stack.has_gradient(name)
                ),
            ]
        finally:
            for stack in self.stacks.values():
                stack.next_step(active)

    def _rows(self) -> list[Array]:
        """Every client's factors in one row, of its own rank."""
        pairs = [(stack, name) for stack in self.stacks.values() for name in stack.trained]
        if all(len(set(stack.ranks)) == 1 for stack in self.stacks.values()):
            parts = [stack.as_layers(name).flatten(1) for stack, name in pairs]
            return list(torch.cat(parts, 1).cpu().numpy())
        return [
            np.concatenate([stack.of_client(k, name).reshape(-1) for stack, name in pairs])
            for k in range(len(self.jobs))
        ]

    def _trained(self, k: int, row: Array) -> Trained:
        losses, error = self.losses[k], self.errors[k]
        loss = math.fsum(losses) / len(losses) if losses else math.nan
        if error is None and not np.isfinite(row).all():
            error = NonFiniteError(
                f"train_local, step {len(losses)}: the factors are not finite after it; lower "
                "learning_rate, or set max_grad_norm"
            )
        return Trained(self.jobs[k], row, loss, len(losses), error)
