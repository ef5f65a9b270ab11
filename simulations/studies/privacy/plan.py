"""What is run: tasks of virtual users, methods, budgets, and what is searched for each.

Each task has a grid of learning rates, searched without privacy, and one of clipping norms,
searched for each budget. Both searches look at people's validation parts with seeds that are not
reported, and take the mean over them: with noise, one run decides little. They are searches on
private data whose cost is in no budget here: a real run would have to pay for them, or take its
settings from public data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from simulations.studies.methods.parts import WATCH

__all__ = [
    "COHORT", "DELTA", "EPSILONS", "METHODS", "NONE", "TASKS", "TUNING_SEEDS", "Settings", "Task",
    "Trial",
]  # fmt: skip

METHODS = ("fedit", "ffa-lora", "fedsvd", "rolora")
NONE = math.inf  # no privacy: neither clipping nor noise
EPSILONS = (NONE, 8.0, 6.0, 3.0, 1.0, 0.3)
DELTA = 1e-5
COHORT = 100  # expected, by Poisson sampling; the denominator too
TUNING_SEEDS = (1000, 1001, 1002)


@dataclass(frozen=True, slots=True)
class Settings:
    """What is searched for."""

    learning_rate: float
    clipping_norm: float | None = None  # None: not clipped, without privacy


@dataclass(frozen=True, slots=True)
class Trial:
    """One run."""

    stage: Literal["rates", "norms", "final"]
    task: str
    users: int
    method: str
    epsilon: float
    settings: Settings
    seed: int

    @property
    def key(self) -> str:
        """Its name among the rows."""
        s = self.settings
        return (
            f"{self.stage}/{self.task}/{self.users}/{self.method}/{self.epsilon:g}/"
            f"{s.learning_rate:g}/{s.clipping_norm}/{self.seed}"
        )


@dataclass(frozen=True, slots=True)
class Task:
    """A base, people, and what is searched for them."""

    name: str
    about: str
    table: Mapping[str, Any]  # of the experiment
    overrides: Mapping[str, Any]
    rates: Sequence[float]  # of the clients, searched without privacy
    norms: Sequence[float]  # searched with it, at the rate found
    tuned: Sequence[tuple[int, float]]  # (users, epsilon) where norms are searched
    users: Sequence[int] = (1_000, 10_000)
    epsilons: Sequence[float] = EPSILONS
    methods: Sequence[str] = METHODS
    seeds: int = 5
    tuning_seeds: Sequence[int] = TUNING_SEEDS
    people: int | None = None  # who are evaluated; None: everyone once
    cpu_seconds: float = 10.0  # of one run, about: for the expected time

    def as_quick(self) -> Task:
        """Return the task with two methods and budgets, few rounds and one seed."""
        return replace(
            self,
            overrides={
                **self.overrides, "federation.rounds": 4, "federation.cohort": 20,
                "personalization.steps": 2,
            },
            rates=self.rates[:1], norms=self.norms[:1],
            tuned=((1_000, 3.0),), users=(1_000,), epsilons=(NONE, 3.0),
            methods=("fedit", "ffa-lora"), seeds=1, tuning_seeds=TUNING_SEEDS[:1], people=4,
            cpu_seconds=self.cpu_seconds / 10,
        )  # fmt: skip

    def finals(self, users: int, epsilon: float) -> Iterator[tuple[int, str, float, int]]:
        """Yield (users, method, epsilon, seed) of what is reported and was tuned at these.

        Without privacy, 1,000 virtual users and 10,000 are copies of the same people in other
        numbers: it is run with the most alone, as the reference of all.
        """
        budgets = [e for e in self.epsilons if (e == NONE) == (epsilon == NONE)]
        if epsilon != NONE:
            budgets = [e for e in budgets if self.tuning_of(users, e) == (users, epsilon)]
        others = {at for at, _ in self.tuned}
        # Users for whom no norm was searched take that of the nearest.
        sizes = [n for n in self.users if n == users or (n not in others and epsilon != NONE)]
        for seed in range(self.seeds):
            for size in sizes:
                for budget in budgets:
                    for method in self.methods:
                        yield size, method, budget, seed

    def blocks(self) -> Iterator[tuple[int, float]]:
        """Yield (users, epsilon) in the order of the study: a budget, no privacy, the others."""
        first, *others = self.tuned
        yield from (first, (max(self.users), NONE), *others)

    def tuning_of(self, users: int, epsilon: float) -> tuple[int, float]:
        """Return at which (users, epsilon) the norm for these was searched: the nearest."""
        return min(
            self.tuned,
            key=lambda at: (at[0] != users, abs(math.log(at[1] / epsilon))),
        )

    def counts(self) -> tuple[int, int]:
        """Return how many runs the searches and the reported part have."""
        settings = len(self.rates) + len(self.tuned) * len(self.norms)
        reported = sum(1 for block in self.blocks() for _ in self.finals(*block))
        return settings * len(self.tuning_seeds) * len(self.methods), reported


_PRIVATE = {
    "federation.sampling": "poisson", "federation.weights": "equal", "federation.cohort": COHORT,
    "personalization.save": False, "personalization.cross": 0,
}  # fmt: skip

CHITCHAT: Mapping[str, Any] = {
    "name": "chitchat",
    "base": {"id": "simulations.studies.privacy.endings:base"},
    "data": {
        "id": "simulations.studies.privacy.endings:data",
        "task": "classification",
        "validation_share": 0.15,  # the data bring their own parts; this says that there is one
    },
    # The head is nothing but its factors: the rank is to be at least the number of classes.
    "lora": {"rank": 8, "lora_alpha": 16, "target_modules": ["hidden", "classifier"]},
    "federation": {"batch_size": 16},
}

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "watch",
            "Seven exercises from a smartwatch that is worn upside down, so that the base knows "
            "little: its two linear layers are adapted, at rank 4.",
            WATCH,
            {
                **_PRIVATE, "federation.rounds": 40, "federation.local_steps": 4,
                # One rate for everyone's personal training, whatever the method's own is.
                "personalization.steps": 16, "personalization.learning_rate": 2e-2,
            },
            rates=(1e-2, 2e-2, 5e-2, 1e-1),
            norms=(0.3, 1.0, 3.0, 10.0),
            tuned=((1_000, 3.0), (1_000, 1.0), (10_000, 3.0), (1_000, 0.3), (1_000, 8.0)),
            cpu_seconds=5.0,
        ),
        Task(
            "chitchat",
            "How a message ends (. ! ? … or none of them), of 117 people: a frozen layer and a new "
            "head, adapted at rank 8, on what tiny-chat says of the message.",
            CHITCHAT,
            {
                **_PRIVATE, "federation.rounds": 40, "federation.local_steps": 4,
                "personalization.steps": 16, "personalization.learning_rate": 1e-2,
            },
            rates=(1e-2, 2e-2, 5e-2, 1e-1),
            norms=(0.3, 1.0, 3.0, 10.0),
            tuned=((1_000, 3.0), (1_000, 1.0), (10_000, 3.0)),
            epsilons=(NONE, 8.0, 6.0, 3.0, 1.0),
            tuning_seeds=TUNING_SEEDS[:2],
            cpu_seconds=7.0,
        ),
    )
}  # fmt: skip
