"""Small models that the tests of fedlora.nn share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    """(b, 6) features to 3 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x).relu()).relu())
        return out


class TiedLm(nn.Module):
    """(b, T) ids to logits over 11; the head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.mix(self.embed(ids)).tanh())
        return out


class Many(nn.Module):
    """(b, 2, 8, 8) to 3 logits: two convolutions, a batch norm, a linear layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.twice = nn.Linear(6, 6)
        self.again = self.twice
        self.classifier = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.depthwise(self.norm(self.conv(x))).mean(2)
        out: Tensor = self.classifier(self.again(self.twice(h)).flatten(1))
        return out


def seeded(model: type[nn.Module]) -> nn.Module:
    """A model in evaluation mode whose weights are the same every time."""
    torch.manual_seed(0)
    return model().eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that a model holds."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )
