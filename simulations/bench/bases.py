"""Bases to measure with, as "module:function": the real shapes, random weights, no download.

What a step costs does not depend on the weights. They are drawn from a fixed seed, so that every
side and every process has the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.nn.llama import Llama, LlamaConfig
from simulations.bench.cases import CLASSES

__all__ = ["Tiny", "minilm", "smollm2", "smollm2_two_layers", "tiny"]

M = TypeVar("M", bound=nn.Module)


class Tiny(nn.Module):
    """A causal transformer of ordinary torch modules: nothing in it knows of federated learning."""

    def __init__(
        self, vocabulary: int = 256, width: int = 64, layers: int = 2, heads: int = 4,
        longest: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(TinyBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, time) int64 to logits (batch, time, vocabulary)."""
        x = self.tokens(input_ids) + self.places.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


class TinyBlock(nn.Module):
    """Causal self-attention and an MLP, each normalized before and added after."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) to the same."""
        normed = self.norm1(x)
        q, k, v = (
            project(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down_proj(F.gelu(self.up_proj(self.norm2(x))))
        return out


def tiny() -> nn.Module:
    """Two blocks of 64 features: here a step is mostly overhead, not arithmetic."""
    return _seeded(Tiny)


def minilm() -> nn.Module:
    """BERT of the shape of all-MiniLM-L6 (6 layers of 384) with a random frozen head."""
    from transformers import BertConfig, BertForSequenceClassification

    shape: dict[str, Any] = {
        "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6,
        "num_attention_heads": 12, "intermediate_size": 1536, "num_labels": CLASSES,
        "attn_implementation": "sdpa",
    }  # fmt: skip
    config = BertConfig(**shape)
    return _seeded(lambda: BertForSequenceClassification(config))


def smollm2() -> nn.Module:
    """SmolLM2-135M's shape: 30 Llama layers of 576 features, 49,152 tokens."""
    return _llama(layers=30)


def smollm2_two_layers() -> nn.Module:
    """The first two layers of that shape, where the head is most of the work."""
    return _llama(layers=2)


def _llama(layers: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, intermediate_size=1536, rope_theta=100_000.0,
    )  # fmt: skip

    def make() -> Llama:
        model = Llama(config)
        # torch's embedding has a standard deviation of 1, which tied logits would multiply up.
        nn.init.normal_(model.model.embed_tokens.weight, std=0.04)
        return model

    return _seeded(make)


def _seeded(make: Callable[[], M]) -> M:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()
