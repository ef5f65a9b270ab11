"""What is measured: a base, rows in a batch, where LoRA goes, and lengths.

A case is called ``<base>-b<rows>-<qv|all>[-top<blocks>][-mixed][-bf16]``; any such name will do.
With bf16 the cohort engine computes in bfloat16, and all other sides in float32 as ever.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from fedlora.errors import ConfigError
from fedlora.experiment import ExperimentConfig
from simulations.bench.population import FUNCTION, Shape

__all__ = ["BASES", "CLASSES", "DEFAULT", "Case", "case_named"]

RANK, ALPHA = 8, 16.0
LENGTH = 32  # tokens
CLASSES = 4  # of minilm's random frozen head


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """How a base is measured."""

    id: str
    vocabulary: int
    qv: tuple[str, str]
    attention: tuple[int, int]  # layers, features
    load: dict[int, tuple[int, int]]  # rows of a batch -> clients, optimizer steps of each
    classes: int = 0


BASES = {
    "tiny": BaseSpec(
        "simulations.bench.bases:tiny", 256, ("q_proj", "v_proj"), (2, 64),
        {1: (64, 5), 4: (64, 5), 8: (64, 5)},
    ),
    "tiny-chat": BaseSpec(
        "tiny-chat", 2048, ("q_proj", "v_proj"), (3, 256), {1: (32, 5), 4: (32, 3), 8: (32, 2)}
    ),
    "minilm": BaseSpec(
        "simulations.bench.bases:minilm", 30522, ("query", "value"), (6, 384),
        {1: (32, 4), 4: (32, 2), 8: (32, 1)}, CLASSES,
    ),
    "smollm2x2": BaseSpec(
        "simulations.bench.bases:smollm2_two_layers", 49152, ("q_proj", "v_proj"), (2, 576),
        {1: (16, 2), 4: (8, 2), 8: (8, 1)},
    ),
    "smollm2": BaseSpec(
        "simulations.bench.bases:smollm2", 49152, ("q_proj", "v_proj"), (30, 576),
        {1: (8, 1), 4: (4, 1), 8: (2, 1)},
    ),
}  # fmt: skip

DEFAULT = (
    "tiny-b1-qv", "tiny-b4-qv", "tiny-b8-qv", "tiny-b1-all", "tiny-b4-qv-mixed",
    "tiny-chat-b1-all", "tiny-chat-b8-all",
    "minilm-b1-qv", "minilm-b4-qv", "minilm-b8-qv", "minilm-b4-all", "minilm-b4-qv-mixed",
    "minilm-b1-qv-top2", "minilm-b1-qv-top1", "minilm-b4-qv-top2", "minilm-b4-qv-top1",
    "minilm-b1-qv-bf16", "minilm-b4-qv-bf16",
    "smollm2x2-b1-qv", "smollm2-b1-qv", "smollm2-b4-qv",
)  # fmt: skip
QUICK = ("tiny-b1-qv",)


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison. All sides do this work, a round: clients x steps optimizer steps."""

    name: str
    base: BaseSpec
    rows: int  # of a batch
    linear: str  # qv | all
    top: int | None  # LoRA on that many of the last blocks; None: on all
    mixed: bool
    precision: Literal["fp32", "bf16"]  # of the cohort engine
    clients: int
    steps: int  # optimizer steps of each client in a round

    @property
    def client_steps(self) -> int:
        """Optimizer steps of all clients in a round."""
        return self.clients * self.steps

    @property
    def shape(self) -> Shape:
        """The clients' data."""
        return Shape(
            self.clients, rows=max(8, self.rows), length=LENGTH, mixed=self.mixed,
            vocabulary=self.base.vocabulary, classes=self.base.classes,
        )  # fmt: skip

    def experiment(self, engine: str, rounds: int) -> ExperimentConfig:
        """The same work as an experiment. Raises `ConfigError` for an engine that there is not."""
        lora: dict[str, Any] = {"rank": RANK, "lora_alpha": ALPHA}
        lora["target_modules"] = "all-linear" if self.linear == "all" else list(self.base.qv)
        if self.top is not None:
            lora["layers"] = f"last:{self.top}"
        table = {
            "name": self.name,
            "base": {"id": self.base.id},
            "data": {
                "id": FUNCTION,
                "task": "classification" if self.base.classes else "next-token",
            },
            "lora": lora,
            "federation": {
                "rounds": rounds,
                "cohort": self.clients,
                "local_steps": self.steps,
                "batch_size": self.rows,
                "learning_rate": 1e-3,
            },
            "engine": {
                "kind": engine,
                "precision": self.precision if engine == "cohort" else "fp32",
            },
        }
        return ExperimentConfig.from_table(table)


def case_named(name: str, clients: int | None = None) -> Case:
    """Return the case of that name, with another number of clients if asked.

    Raises `ConfigError` with the form of a name.
    """
    bases = "|".join(sorted(BASES, key=len, reverse=True))
    found = re.fullmatch(rf"({bases})-b([148])-(qv|all)(?:-top(\d))?(-mixed)?(-bf16)?", name)
    if found is None:
        raise ConfigError(
            f"case {name!r}: expected <base>-b<1|4|8>-<qv|all>[-top<blocks>][-mixed][-bf16] with "
            f"a base of {', '.join(BASES)}"
        )
    base, rows, linear, top, mixed, bf16 = found.groups()
    spec = BASES[base]
    usual, steps = spec.load[int(rows)]
    return Case(
        name, spec, int(rows), linear, None if top is None else int(top), bool(mixed),
        "bf16" if bf16 else "fp32", usual if clients is None else clients, steps,
    )  # fmt: skip
