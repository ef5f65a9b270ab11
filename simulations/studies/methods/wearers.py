"""The data set "watch" with the base's convolutions already applied: rounds that cost little.

The study adapts the two linear layers of the base watch-cnn alone. What comes in front of them is
the same in every run, a mean over time of the last convolution, so that it is computed once for all
runs: a window is then 64 numbers, and the base is what is left of the network.

With the data as they are the base is right in three of four windows, and at strong skew the best
learning rate of every method was one at which nothing happens. `turned` is what the study uses: the
base then knows little, and all clients share what there is to learn.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.data import ClientData, Examples
from fedlora.data.watch import client_ids, read_client
from fedlora.nn import load_base

__all__ = ["WatchHead", "base", "data", "pooled", "turned"]

_TURN = (-1, -1, 1, -1, -1, 1)  # of the accelerometer's axes, then of the gyroscope's
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.15  # of each recording, its end


class WatchHead(nn.Module):
    """(b, 64) float32, as of `pooled`, to (b, 7) logits: the linear layers of watch-cnn."""

    def __init__(self, hidden: nn.Linear, classifier: nn.Linear) -> None:
        super().__init__()
        self.hidden, self.classifier = hidden, classifier

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.classifier(F.relu(self.hidden(inputs)))
        return out


def base() -> nn.Module:
    """Return the linear layers of the base, frozen."""
    model = load_base("watch-cnn").model
    return WatchHead(model.hidden, model.classifier).eval()  # type: ignore[arg-type]


@cache
def turned() -> dict[str, ClientData]:
    """Return the same, with everybody's watch worn upside down.

    A turn by 180 degrees about the third axis: two axes of each sensor change their sign. Half of
    what the base knows is then of no use, so that there is something to learn that all share.
    """
    return {client: pooled(_upside_down(_read(client))) for client in client_ids("clients")}


@cache
def data() -> dict[str, ClientData]:
    """Return the ten wrists by id, each window as the base's convolutions see it."""
    return {client: pooled(_read(client)) for client in client_ids("clients")}


def pooled(client: ClientData) -> ClientData:
    """Replace windows (n, 6, T) by the (n, 64) float32 that enter the first linear layer."""
    seen: list[Tensor] = []
    model = load_base("watch-cnn").model.eval()
    hidden = model.hidden
    assert isinstance(hidden, nn.Linear)
    hidden.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    parts = []
    for part in (client.train, client.validation, client.test):
        with torch.no_grad():
            model(torch.from_numpy(part.inputs.copy()))
        parts.append(Examples(seen.pop().numpy(), part.targets))
    return ClientData(client.client_id, *parts)


def _upside_down(client: ClientData) -> ClientData:
    parts = (client.train, client.validation, client.test)
    signs = np.array(_TURN, np.float32)[:, None]
    return ClientData(
        client.client_id, *(Examples(part.inputs * signs, part.targets) for part in parts)
    )


def _read(client: str) -> ClientData:
    return read_client(client, TEST_SHARE, VALIDATION_SHARE)
