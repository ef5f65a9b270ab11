"""A small 1-D CNN that names exercises from a watch's signal: the base watch-cnn."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WatchCNN", "WatchCNNConfig"]


@dataclass(frozen=True, slots=True)
class WatchCNNConfig:
    """Sizes of the network; the defaults are those of the bundled base, 32,887 parameters."""

    axes: int = 6
    channels: tuple[int, ...] = (32, 48, 64)  # multiples of `groups`
    kernels: tuple[int, ...] = (9, 7, 5)
    hidden: int = 64
    classes: int = 7
    groups: int = 8


class WatchCNN(nn.Module):
    """Strided convolutions, a mean over time, two linear layers.

    GroupNorm and not BatchNorm: rows of different clients share a batch in the cohort engine, and a
    row's result must not depend on its neighbours.
    """

    def __init__(self, config: WatchCNNConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or WatchCNNConfig()
        sizes = (config.axes, *config.channels)
        self.convs = nn.ModuleList(
            nn.Conv1d(fan_in, fan_out, kernel, stride=2, padding=kernel // 2)
            for fan_in, fan_out, kernel in zip(sizes, config.channels, config.kernels, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(config.groups, size) for size in config.channels)
        self.hidden = nn.Linear(sizes[-1], config.hidden)
        self.classifier = nn.Linear(config.hidden, config.classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map windows (b, axes, T) float32 to logits (b, classes) float32."""
        values = inputs
        for conv, norm in zip(self.convs, self.norms, strict=True):
            values = F.relu(norm(conv(values)))
        logits: Tensor = self.classifier(F.relu(self.hidden(values.mean(dim=-1))))
        return logits
