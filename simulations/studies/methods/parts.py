"""What is run: each part is one comparison of methods over grid points.

Each learning rate is tuned on validation parts, for every method and point, with a seed that is not
reported. A part is resumed by running it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fedlora.experiment import ExperimentConfig, find_experiment, read_table
from fedlora.simulation.comparison.plan import Overrides, parse_methods

__all__ = ["AUTHORS", "MIDDLE", "PARTS", "RANKS", "SKEWS", "WATCH", "Part", "map_point"]

Adapter = Literal["global", "personal"]

RANKS = (2, 4, 16)  # below 2, twenty classes are hardly told apart by any method
MIDDLE = 4
SKEWS = ("iid", "dirichlet:0.5", "dirichlet:0.05")
SEEDS, MORE_SEEDS, QUICK_SEEDS = 8, 12, 3  # more where a part is short
TUNING_RUNS = 6  # a method and point: 5 learning rates, and often one more at an edge

WATCH: Mapping[str, Any] = {
    "name": "watch",
    "base": {"id": "simulations.studies.methods.wearers:base"},
    "data": {
        "id": "simulations.studies.methods.wearers:turned",
        "task": "classification",
        "clients": 20,
        "validation_share": 0.15,  # the data bring their own parts; this says that there is one
    },
    "lora": {"rank": MIDDLE, "lora_alpha": 2 * MIDDLE, "target_modules": ["hidden", "classifier"]},
    # Everybody takes part in every round: what is left to differ is how the server aggregates.
    "federation": {
        "rounds": 30, "cohort": 20, "local_steps": 8, "batch_size": 16, "learning_rate": 2e-2,
    },
}  # fmt: skip
AUTHORS: Mapping[str, Any] = {
    **WATCH,
    "name": "authors",
    "base": {"id": "simulations.studies.methods.authors:base"},
    "data": {**WATCH["data"], "id": "simulations.studies.methods.authors:data"},
    "lora": {
        "rank": MIDDLE,
        "lora_alpha": 2 * MIDDLE,
        "target_modules": ["first", "second", "classifier"],
    },
}


@dataclass(frozen=True, slots=True)
class Part:
    """One comparison. Points have names, by which claims speak of them."""

    name: str
    title: str
    experiment: Mapping[str, Any]
    methods: Mapping[str, Overrides]
    points: Mapping[str, Overrides]
    adapter: Adapter = "global"  # whose metric is compared, and tuned on
    seeds: int = SEEDS
    settings: Overrides = field(default_factory=dict)
    quick: tuple[str, ...] = ()  # the points of a quick study; (): the part is left out of it

    @property
    def runs(self) -> int:
        """How many runs the part has, about: tuning may add some."""
        return len(self.methods) * len(self.points) * (TUNING_RUNS + self.seeds)

    def as_quick(self) -> Part:
        """Return the part with few points and seeds."""
        points = {name: self.points[name] for name in self.quick}
        return replace(self, points=points, seeds=QUICK_SEEDS)

    def config(self) -> ExperimentConfig:
        """Return the experiment before the points. Raises `ConfigError`."""
        return ExperimentConfig.from_table(self.experiment)


def map_point(rank: int, skew: str, **more: Any) -> tuple[str, dict[str, Any]]:
    """Return the name and the overrides of a point of the map; `more`: steps, clients.

    >>> map_point(2, "iid", steps=32)[0]
    'rank 2, iid, 32 steps'
    """
    words = [f"rank {rank}", skew]
    # The scaling is 2 at every rank, so that the rank alone changes.
    point: dict[str, Any] = {
        "lora.rank": rank, "lora.lora_alpha": 2 * rank, "data.partition": skew,
    }  # fmt: skip
    if steps := more.pop("steps", None):
        words.append(f"{steps} step" + "s" * (steps > 1))
        point["federation.local_steps"] = steps
        if steps == 1:  # else nothing would be learned, and all were equal for that
            point["federation.rounds"] = 90
    if clients := more.pop("clients", None):
        words.append(f"{clients} clients")
        point |= {"data.clients": clients, "federation.cohort": clients}
    return ", ".join(words), point


def _map(name: str, experiment: Mapping[str, Any]) -> Part:
    points = dict(map_point(rank, skew) for skew in SKEWS for rank in RANKS)
    for skew in (SKEWS[0], SKEWS[-1]):
        points |= dict([map_point(MIDDLE, skew, steps=1), map_point(MIDDLE, skew, steps=32)])
    points |= dict([map_point(MIDDLE, SKEWS[-1], clients=60)])
    return Part(
        f"map-{name}", f"{name}: rank × skew, then local steps and clients", experiment,
        parse_methods("fedit,rolora,flexlora,ffa-lora"), points,
        quick=(map_point(RANKS[0], SKEWS[-1])[0], map_point(MIDDLE, "iid", steps=1)[0]),
    )  # fmt: skip


def _mixed(name: str, experiment: Mapping[str, Any]) -> Part:
    ranks = {"federation.client_ranks": [2, 4, 8, 16]}
    methods = {
        label: {"federation.method": label, "lora.rank": 16, **ranks}
        for label in ("hetlora", "flexlora", "flora")
    }
    # What one does without a method for mixed ranks: the least of them for everybody.
    methods["fedit, rank 2"] = {"federation.method": "fedit", "lora.rank": 2}
    return Part(
        f"mixed-{name}", f"{name}: clients of ranks 2, 4, 8 and 16", experiment, methods,
        {skew: {"data.partition": skew} for skew in SKEWS},
        # rsLoRA, else a client of rank 2 had eight times the scaling of one of rank 16.
        settings={"lora.variant": "rslora", "lora.lora_alpha": 4},
        seeds=MORE_SEEDS,
        quick=(SKEWS[-1],),
    )  # fmt: skip


def _conflicting(function: str, **more: Any) -> dict[str, Any]:
    data = f"simulations.studies.methods.conflict:{function}"
    return {"data.id": data, "data.clients": 10, **more}


_CONFLICT = {
    "labels permuted": _conflicting("labels"),
    "axes flipped": _conflicting("axes"),
    "agreeing": _conflicting("agreeing"),
    "agreeing, dirichlet:0.1": _conflicting("agreeing", **{"data.partition": "dirichlet:0.1"}),
}

PARTS: Mapping[str, Part] = {
    part.name: part
    for part in (
        _map("watch", WATCH),
        _map("authors", AUTHORS),
        _mixed("watch", WATCH),
        _mixed("authors", AUTHORS),
        Part(
            "conflict", "watch: clients who contradict one another, personal adapters", WATCH,
            {
                "fedit": {"federation.method": "fedit"},
                "fedsa-lora": {"federation.method": "fedsa-lora"},
                "ditto 0.1": {"personalization.proximal_weight": 0.1},
                "ditto 1": {"personalization.proximal_weight": 1.0},
                "feddpa": {"personalization.kind": "mixed"},
            },
            _CONFLICT,
            adapter="personal",
            seeds=MORE_SEEDS,
            settings={
                "lora.rank": 4, "lora.lora_alpha": 8, "personalization.steps": 16,
                "federation.rounds": 10, "federation.local_steps": 4, "federation.cohort": 10,
            },
            quick=("labels permuted",),
        ),
        Part(
            "keyboard", "keyboard: next words of 40 people, once for confirmation",
            read_table(find_experiment("keyboard")),
            parse_methods("fedit,rolora,flexlora"),
            {"rank 2": {}},
            seeds=3,
            settings={
                "lora.rank": 2, "lora.lora_alpha": 4, "lora.layers": "last:1", "data.clients": 40,
                "data.max_length": 24, "data.held_out_clients": 0.0, "data.test_share": 0.05,
                "data.validation_share": 0.05, "federation.rounds": 8, "federation.cohort": 8,
                "federation.local_steps": 8, "federation.batch_size": 8, "personalization.cross": 0,
            },
        ),
    )
}  # fmt: skip
