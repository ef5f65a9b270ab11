"""What each person gets: base, own, global and personal adapters on one client's data.

base      no adapter
own       trained alone from zero, for as many steps as the client took in all
global    what the federation made
personal  the global adapter, trained on by the client; whole, and served alone
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

from torch import nn

from fedlora.adapter import Adapter
from fedlora.data import ClientData, draw_batches
from fedlora.errors import NonFiniteError
from fedlora.evaluation import (
    Trial,
    evaluate,
    evaluate_many,
)
from fedlora.experiment import ExperimentConfig
from fedlora.nn import Task, load_adapter_into, train_local
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
    federated_steps: int,
) -> Person:
    """Train the own and the personal adapter of one client, and evaluate all four.

    model: with `initial`'s layers injected. initial: A₀ and zero B. shared: the global adapter.
    federated_steps: optimizer steps that the client took in the rounds; own takes them too.
    """
    train = _personal_training(config)
    steps = config.personalization.steps
    own = train_adapter(
        model, data, task, initial, replace(train, local_steps=federated_steps + steps),
        seed=config.seed, phase="own",
    )  # fmt: skip
    personal = train_adapter(model, data, task, shared, train, seed=config.seed, phase="personal")
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
    together: bool = True,
) -> list[Person | NonFiniteError]:
    """Return what `compare_adapters` returns for each client up to rounding, or its error.

    people: each client's data, with the optimizer steps that it took in the rounds. Their adapters
    are all in memory at once. together: whether a pass may hold several clients; where the model or
    the task cannot be batched (`fedlora.nn.cohort.why_alone`), none does.

    A client whose training diverges has `NonFiniteError`, as alone, and changes no other.
    """
    train = _personal_training(config)
    jobs = []
    for data, steps in people:
        longer = replace(train, local_steps=steps + config.personalization.steps)
        jobs.append(_job(data, initial, longer, config.seed, "own"))
        jobs.append(_job(data, shared, train, config.seed, "personal"))
    together = together and not must_train_alone(model, jobs, task)
    if together:
        adapters = _trained_together(model, jobs, task, config.engine.precision)
    else:
        adapters = _trained_alone(model, jobs, task, config)
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
) -> Adapter:
    """Train from `start` on the client's own examples and return the whole adapter.

    Batches are keyed by (seed, client, phase). A client without training examples keeps `start`.
    """
    load_adapter_into(model, start)
    batches = draw_batches(data.train, config, seed, data.client_id, phase)
    return train_local(model, batches, config, task=task, seed=seed).adapter


def _personal_training(config: ExperimentConfig) -> TrainConfig:
    own, federated = config.personalization, config.federation.train
    return replace(
        federated,
        local_steps=own.steps,
        local_epochs=None,
        learning_rate=(federated.learning_rate if own.learning_rate is None else own.learning_rate),
        batch_size=federated.batch_size if own.batch_size is None else own.batch_size,
    )
