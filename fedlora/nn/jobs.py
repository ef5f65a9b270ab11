"""What one client's training is in a cohort, what it gave, and who goes through the base together.

A group is formed by what its jobs say of themselves and by nothing of the machine, so that results
are the same everywhere. `fedlora.nn.cohort` trains it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from fedlora.adapter import Adapter, Array, LoraLayer
from fedlora.data import Examples, draw_batches
from fedlora.errors import FedloraError
from fedlora.nn.rows import Batch, packs_texts
from fedlora.training import Factor, LocalRule, TrainConfig, TrainResult

__all__ = [
    "Job",
    "Trained",
    "client_job",
    "group_jobs",
    "outlined_job",
    "trained_factors",
    "usual_positions",
]

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
            for name in trained_factors(self.job):
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


def trained_factors(job: Job) -> list[Factor]:
    """Return the names of the factors that a job trains, in the order of a row."""
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
