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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fedlora.adapter import Adapter, Array, LoraLayer
from fedlora.data import Examples, draw_batches
from fedlora.errors import ConfigError, FedloraError, NonFiniteError, ShapeMismatchError
from fedlora.flat import segments_of
from fedlora.nn.batched import LayerStack, batched_layers, why_not_batched
from fedlora.nn.inject import (
    findings_of,
    keeping_adapter,
    load_adapter_into,
    lora_modules,
    require_fitting,
)
from fedlora.nn.local import evaluating, train_local
from fedlora.nn.precision import Precision, computing_in
from fedlora.nn.prefix import cached_prefix
from fedlora.nn.probe import find_leak
from fedlora.nn.tasks import Batch, Task, packs_texts
from fedlora.training import (
    Factor,
    LocalRule,
    TrainConfig,
    TrainResult,
    not_finite,
    require_correction,
)

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

# Positions (rows times their length) in one pass: below the least a step is overhead, above the
# most nothing is gained. Measured on layers of 64 and 384 features, and on a watch's samples, of
# which a hundred are one row.
LEAST_POSITIONS, MOST_POSITIONS, FEATURE_POSITIONS = 512, 2048, 8192


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One client's local training."""

    client_id: str
    start: Adapter  # the whole adapter to begin with
    batches: Iterable[Batch]  # one optimizer step each
    steps: int  # how many batches there are
    config: TrainConfig
    rule: LocalRule = LocalRule()  # noqa: RUF009 - frozen
    positions: int = 1  # rows times length of a batch, for forming groups: a guess will do
    num_examples: int = 0  # that the client has
    shape: tuple[int, ...] = ()  # of one row of features, which a group shares; () for text
    seed: int = 0  # drives dropout, where the client is trained alone
    correction: Array | None = None  # with `rule.correction`: see `train_local`


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What one client's training gave."""

    job: Job
    row: Array  # (n,) the trained factors one after another, by path, A before B before magnitude
    loss: float  # mean over the steps, each before its update; NaN when there was no step
    steps: int
    error: FedloraError | None = None  # its training diverged, which changes no other client

    @property
    def factors(self) -> dict[tuple[str, Factor], Array]:
        """The trained factors by path and name, views of `row`, of the client's own rank."""
        found: dict[tuple[str, Factor], Array] = {}
        start = 0
        for path, layer in self.job.start.layers.items():
            for name in _trained(self.job):
                like: Array = getattr(layer, name)
                found[path, name] = self.row[start : start + like.size].reshape(like.shape)
                start += like.size
        return found

    def adapter(self) -> Adapter:
        """Return the whole adapter. Raises the client's error."""
        if self.error is not None:
            raise self.error
        factors, layers = self.factors, {}
        for path, layer in self.job.start.layers.items():
            A, B = factors.get((path, "A"), layer.A), factors.get((path, "B"), layer.B)
            magnitude = factors.get((path, "magnitude"), layer.magnitude)
            layers[path] = LoraLayer(A, B, layer.scaling, magnitude, layer.kind)
        return replace(self.job.start, layers=layers)

    def result(self) -> TrainResult:
        """Return the same as `train_local` does."""
        return TrainResult(self.adapter(), self.job.num_examples, self.loss, self.steps)


def _trained(job: Job) -> list[Factor]:
    factors: tuple[Factor, ...] = ("A", "B")
    if job.start.config.uses_dora:
        factors = ("A", "B", "magnitude")
    return [name for name in factors if name in job.rule.trained]


def client_job(
    examples: Examples,
    client_id: str,
    start: Adapter,
    config: TrainConfig,
    *,
    seed: int,
    round: int | str,
    rule: LocalRule = LocalRule(),  # noqa: B008 - frozen
) -> Job:
    """Return the training of one client on its examples, in batches keyed by seed and round."""
    job = outlined_job(examples, client_id, start, config, rule=rule)
    return replace(job, batches=draw_batches(examples, config, seed, client_id, round))


def outlined_job(
    examples: Examples,
    client_id: str,
    start: Adapter,
    config: TrainConfig,
    *,
    rule: LocalRule = LocalRule(),  # noqa: B008 - frozen
) -> Job:
    """Return `client_job` without its batches, which is enough for `group_jobs`."""
    rows = min(config.batch_size, len(examples))
    return Job(
        client_id,
        start,
        (),
        config.steps_for(len(examples)),
        config,
        rule,
        positions=max(1, math.ceil(rows * examples.mean_length)),
        num_examples=len(examples),
        shape=() if examples.is_text else examples.inputs.shape[1:],
    )


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


def usual_positions(model: nn.Module, jobs: Sequence[Job]) -> int:
    """Return how many positions a pass of these jobs should hold.

    Nothing but the model and the jobs decides, so that groups are the same on every machine. There
    are at least two groups where that leaves them large enough, for two cores.
    """
    total = sum(job.positions for job in jobs)
    if any(job.shape for job in jobs):
        most = FEATURE_POSITIONS
    elif packs_texts(model):
        most = LEAST_POSITIONS  # a row each, as long as the longest: more of them, more padding
    else:
        most = MOST_POSITIONS
    return min(most, max(LEAST_POSITIONS, total // 2))


def group_jobs(jobs: Sequence[Job], positions: int) -> list[list[int]]:
    """Divide jobs into groups of one pass each; return their indices.

    Padding costs as much as data. So jobs are sorted by length (in classes a quarter apart), then
    by steps, and a group takes as many as fit into `positions`, its widest job's size each.
    """

    def rank(index: int) -> tuple[int, int, int]:
        job = jobs[index]
        return round(math.log(max(job.positions, 1), 1.25)), -job.steps, index

    def same(job: Job) -> tuple[object, ...]:
        return job.rule.trained, job.rule.correction, job.shape

    groups: list[list[int]] = []
    widest = 0
    for index in sorted(range(len(jobs)), key=rank):
        job = jobs[index]
        widest = max(widest, job.positions)
        fits = groups and (len(groups[-1]) + 1) * widest <= positions
        if not fits or same(jobs[groups[-1][0]]) != same(job):
            groups.append([])
            widest = job.positions
        groups[-1].append(index)
    return groups


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
    order = sorted(range(len(jobs)), key=lambda k: (-jobs[k].steps, _settings(jobs[k].config), k))
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
    layers, names = result.adapter.layers.values(), _trained(job)
    row = np.concatenate([getattr(layer, name).reshape(-1) for layer in layers for name in names])
    return Trained(job, row, result.loss, result.steps)


def _check(model: nn.Module, jobs: Sequence[Job]) -> None:
    """Refuse what `train_local` and `load_adapter_into` would refuse; one look a start adapter."""
    if not _trained(jobs[0]):
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
        self.optimizer = _Optimizer(list(self.stacks.values()), jobs)
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


class _Optimizer:
    """Steps the stacks of a group: one fused kernel for each run of clients with equal settings."""

    def __init__(self, stacks: Sequence[LayerStack], jobs: Sequence[Job]) -> None:
        self.factors = [(stack, name) for stack in stacks for name in stack.trained]
        values = [stack.all(name) for stack, name in self.factors]
        keyed = groupby(range(len(jobs)), key=lambda k: _settings(jobs[k].config))
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


def _settings(config: TrainConfig) -> tuple[str, float, float, float]:
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
