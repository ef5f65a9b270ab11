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
    channels: tuple[int, int, int] = (32, 48, 64)  # multiples of `groups`
    kernels: tuple[int, int, int] = (9, 7, 5)
    hidden: int = 64
    classes: int = 7
    groups: int = 8
    window: int = 100  # samples of the watch's windows; any other length works as well


class WatchCNN(nn.Module):
    """Three strided convolutions, a mean over time, two linear layers.

    GroupNorm and not BatchNorm: rows of different clients share a batch in the cohort engine, and a
    row's result must not depend on its neighbours.
    """

    def __init__(self, config: WatchCNNConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or WatchCNNConfig()
        self.input_shape = (config.axes, config.window)  # of one example
        first, second, third = config.channels
        self.conv1 = _conv(config.axes, first, config.kernels[0])
        self.conv2 = _conv(first, second, config.kernels[1])
        self.conv3 = _conv(second, third, config.kernels[2])
        self.norm1 = nn.GroupNorm(config.groups, first)
        self.norm2 = nn.GroupNorm(config.groups, second)
        self.norm3 = nn.GroupNorm(config.groups, third)
        self.hidden = nn.Linear(third, config.hidden)
        self.classifier = nn.Linear(config.hidden, config.classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map windows (b, axes, T) float32 to logits (b, classes) float32."""
        values = F.relu(self.norm1(self.conv1(inputs)))
        values = F.relu(self.norm2(self.conv2(values)))
        values = F.relu(self.norm3(self.conv3(values)))
        logits: Tensor = self.classifier(F.relu(self.hidden(values.mean(dim=-1))))
        return logits


def _conv(fan_in: int, fan_out: int, kernel: int) -> nn.Conv1d:
    return nn.Conv1d(fan_in, fan_out, kernel, stride=2, padding=kernel // 2)
