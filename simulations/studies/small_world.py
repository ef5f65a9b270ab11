"""A base of three linear layers and ten people who nearly agree: rounds that cost no time.

Everyone's labels come from one teacher; each person's inputs are shifted, one label in twenty is
wrong, and people have 24 to 96 training examples.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.data import ClientData, Examples
from fedlora.experiment import ExperimentConfig
from fedlora.randomness import rng

FEATURES, CLASSES, PEOPLE, TESTED = 16, 4, 10, 100


class Mlp(nn.Module):
    """(b, 16) features to 4 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 32)
        self.second = nn.Linear(32, 32)
        self.classifier = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(F.gelu(self.second(F.gelu(self.first(x)))))
        return out


def base() -> nn.Module:
    """Return the frozen network: random weights, drawn once."""
    torch.manual_seed(0)
    return Mlp().eval()


def data() -> dict[str, ClientData]:
    """Return the ten people by id."""
    return {f"p{number}": _person(number) for number in range(PEOPLE)}


def experiment(**overrides: object) -> ExperimentConfig:
    """Return the experiment; keys of `ExperimentConfig.from_table`, `__` for a dot."""
    table = {
        "name": "small-world",
        "base": {"id": f"{__name__}:base"},
        "data": {"id": f"{__name__}:data", "task": "classification"},
        "lora": {"rank": 4, "lora_alpha": 8, "target_modules": ["first", "second", "classifier"]},
        "federation": {
            "rounds": 20, "cohort": PEOPLE, "local_steps": 4, "batch_size": 16,
            "learning_rate": 5e-3,
        },
    }  # fmt: skip
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return ExperimentConfig.from_table(table, dotted)


def _person(number: int) -> ClientData:
    teacher = rng(0, "teacher").normal(size=(FEATURES, CLASSES))
    generator = rng(0, "person", number)
    train = 24 + 8 * number
    count = train + TESTED
    inputs = generator.normal(size=(count, FEATURES)) + 0.3 * generator.normal(size=FEATURES)
    targets = np.argmax(inputs @ teacher, axis=1)
    wrong = generator.random(count) < 0.05
    targets = np.where(wrong, generator.integers(0, CLASSES, count), targets)
    examples = Examples(inputs.astype(np.float32), targets.astype(np.int64))
    parts = range(train), range(0), range(train, count)
    return ClientData(f"p{number}", *(examples.take(list(part)) for part in parts))
