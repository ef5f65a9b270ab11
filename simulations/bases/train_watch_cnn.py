"""Train the bundled base watch-cnn on half of the persons: under a minute on one thread.

    python -m simulations.bases.train_watch_cnn

Plain supervised training on the train parts of the persons of group "base". Nothing here sees the
persons who are the clients of the data set "watch".
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch.nn import functional as F

import fedlora.bases
from fedlora.bases.card import write_card
from fedlora.data import ClientData, collate, load_data
from fedlora.data.watch import LABELS
from fedlora.files import write_atomic
from fedlora.nn.load import card_of
from fedlora.nn.watch_cnn import WatchCNN
from fedlora.randomness import rng
from simulations.bases.digests import digests

FOLDER = Path(fedlora.bases.__file__).parent / "files" / "watch-cnn"
STEPS = 900
BATCH_SIZE = 64
LEARNING_RATE = 2e-3  # of AdamW at the first step; cosine to zero
WEIGHT_DECAY = 0.01


def main() -> None:
    """Train, evaluate on the same persons' later recordings, and write the folder."""
    torch.set_num_threads(1)
    clients = list(load_data("watch", group="base").clients())
    model = train(clients, seed=0)
    print(f"accuracy on the same persons' test parts: {accuracy(model, clients):.3f}")
    write(model)


def train(clients: list[ClientData], seed: int) -> WatchCNN:
    """Return a network trained on the pooled train parts."""
    torch.manual_seed(seed)
    model = WatchCNN()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    inputs = np.concatenate([client.train.inputs for client in clients])
    targets = np.concatenate([client.train.targets for client in clients])
    generator = rng(seed, "train-watch-cnn")
    for _ in range(STEPS):
        rows = generator.integers(len(inputs), size=BATCH_SIZE)
        logits = model(torch.from_numpy(inputs[rows]))
        loss = F.cross_entropy(logits, torch.from_numpy(targets[rows]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: WatchCNN, clients: list[ClientData]) -> float:
    """Mean over clients of the share of test windows that are named rightly."""
    shares = []
    for client in clients:
        batch = collate(client.test, range(len(client.test)))
        guesses = model(torch.from_numpy(batch["inputs"])).argmax(-1).numpy()
        shares.append(float(np.mean(guesses == batch["targets"])))
    return float(np.mean(shares))


def write(model: WatchCNN) -> None:
    """Write weights, config and card."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_atomic(FOLDER / "model.safetensors", save(model.state_dict()))
    config = {"model_type": "watch-cnn", **vars_of(model)}
    (FOLDER / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    card = card_of(
        model,
        "watch-cnn",
        "classification",
        labels=LABELS,
        licence="BSD-3-Clause",
        description="1-D CNN that names seven exercises from a smartwatch's six axes",
        files=digests(FOLDER, ("config.json", "model.safetensors")),
    )
    write_card(card, FOLDER / "card.json")


def vars_of(model: WatchCNN) -> dict[str, object]:
    """Return the sizes of the network as JSON."""
    config = model.config
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


if __name__ == "__main__":
    main()
