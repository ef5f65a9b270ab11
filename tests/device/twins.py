"""The hand-made bundles' models in torch, with the same weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.adapter import Adapter
from fedlora.nn import inject_lora, load_adapter_into
from tests.device.hand_made import CLASSES, FEATURES, HEADS, HIDDEN, SIZE, SLOPES, WIDTH, HandMade


class Classifier(nn.Module):
    """(batch, 6) features to 3 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(FEATURES, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x).relu())
        return out


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        rows, time, _ = x.shape
        q, k, v = (
            project(x).view(rows, time, HEADS, SIZE).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        distance = torch.arange(time)[:, None] - torch.arange(time)
        scores = q @ k.transpose(2, 3) / math.sqrt(SIZE)
        scores = scores - torch.tensor(SLOPES)[:, None, None] * distance
        scores = scores.masked_fill(distance < 0, -math.inf)
        out: Tensor = self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))
        return out


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = _Attention()


class _Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Block()])


class Language(nn.Module):
    """(batch, time) ids to logits; the head is the embedding's."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.model = _Body()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = x + self.model.layers[0].attention(x)
        out: Tensor = y @ self.embed.weight.T
        return out


def twin(made: HandMade, init: Adapter) -> nn.Module:
    """Return the bundle's model, with `init` on it."""
    text = made.manifest.task == "next-token"
    model: Any = Language(made.manifest.outputs) if text else Classifier()
    model.load_state_dict({name: torch.tensor(w) for name, w in made.weights.items()})
    inject_lora(model.eval(), init.config, base=made.manifest.base)
    load_adapter_into(model, init)
    return model  # type: ignore[no-any-return]


def examples(made: HandMade, steps: int, rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Batches of `rows` rows; texts of 2 to 12 tokens."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(steps):
        if made.manifest.task == "classification":
            inputs: Any = random.normal(size=(rows, FEATURES)).astype(np.float32)
            found.append({"inputs": inputs, "targets": random.integers(0, CLASSES, rows)})
            continue
        lengths = random.integers(2, 13, rows)
        counted = np.arange(lengths.max()) < lengths[:, None]
        shape = counted.shape
        ids, targets = (random.integers(1, made.manifest.outputs, shape) for _ in range(2))
        targets = np.where(counted & (random.random(shape) < 0.8), targets, -100)
        targets[:, 0] = 1
        found.append({"inputs": np.where(counted, ids, 0), "targets": targets})
    return found
