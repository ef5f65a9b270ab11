"""The watch's network: rows do not mix, and personalization has something to gain."""

from __future__ import annotations

import numpy as np
import torch

from fedlora.adapter import LoraConfig
from fedlora.data import draw_batches, eval_batches, load_data
from fedlora.nn import get_task, inject_lora, load_base, train_local
from fedlora.nn.watch_cnn import WatchCNN
from fedlora.training import TrainConfig

TARGETS = ("conv1", "conv2", "conv3", "hidden", "classifier")


def accuracy(model: torch.nn.Module, client_id: str) -> float:
    task, data = get_task("classification"), load_data("watch")
    sums = [task.score(model, batch) for batch in eval_batches(data.client(client_id).test)]
    return sum(s["correct"] for s in sums) / sum(s["examples"] for s in sums)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    model = WatchCNN().train()
    rows = torch.randn(5, 6, 100)
    with torch.no_grad():
        # Batches of other sizes are summed in another order.
        assert torch.allclose(model(rows)[2:3], model(rows[2:3]), atol=1e-5)


def test_any_length_of_window_is_read() -> None:
    assert WatchCNN()(torch.zeros(2, 6, 33)).shape == (2, 7)


def test_the_base_names_three_quarters_of_unseen_persons_exercises() -> None:
    model = load_base("watch-cnn").model
    scores = [accuracy(model, client) for client in load_data("watch").client_ids]
    assert 0.75 < float(np.mean(scores)) < 0.80


def test_the_base_knows_its_own_persons() -> None:
    model, task = load_base("watch-cnn").model, get_task("classification")
    for client in load_data("watch", group="base").clients():
        score = task.score(model, next(eval_batches(client.test, 1 << 20)))
        assert score["correct"] / score["examples"] > 0.93


def test_a_hundred_steps_on_a_persons_own_data_help_that_person() -> None:
    base, client = load_base("watch-cnn"), load_data("watch").client("2_left")
    before = accuracy(base.model, client.client_id)
    config = TrainConfig(local_steps=100, batch_size=16, learning_rate=3e-3)
    inject_lora(base.model, LoraConfig(rank=4, lora_alpha=8, target_modules=TARGETS), seed=0)
    batches = draw_batches(client.train, config, 0, client.client_id, 1)
    train_local(base.model, batches, config, task="classification")
    assert accuracy(base.model, client.client_id) > before + 0.1
