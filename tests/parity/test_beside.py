"""Training beside a frozen adapter, against real PEFT on a base that holds its product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedlora.adapter import Adapter, LoraConfig
from fedlora.nn import beside, get_task, inject_lora
from fedlora.nn.cohort import train_alone, train_group
from fedlora.training import TrainConfig
from tests.parity.test_cohort import (
    MODELS,
    RATES,
    Client,
    jobs_of,
    largest,
    peft_client,
    start_of,
)


def with_product(base: nn.Module, frozen: Adapter) -> nn.Module:
    """Put W + scaling * B @ A, summed in float64, in place of each weight; tied ones are parted."""
    for path, layer in frozen.layers.items():
        module: Any = base.get_submodule(path)
        delta = layer.scaling * torch.tensor(layer.B).double() @ torch.tensor(layer.A).double()
        # Stored as (in, out); a square Conv1D has the shape either way.
        if layer.kind == "embedding" or type(module).__name__ == "Conv1D":
            delta = delta.t()
        module.weight = nn.Parameter((module.weight.double() + delta).float())
    return base


# That the head is tied to the embedding: it stays the base's on both sides.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
# By default all models by SGD, whose tolerance is far narrower, and one by AdamW.
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        pytest.param(
            name, optimizer, marks=() if optimizer == "sgd" or name == "llama" else pytest.mark.slow
        )
        for name in MODELS
        if name != "minilm"
        for optimizer in RATES
    ],
)
def test_clients_beside_a_frozen_adapter_end_where_pefts_do_on_its_sum(
    name: str, optimizer: Any
) -> None:
    make, task, targets = MODELS[name]
    # The same tolerances as without a frozen part. Measured: SGD 3e-8, since the sum is rounded to
    # float32 once more; AdamW 1.6e-5 for Llama and 2e-6 for the others.
    rate, tolerance = RATES[optimizer]
    ours = make()
    inject_lora(ours, LoraConfig(rank=2, target_modules=targets))
    frozen = start_of(Client(rank=12, alpha=24, steps=0, rows=0, width=0), ours, 99).scaled(5.0)
    base = with_product(make(), frozen)
    config = TrainConfig(local_steps=10, learning_rate=rate, optimizer=optimizer)
    jobs = jobs_of(ours, task, config)
    plain = train_group(ours, jobs, get_task(task))
    with beside(ours, frozen):
        together = train_group(ours, jobs, get_task(task))
        alone = [train_alone(ours, job, get_task(task)) for job in jobs[:2]]
    for job, trained, without in zip(jobs, together, plain, strict=True):
        assert largest(trained.factors, peft_client(base, job, task)) <= tolerance
        assert largest(trained.factors, without.factors) > 1e-4  # it does matter
    for one, trained in zip(alone, together, strict=False):
        assert largest(one.factors, trained.factors) <= tolerance
