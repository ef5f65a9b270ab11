"""Transformers' models, built from a config: the same layers as PEFT, and the same training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from fedlora.adapter import LoraConfig
from fedlora.errors import UnsupportedError
from fedlora.nn import (
    Batch,
    base_fingerprint,
    extract_adapter,
    get_task,
    inject_lora,
    layer_specs,
    merge_lora,
    remove_lora,
    train_local,
)
from fedlora.nn.inject import lora_modules
from fedlora.training import TrainConfig

CONFIG = TrainConfig(local_steps=5, learning_rate=1e-2)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return made(transformers.LlamaForCausalLM, config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=23,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return made(transformers.GPT2LMHeadModel, config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        num_labels=3,
    )
    return made(transformers.BertForSequenceClassification, config)


def made(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(config).eval()
    with torch.no_grad():  # away from tiny first weights, whose gradients AdamW magnifies
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str, int, bool]] = {
    "llama": (llama, "next-token", 14, False),
    "gpt2": (gpt2, "next-token", 8, True),
    "bert": (bert, "classification", 13, False),
}
EACH = pytest.mark.parametrize("name", MODELS)


def batches(task: str, count: int = 5) -> list[Batch]:
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        inputs = random.integers(1, 23, (4, 8))
        inputs[1, 5:] = inputs[3, 2:] = 0
        targets = np.where(inputs == 0, -100, random.integers(0, 23, (4, 8)))
        if task == "classification":
            targets = random.integers(0, 3, 4)
        found.append({"inputs": inputs, "targets": targets})
    return found


def peft_loss(model: nn.Module, batch: Batch, task: str) -> torch.Tensor:
    inputs, targets = torch.tensor(batch["inputs"]), torch.tensor(batch["targets"])
    logits = model(inputs, attention_mask=(inputs != 0).long()).logits
    loss: torch.Tensor = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    return loss


# PEFT reads a property that transformers 5 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@EACH
def test_all_linear_are_the_layers_that_peft_chooses(name: str) -> None:
    make, task, count, transposed = MODELS[name]
    ours = make()
    inject_lora(ours, LoraConfig(rank=2))
    theirs = peft.get_peft_model(
        make(),
        peft.LoraConfig(
            r=2,
            target_modules="all-linear",
            fan_in_fan_out=transposed,
            task_type="SEQ_CLS" if task == "classification" else "CAUSAL_LM",
        ),
    )
    chosen = {
        path.removeprefix("base_model.model.")
        for path, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert set(lora_modules(ours)) == chosen
    assert len(chosen) == count


@EACH
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_training_ends_where_pefts_does(name: str, variant: str) -> None:
    make, task, _, transposed = MODELS[name]
    ours, theirs = make(), make()
    inject_lora(ours, LoraConfig(rank=2, lora_alpha=4, variant=variant))
    start = extract_adapter(ours)
    theirs.requires_grad_(False)
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=list(start.layers),
            use_dora=variant == "dora",
            fan_in_fan_out=transposed,
        ),
        theirs,
    )
    theirs.eval()
    modules = {path: theirs.get_submodule(path) for path in start}
    for path, module in modules.items():
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(torch.tensor(start[path].A))
            module.lora_B["default"].weight.copy_(torch.tensor(start[path].B))
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, CONFIG.learning_rate, weight_decay=0.0)
    losses = []
    for batch in batches(task):
        loss = peft_loss(theirs, batch, task)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    result = train_local(ours, batches(task), CONFIG, task=task)
    assert result.loss == pytest.approx(np.mean(losses), abs=1e-6)
    for path, module in modules.items():
        found = result.adapter[path]
        # AdamW's first steps are as large for a tiny gradient, rounding included, as for any other.
        for factor, tensor in (("A", module.lora_A), ("B", module.lora_B)):
            expected = tensor["default"].weight.detach().numpy()
            np.testing.assert_allclose(getattr(found, factor), expected, rtol=0, atol=2e-5)


@EACH
def test_removal_is_bit_equal_and_merging_agrees(name: str) -> None:
    make, task, *_ = MODELS[name]
    model, score = make(), get_task(task).score
    fingerprint = base_fingerprint(model)
    batch = batches(task, 1)[0]
    before = score(model, batch)
    inject_lora(model, LoraConfig(rank=2))
    train_local(model, batches(task), CONFIG, task=task)
    trained = score(model, batch)
    assert trained["nats"] < before["nats"] - 0.1
    merge_lora(model)
    assert score(model, batch)["nats"] == pytest.approx(trained["nats"], rel=1e-5)
    remove_lora(model)
    assert base_fingerprint(model) == fingerprint
    assert score(model, batch) == before


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_tied_head_is_the_output_and_is_not_merged(name: str) -> None:
    model = MODELS[name][0]()
    outputs = [path for path, spec in layer_specs(model).items() if spec.is_output]
    assert outputs == ["lm_head"]
    inject_lora(model, LoraConfig(rank=2, target_modules=("lm_head",)))
    with pytest.raises(UnsupportedError, match="layer 'lm_head': its weight is tied to that of"):
        merge_lora(model)


def test_padding_does_not_change_what_an_encoder_says() -> None:
    model, score = bert(), get_task("classification").score
    short = {"inputs": np.array([[5, 6, 7]]), "targets": np.array([1])}
    padded = {"inputs": np.array([[5, 6, 7, 0, 0]]), "targets": np.array([1])}
    assert score(model, padded) == pytest.approx(score(model, short), rel=1e-5)
