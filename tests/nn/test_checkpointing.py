"""Computing blocks twice: the same bits, fewer activations, and only where it can be done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

from fedlora.adapter import Adapter, LoraConfig
from fedlora.errors import ConfigError
from fedlora.experiment import BaseConfig, DataConfig
from fedlora.nn import inject_lora, train_local
from fedlora.nn.checkpointing import checkpoint_blocks
from fedlora.nn.classifier import Classifier
from fedlora.nn.llama import Llama, LlamaConfig
from fedlora.nn.rows import Batch
from fedlora.training import TrainConfig
from fedlora.world import open_world
from tests.nn.models import Mlp, seeded

CONFIG = TrainConfig(local_steps=4, learning_rate=1e-2)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=24,
    )  # fmt: skip
    return Llama(config).eval()


def encoder() -> nn.Module:
    config = BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return Classifier(BertModel(config).eval(), 3).requires_grad_(False)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config).eval()


def opt() -> nn.Module:
    """Its blocks apply dropout themselves, by their own mode."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, ffn_dim=24, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=16, dropout=0.5,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


MODELS = {"llama": llama, "encoder": encoder, "gpt2": gpt2, "opt": opt}


def batch(task: str, seed: int = 0) -> Batch:
    ids = np.random.default_rng(seed).integers(1, 40, (3, 9))
    targets = np.arange(3) if task == "classification" else ids[:, 1:].copy()
    return {"inputs": ids if task == "classification" else ids[:, :-1].copy(), "targets": targets}


def trained(make: Callable[[], nn.Module], dropout: float, checkpointing: bool) -> Adapter:
    model = make()
    task = "classification" if isinstance(model, Classifier) else "next-token"
    inject_lora(model, LoraConfig(rank=3, lora_dropout=dropout), seed=0, base="x")
    if checkpointing:
        assert checkpoint_blocks(model) == 3
    batches = [batch(task, seed) for seed in range(4)]
    return train_local(model, batches, CONFIG, task=task, seed=5).adapter


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_training_gives_the_same_bits(name: str, dropout: float) -> None:
    plain, twice = (trained(MODELS[name], dropout, flag) for flag in (False, True))
    assert any(layer.B.any() for layer in plain.layers.values())
    assert twice == plain


def kept_bytes(model: nn.Module) -> int:
    """Bytes that one forward pass keeps for its backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(1, 40, (8, 32), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out: Any = model(ids)
        loss = (out if isinstance(out, Tensor) else out.logits).square().sum()
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("name", MODELS)
def test_blocks_keep_their_input_only(name: str) -> None:
    model = MODELS[name]()
    inject_lora(model, LoraConfig(rank=2), seed=0, base="x")
    before = kept_bytes(model)
    checkpoint_blocks(model)
    # What is left are the inputs of three blocks, and what the head and the last norm keep.
    assert kept_bytes(model) < 0.4 * before


def test_the_base_stays_in_evaluation_mode() -> None:
    model = opt()
    inject_lora(model, LoraConfig(rank=2), seed=0)
    checkpoint_blocks(model)
    ids = torch.arange(1, 9)[None]
    first, second = model(ids).logits, model(ids).logits
    assert torch.equal(first, second)  # with dropout of one half they would differ
    assert not any(module.training for module in model.modules())


def test_a_copy_is_checkpointed_by_itself_and_twice_is_refused() -> None:
    world = open_world(
        BaseConfig("tiny-chat"),
        DataConfig("chitchat", "next-token", 2),
        LoraConfig(rank=2),
        0,
        True,
    )
    with pytest.raises(ConfigError, match="checkpointed already"):
        checkpoint_blocks(world.model)
    other = world.copy()
    seen: list[nn.Module] = []
    for model in (world.model, other.model):
        layer = model.model.layers[1]  # type: ignore[index, union-attr]
        layer.mlp.register_forward_pre_hook(lambda module, *_: seen.append(module))
        layer_of = layer.mlp
        ids = torch.arange(1, 9)[None]
        loss = model(ids).sum()
        loss.backward()
        assert seen == [layer_of, layer_of]  # its own, in both passes
        seen.clear()


def test_evaluation_computes_once() -> None:
    model = llama()
    checkpoint_blocks(model)
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[index, union-attr]
    with torch.no_grad():
        model(torch.arange(1, 9)[None])
    assert seen == [1]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.checkpointing: .* found Mlp; leave the key"):
        checkpoint_blocks(seeded(Mlp))
