"""A base of linear layers and a few people's data, as "module:function": rounds take no time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.data import ClientData, Examples
from fedlora.experiment import ExperimentConfig
from fedlora.randomness import rng

PEOPLE = 12


class Mlp(nn.Module):
    """(b, 6) features to 3 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.second = nn.Linear(16, 16)
        self.classifier = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(F.gelu(self.second(F.gelu(self.first(x)))))
        return out


class Leaky(Mlp):
    """Subtracts the mean of the batch, whoever is in it."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x - x.mean(0, keepdim=True))
        return out


def base() -> nn.Module:
    torch.manual_seed(0)
    return Mlp().eval()


def leaky_base() -> nn.Module:
    torch.manual_seed(0)
    return Leaky().eval()


def data() -> dict[str, ClientData]:
    """Twelve people with 1 to 12 training examples, and one of them with NaN-making numbers."""
    return {f"c{number:02}": _person(number) for number in range(PEOPLE)}


def extreme_data() -> dict[str, ClientData]:
    """The same, and client c03's features are so large that its training diverges."""
    people = data()
    broken = people["c03"]
    huge = Examples(broken.train.inputs * np.float32(1e30), broken.train.targets)
    return people | {"c03": ClientData("c03", huge, broken.validation, broken.test)}


def _person(number: int) -> ClientData:
    generator = rng(0, "person", number)
    count = 1 + number
    inputs = generator.normal(size=(count + 8, 6)).astype(np.float32)
    targets = (inputs[:, 0] > 0).astype(np.int64) + (inputs[:, number % 6] > 0.5)
    parts = (range(count), range(count, count + 4), range(count + 4, count + 8))
    examples = Examples(inputs, targets)
    return ClientData(f"c{number:02}", *(examples.take(list(part)) for part in parts))


def config(**overrides: object) -> ExperimentConfig:
    """A short federation of these; keys as in `ExperimentConfig.from_table`, `__` for a dot."""
    table = {
        "name": "small",
        "base": {"id": f"{__name__}:base"},
        "data": {"id": f"{__name__}:data", "task": "classification"},
        "lora": {"rank": 2, "lora_alpha": 4, "target_modules": ["first", "second", "classifier"]},
        "federation": {
            "rounds": 3,
            "cohort": 8,
            "local_epochs": 2,
            "batch_size": 4,
            "learning_rate": 0.1,
            "optimizer": "sgd",
        },
    }
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return ExperimentConfig.from_table(table, dotted)
