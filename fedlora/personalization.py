"""What each person gets: base, own, global and personal adapters on one client's data.

base      no adapter
own       trained alone from zero, for as many steps as the client took in all
global    what the federation made
personal  the global adapter, trained on by the client; whole, and served alone

Where the global adapter has a part that clients do not train, the personal one is what became of
the other part, stacked with it: trained beside it, as in the rounds. The own one has no such part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

from torch import nn

from fedlora.adapter import Adapter
from fedlora.aggregation import Broadcast
from fedlora.data import ClientData, draw_batches
from fedlora.errors import NonFiniteError
from fedlora.evaluation import (
    Trial,
    evaluate,
    evaluate_many,
)
from fedlora.experiment import ExperimentConfig
from fedlora.nn import Task, beside, load_adapter_into, train_local
from fedlora.nn.cohort import Job, client_job, must_train_alone, train_cohort
from fedlora.nn.precision import Precision
from fedlora.training import TrainConfig

__all__ = ["Person", "compare_adapters", "compare_many", "train_adapter"]

ADAPTERS = ("base", "own", "global", "personal")


@dataclass(frozen=True, slots=True)
class Person:
    """One client's result: `scores` has each adapter's measures on held-out examples."""

    client_id: str
    scores: Mapping[str, Mapping[str, float]]
    own: Adapter
    personal: Adapter


def compare_adapters(
    model: nn.Module,
    data: ClientData,
    task: Task,
    config: ExperimentConfig,
    *,
    initial: Adapter,
    shared: Adapter,
    parts: Broadcast | None = None,
    federated_steps: int,
) -> Person:
    """Train the own and the personal adapter of one client, and evaluate all four.

    model: with `initial`'s layers injected. initial: A₀ and zero B. shared: the whole global
    adapter; parts: the same, divided into what is trained and what stays (None: all is trained).
    federated_steps: optimizer steps that the client took in the rounds; own takes them too.
    """
    parts = parts or Broadcast(shared)
    train = _personal_training(config)
    steps = config.personalization.steps
    own = train_adapter(
        model, data, task, initial, replace(train, local_steps=federated_steps + steps),
        seed=config.seed, phase="own",
    )  # fmt: skip
    personal = train_adapter(
        model, data, task, parts.trainable, train, seed=config.seed, phase="personal",
        frozen=parts.frozen,
    )  # fmt: skip
    adapters = {"base": initial, "own": own, "global": shared, "personal": personal}
    scores = {
        name: evaluate(model, adapter, data.test, task, f"client {data.client_id!r}, {name}")
        for name, adapter in adapters.items()
    }
    return Person(data.client_id, scores, own, personal)


def compare_many(
    model: nn.Module,
    people: Sequence[tuple[ClientData, int]],
    task: Task,
    config: ExperimentConfig,
    *,
    initial: Adapter,
    shared: Adapter,
    parts: Broadcast | None = None,
    together: bool = True,
) -> list[Person | NonFiniteError]:
    """Return what `compare_adapters` returns for each client up to rounding, or its error.

    people: each client's data, with the optimizer steps that it took in the rounds. Their adapters
    are all in memory at once. together: whether a pass may hold several clients; where the model or
    the task cannot be batched (`fedlora.nn.cohort.why_alone`), none does.

    A client whose training diverges has `NonFiniteError`, as alone, and changes no other.
    """
    train, parts = _personal_training(config), parts or Broadcast(shared)
    jobs = []
    for data, steps in people:
        longer = replace(train, local_steps=steps + config.personalization.steps)
        jobs.append(_job(data, initial, longer, config.seed, "own"))
        jobs.append(_job(data, parts.trainable, train, config.seed, "personal"))
    together = together and not must_train_alone(model, jobs, task)
    adapters = _trained(model, jobs, task, config, frozen=parts.frozen, together=together)
    found: list[Person | NonFiniteError] = []
    trials = []
    for k, (data, _) in enumerate(people):
        own, personal = adapters[2 * k], adapters[2 * k + 1]
        if isinstance(own, NonFiniteError):
            found.append(own)
        elif isinstance(personal, NonFiniteError):
            found.append(personal)
        else:
            found.append(Person(data.client_id, {}, own, personal))
            trials += [
                Trial(adapter, data.test, f"client {data.client_id!r}, {name}")
                for name, adapter in zip(ADAPTERS, (initial, own, shared, personal), strict=True)
            ]
    scores = iter(evaluate_many(model, trials, task, together=together))
    return [
        person if isinstance(person, NonFiniteError) else _with_scores(person, islice(scores, 4))
        for person in found
    ]


def _with_scores(
    person: Person, scores: Iterable[dict[str, float] | NonFiniteError]
) -> Person | NonFiniteError:
    values = {}
    for name, score in zip(ADAPTERS, scores, strict=True):
        if isinstance(score, NonFiniteError):
            return score
        values[name] = score
    return replace(person, scores=values)


def _job(data: ClientData, start: Adapter, config: TrainConfig, seed: int, phase: str) -> Job:
    """Return the training of `train_adapter` as a job of a group."""
    return client_job(data.train, data.client_id, start, config, seed=seed, round=phase)


def _trained(
    model: nn.Module,
    jobs: Sequence[Job],
    task: Task,
    config: ExperimentConfig,
    *,
    frozen: Adapter | None,
    together: bool,
) -> list[Adapter | NonFiniteError]:
    """Train the jobs, own and personal in turn; the personal ones beside `frozen`, which they get.

    Without it, both share their passes.
    """

    def trained(some: Sequence[Job]) -> list[Adapter | NonFiniteError]:
        if together:
            return _trained_together(model, some, task, config.engine.precision)
        return _trained_alone(model, some, task, config)

    if frozen is None:
        return trained(jobs)
    found = trained(jobs[::2])
    with beside(model, frozen):
        personal = trained(jobs[1::2])
    whole = [p if isinstance(p, NonFiniteError) else Broadcast(p, frozen).whole for p in personal]
    return [adapter for pair in zip(found, whole, strict=True) for adapter in pair]


def _trained_together(
    model: nn.Module, jobs: Sequence[Job], task: Task, precision: Precision
) -> list[Adapter | NonFiniteError]:
    results = train_cohort(model, jobs, task, precision=precision)
    return [_adapter_or_error(result.adapter) for result in results]


def _trained_alone(
    model: nn.Module, jobs: Sequence[Job], task: Task, config: ExperimentConfig
) -> list[Adapter | NonFiniteError]:
    def alone(job: Job) -> Adapter:
        load_adapter_into(model, job.start)
        seed, precision = config.seed, config.engine.precision
        return train_local(
            model, job.batches, job.config, task=task, seed=seed, precision=precision
        ).adapter

    return [_adapter_or_error(partial(alone, job)) for job in jobs]


def _adapter_or_error(adapter: Callable[[], Adapter]) -> Adapter | NonFiniteError:
    try:
        return adapter()
    except NonFiniteError as error:
        return error


def train_adapter(
    model: nn.Module,
    data: ClientData,
    task: Task,
    start: Adapter,
    config: TrainConfig,
    *,
    seed: int,
    phase: str,
    frozen: Adapter | None = None,
) -> Adapter:
    """Train from `start` on the client's own examples and return the whole adapter.

    frozen: an adapter beside which it is trained, and which is part of the result. Batches are
    keyed by (seed, client, phase). A client without training examples keeps `start`.
    """
    load_adapter_into(model, start)
    batches = draw_batches(data.train, config, seed, data.client_id, phase)
    with beside(model, frozen):
        trained = train_local(model, batches, config, task=task, seed=seed).adapter
    return Broadcast(trained, frozen).whole


def _personal_training(config: ExperimentConfig) -> TrainConfig:
    own, federated = config.personalization, config.federation.train
    return replace(
        federated,
        local_steps=own.steps,
        local_epochs=None,
        learning_rate=(federated.learning_rate if own.learning_rate is None else own.learning_rate),
        batch_size=federated.batch_size if own.batch_size is None else own.batch_size,
    )
