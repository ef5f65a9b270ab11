"""What each person gets: base, own, global and personal adapters on one client's data.

base      no adapter
own       trained alone from zero, for as many steps as the client took in all
global    what the federation made
personal  the global adapter, trained on by the client; whole, and served alone

Where the global adapter has a part that clients do not train, the personal one is what became of
the other part, stacked with it: trained beside it, as in the rounds. The own one has no such part.

Three settings change the personal one. With a `proximal_weight` lambda it is trained as in Ditto
(arXiv:2012.04221, equation 1): lambda / 2 times the squared distance from the global adapter is
added to the loss. There each v_k is kept from round to round, beside a w that still moves; here it
is trained once, from the last w and towards it, so that clients keep nothing between rounds. With
``kind = "mixed"`` it is not served alone but mixed with the global one (`fedlora.mixing`). With
`keep_better` a client for whom what would be served has a higher loss than the global adapter on
its own validation part keeps the global adapter: nobody gets worse, as far as that part tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

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
from fedlora.mixing import evaluate_mixed
from fedlora.nn import Task, beside, load_adapter_into, train_local
from fedlora.nn.cohort import Job, client_job, must_train_alone, train_cohort
from fedlora.nn.precision import Precision
from fedlora.training import LocalRule, TrainConfig

__all__ = ["Person", "compare_adapters", "compare_many", "train_adapter"]

ADAPTERS = ("base", "own", "global", "personal")


@dataclass(frozen=True, slots=True)
class Person:
    """One client's result: `scores` has each adapter's measures on held-out examples."""

    client_id: str
    scores: Mapping[str, Mapping[str, float]]
    own: Adapter
    personal: Adapter
    kept_global: bool = False  # `personal` is the global adapter: see `keep_better`


def compare_adapters(
    model: nn.Module,
    data: ClientData,
    task: Task,
    config: ExperimentConfig,
    *,
    initial: Adapter,
    shared: Adapter,
    parts: Broadcast | None = None,
    start: Adapter | None = None,
    federated_steps: int,
) -> Person:
    """Train the own and the personal adapter of one client, and evaluate all four.

    model: with `initial`'s layers injected. initial: A₀ and zero B. shared: the whole global
    adapter; parts: the same, divided into what is trained and what stays (None: all is trained).
    start: what the personal adapter begins with, where the client has kept factors of its own in
    the rounds; None: what of the global one is trained.
    federated_steps: optimizer steps that the client took in the rounds; own takes them too.
    """
    parts = parts or Broadcast(shared)
    train = config.personal_training
    steps = config.personalization.steps
    own = train_adapter(
        model, data, task, initial, replace(train, local_steps=federated_steps + steps),
        seed=config.seed, phase="own",
    )  # fmt: skip
    personal = train_adapter(
        model, data, task, start or parts.trainable, train, seed=config.seed, phase="personal",
        rule=_personal_rule(config), frozen=parts.frozen,
    )  # fmt: skip
    person = Person(data.client_id, {}, own, personal)
    [person] = _better_kept(model, [data], [person], task, config, shared=shared, together=False)
    adapters = {"base": initial, "own": own, "global": shared}
    scores: dict[str, Mapping[str, float]] = {
        name: evaluate(model, adapter, data.test, task, f"client {data.client_id!r}, {name}")
        for name, adapter in adapters.items()
    }
    [served] = _served(model, [data], [person], "test", task, config, shared=shared, together=False)
    if isinstance(served, NonFiniteError):
        raise served
    return replace(person, scores=scores | {"personal": served})


def compare_many(
    model: nn.Module,
    people: Sequence[tuple[ClientData, int]],
    task: Task,
    config: ExperimentConfig,
    *,
    initial: Adapter,
    shared: Adapter,
    parts: Broadcast | None = None,
    starts: Sequence[Adapter] | None = None,
    together: bool = True,
) -> list[Person | NonFiniteError]:
    """Return what `compare_adapters` returns for each client up to rounding, or its error.

    people: each client's data, with the optimizer steps that it took in the rounds. Their adapters
    are all in memory at once. together: whether a pass may hold several clients; where the model or
    the task cannot be batched (`fedlora.nn.cohort.why_alone`), none does.

    A client whose training diverges has `NonFiniteError`, as alone, and changes no other.
    """
    train, parts = config.personal_training, parts or Broadcast(shared)
    jobs = []
    starts = starts or [parts.trainable] * len(people)
    for (data, steps), start in zip(people, starts, strict=True):
        longer = replace(train, local_steps=steps + config.personalization.steps)
        jobs.append(_job(data, initial, longer, config.seed, "own"))
        rule = _personal_rule(config)
        jobs.append(_job(data, start, train, config.seed, "personal", rule))
    together = together and not must_train_alone(model, jobs, task)
    adapters = _trained(model, jobs, task, config, frozen=parts.frozen, together=together)
    found: list[Person | NonFiniteError] = []
    for k, (data, _) in enumerate(people):
        own, personal = adapters[2 * k], adapters[2 * k + 1]
        if isinstance(own, NonFiniteError):
            found.append(own)
        elif isinstance(personal, NonFiniteError):
            found.append(personal)
        else:
            found.append(Person(data.client_id, {}, own, personal))
    persons = [person for person in found if isinstance(person, Person)]
    clients = [data for (data, _), p in zip(people, found, strict=True) if isinstance(p, Person)]
    persons = _better_kept(model, clients, persons, task, config, shared=shared, together=together)
    trials = [
        Trial(adapter, data.test, f"client {data.client_id!r}, {name}")
        for data, person in zip(clients, persons, strict=True)
        for name, adapter in (("base", initial), ("own", person.own), ("global", shared))
    ]
    alone = evaluate_many(model, trials, task, together=together)
    served = _served(
        model, clients, persons, "test", task, config, shared=shared, together=together
    )
    scored = iter(
        _with_scores(person, (*alone[3 * k : 3 * k + 3], served[k]))
        for k, person in enumerate(persons)
    )
    return [p if isinstance(p, NonFiniteError) else next(scored) for p in found]


def _better_kept(
    model: nn.Module,
    clients: Sequence[ClientData],
    persons: list[Person],
    task: Task,
    config: ExperimentConfig,
    *,
    shared: Adapter,
    together: bool,
) -> list[Person]:
    """With `keep_better`, give the global adapter to whom it serves better in validation.

    A client without validation examples, or with a tie, keeps its personal adapter.
    """
    if not config.personalization.keep_better:
        return persons
    judged = [k for k, data in enumerate(clients) if len(data.validation)]
    some = [clients[k] for k in judged]
    trials = [Trial(shared, data.validation, f"client {data.client_id!r}, global") for data in some]
    before = evaluate_many(model, trials, task, together=together)
    after = _served(
        model, some, [persons[k] for k in judged], "validation", task, config,
        shared=shared, together=together,
    )  # fmt: skip
    result = list(persons)
    for k, first, second in zip(judged, before, after, strict=True):
        if _loss(second) > _loss(first):
            result[k] = replace(persons[k], personal=shared, kept_global=True)
    return result


def _served(
    model: nn.Module,
    clients: Sequence[ClientData],
    persons: Sequence[Person],
    part: Literal["validation", "test"],
    task: Task,
    config: ExperimentConfig,
    *,
    shared: Adapter,
    together: bool,
) -> list[dict[str, float] | NonFiniteError]:
    """Evaluate on a part of each client's data what the person is served."""
    trials = [
        Trial(person.personal, getattr(data, part), f"client {person.client_id!r}, personal")
        for data, person in zip(clients, persons, strict=True)
    ]
    if config.personalization.kind == "personal":
        return evaluate_many(model, trials, task, together=together)

    def mixed(data: ClientData, trial: Trial) -> dict[str, float] | NonFiniteError:
        try:
            return evaluate_mixed(
                model, data, trial, task,
                shared=shared, largest=config.personalization.mixing_weight, seed=config.seed,
                together=together,
            )  # fmt: skip
        except NonFiniteError as error:
            return error

    return [mixed(data, trial) for data, trial in zip(clients, trials, strict=True)]


def _loss(scores: dict[str, float] | NonFiniteError) -> float:
    return math.inf if isinstance(scores, NonFiniteError) else scores["loss"]


def _with_scores(
    person: Person, scores: Sequence[dict[str, float] | NonFiniteError]
) -> Person | NonFiniteError:
    values = {}
    for name, score in zip(ADAPTERS, scores, strict=True):
        if isinstance(score, NonFiniteError):
            return score
        values[name] = score
    return replace(person, scores=values)


def _job(
    data: ClientData,
    start: Adapter,
    config: TrainConfig,
    seed: int,
    phase: str,
    rule: LocalRule = LocalRule(),  # noqa: B008 - frozen
) -> Job:
    """Return the training of `train_adapter` as a job of a group."""
    return client_job(data.train, data.client_id, start, config, seed=seed, round=phase, rule=rule)


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
            model, job.batches, job.config, task=task, rule=job.rule, seed=seed,
            precision=precision,
        ).adapter  # fmt: skip

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
    rule: LocalRule = LocalRule(),  # noqa: B008 - frozen
    frozen: Adapter | None = None,
) -> Adapter:
    """Train from `start` on the client's own examples and return the whole adapter.

    frozen: an adapter beside which it is trained, and which is part of the result. Batches are
    keyed by (seed, client, phase). A client without training examples keeps `start`.
    """
    load_adapter_into(model, start)
    batches = draw_batches(data.train, config, seed, data.client_id, phase)
    with beside(model, frozen):
        trained = train_local(model, batches, config, task=task, rule=rule, seed=seed).adapter
    return Broadcast(trained, frozen).whole


def _personal_rule(config: ExperimentConfig) -> LocalRule:
    """Ditto's pull towards where the training starts, which is the global adapter."""
    return LocalRule(proximal_weight=config.personalization.proximal_weight)
