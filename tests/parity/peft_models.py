"""Small networks with every kind of layer that PEFT and fedlora put LoRA on."""

from __future__ import annotations

import torch
from torch import nn


class Mixed(nn.Module):
    """An embedding, two convolutions, and linear layers in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv1 = nn.Conv1d(6, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, (3, 2))
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8, bias=False)})
            for _ in range(2)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(self.embed(tokens).transpose(1, 2))
        plane = self.conv2(hidden.transpose(1, 2)[:, None])
        hidden = hidden.transpose(1, 2)
        for block in self.layers:
            hidden = hidden + block["down"](torch.tanh(block["up"](hidden)))
        return self.head(hidden) + plane.mean()


class Wrapped(nn.Module):
    """`Mixed` one level down, as the decoder of a language model is."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Mixed()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.model(tokens)
        return out


def mixed(seed: int = 0) -> Wrapped:
    torch.manual_seed(seed)
    return Wrapped().eval()


def tiny_gpt2(seed: int = 0) -> nn.Module:
    """GPT-2 of two blocks of 16 features, whose layers are Hugging Face's Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=13, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model: nn.Module = GPT2LMHeadModel(config).eval()
    return model


def tiny_llama(seed: int = 0) -> nn.Module:
    """Llama of one block of 16 features; its head is not tied to the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, tie_word_embeddings=False,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config).eval()
    return model


TOKENS = torch.tensor([[1, 4, 9, 2, 7, 10, 3], [0, 5, 5, 8, 1, 6, 2]])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(TOKENS)
    result: torch.Tensor = out if isinstance(out, torch.Tensor) else out.logits
    return result
