"""Train the bundled base watch-cnn on half of the persons: under a minute on one thread.

    python -m simulations.bases.train_watch_cnn

Plain supervised training on the train parts of the persons of group "base". Nothing here sees the
persons who are the clients of the data set "watch".
"""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import torch
from safetensors.torch import save
from torch.nn import functional as F

from fedlora.data import ClientData, collate, load_data
from fedlora.files import write_atomic
from fedlora.nn.watch_cnn import WatchCNN
from fedlora.randomness import rng
from simulations.bases.write_card import FILES, write_bundled_card

FOLDER = FILES / "watch-cnn"
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
    write_atomic(FOLDER / "model.safetensors", save(model.state_dict()))
    sizes = asdict(model.config)
    config = json.dumps({"model_type": "watch-cnn", **sizes}, indent=2) + "\n"
    write_atomic(FOLDER / "config.json", config.encode())
    write_bundled_card("watch-cnn")


if __name__ == "__main__":
    main()
