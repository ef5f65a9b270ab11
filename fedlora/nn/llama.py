"""A compact decoder with the Llama architecture, in plain torch.

RMSNorm, rotary positions, SwiGLU, optional grouped-query attention, tied embeddings, and
bias-free `nn.Linear` layers only, so that LoRA can be put on every matrix. Module and parameter
names are those of Hugging Face `LlamaForCausalLM`: the same safetensors file loads in both.

It exists beside transformers because a small base on a small device spends its time in overhead:
here one forward is a few dozen tensor operations, without caches, hooks or data-dependent Python,
and so it also traces under `torch.func` and `make_fx`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Llama", "LlamaConfig", "RMSNorm", "load_llama"]

TIED = "lm_head.weight"  # the same tensor as model.embed_tokens.weight, left out of files


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """Shape of a `Llama`; field names are those of a Hugging Face config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 512  # tokens
    dropout: float = 0.0  # on the embeddings and on what each block adds; only in training mode

    def __post_init__(self) -> None:
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % (2 * heads):
            raise ValueError(
                f"hidden_size is {self.hidden_size}, but rotary positions need an even number of"
                f" features in each of {heads} heads; use a multiple of {2 * heads}."
            )
        if heads % shared:
            raise ValueError(
                f"num_attention_heads is {heads} and num_key_value_heads {shared}: the first must"
                " be a multiple of the second."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}, expected a share in [0, 1).")

    @property
    def head_size(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """Read the dictionary of a Hugging Face config.json.

        Raises ValueError for whatever this decoder does not compute (biases, rope scaling, untied
        embeddings, other activations), since ignoring it would give other logits.
        """
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        heads = config["num_attention_heads"]
        refused = {
            "model_type": config.get("model_type", "llama") != "llama",
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "attention_bias": bool(config.get("attention_bias", False)),
            "mlp_bias": bool(config.get("mlp_bias", False)),
            "tie_word_embeddings": not config.get("tie_word_embeddings", False),
            "rope_parameters": rope.get("rope_type", rope.get("type", "default")) != "default",
            "head_dim": (config.get("head_dim") or config["hidden_size"] // heads) * heads
            != config["hidden_size"],
        }
        if unsupported := [key for key, bad in refused.items() if bad]:
            found = ", ".join(f"{key}={config.get(key)!r}" for key in unsupported)
            raise ValueError(
                f"config.json has {found}; fedlora.nn.llama computes a bias-free, tied Llama with"
                " SiLU and plain rotary positions only. Load this model with transformers."
            )
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            intermediate_size=config["intermediate_size"],
            rope_theta=float(config.get("rope_theta") or rope.get("rope_theta", 10_000.0)),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            max_position_embeddings=config.get("max_position_embeddings", 2048),
        )

    def to_hugging_face(self, separator_id: int) -> dict[str, Any]:
        """The dictionary of a config.json that `AutoModelForCausalLM` reads."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_size,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "bos_token_id": separator_id,
            "eos_token_id": separator_id,
            "dtype": "float16",
        }


class Llama(nn.Module):
    """Next-token logits of a Llama decoder with tied embeddings.

    Rows are independent of one another, and a position sees itself and earlier ones only, so that
    padding on the right needs no mask.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, input_ids: Tensor, hidden_only: bool = False, segments: Tensor | None = None
    ) -> Tensor:
        """(batch, time) int64 to logits (batch, time, vocab_size).

        With `hidden_only` the normalized states (batch, time, hidden_size) that `lm_head` would
        read: a caller that needs few positions saves the rest of the largest product. With
        `segments` (batch, time) int64, a position sees only those of its own number: several texts
        share a row as if each had one to itself, since rotary positions are relative.
        """
        hidden: Tensor = self.model(input_ids, segments)
        if hidden_only:
            return hidden
        logits: Tensor = self.lm_head(hidden)
        return logits

    def step(
        self, input_ids: Tensor, past: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Go on with texts whose earlier positions are known.

        input_ids: (batch, time) int64, the next tokens. past: of each layer the keys and values
        (batch, key_value_heads, past, head_size), past >= 0. Returns the logits (batch,
        vocab_size) of the last position, and the keys and values of all positions so far.
        """
        cache = [_Cached(keys, values) for keys, values in past]
        hidden: Tensor = self.model(input_ids, cache=cache)
        logits: Tensor = self.lm_head(hidden[:, -1])
        return logits, [(layer.keys, layer.values) for layer in cache]


@dataclass(slots=True)
class _Cached:
    """One layer's keys and values (batch, key_value_heads, time, head_size), which grow."""

    keys: Tensor
    values: Tensor

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys = torch.cat((self.keys, keys), 2)
        self.values = torch.cat((self.values, values), 2)
        return self.keys, self.values


class LlamaModel(nn.Module):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        segments: Tensor | None = None,
        cache: Sequence[_Cached] | None = None,
    ) -> Tensor:
        """(batch, time) int64 to (batch, time, hidden_size)."""
        x: Tensor = self.embed_tokens(input_ids)
        x = _dropped(x, self.config.dropout, self.training)
        past = cache[0].keys.shape[2] if cache else 0
        places = _Places.of(input_ids.shape[1], self.config, x, segments, past)
        for i, layer in enumerate(self.layers):
            x = layer(x, places) if cache is None else layer(x, places, cache[i])
        normalized: Tensor = self.norm(x)
        return normalized


@dataclass(frozen=True, slots=True)
class _Places:
    """What every layer needs to know about positions; made once a forward."""

    cosine: Tensor  # (time, head_size)
    sine: Tensor  # (time, head_size); the first half negated, see _rotated
    # (time, past + time) or (batch, 1, time, time): 0 where visible, else -inf
    hidden: Tensor

    @classmethod
    def of(
        cls,
        time: int,
        config: LlamaConfig,
        like: Tensor,
        segments: Tensor | None,
        past: int = 0,
    ) -> _Places:
        """Tables for `time` positions behind `past` ones (RoFormer, arXiv 2104.09864, eq. 34)."""
        size = config.head_size
        halves = torch.arange(0, size, 2, dtype=torch.float32, device=like.device) / size
        steps = torch.arange(past, past + time, dtype=torch.float32, device=like.device)
        angles = torch.outer(steps, 1.0 / config.rope_theta**halves)
        cosine, sine = angles.cos(), angles.sin()
        exact = torch.promote_types(like.dtype, torch.float32)
        hidden = torch.full((time, past + time), float("-inf"), dtype=exact, device=like.device)
        hidden = hidden.triu(past + 1)
        if segments is not None:
            others = segments[:, None, :, None] != segments[:, None, None, :]
            hidden = hidden.expand(len(segments), 1, time, time).masked_fill(others, float("-inf"))
        return cls(
            cosine=torch.cat((cosine, cosine), -1).to(exact),
            sine=torch.cat((-sine, sine), -1).to(exact),
            hidden=hidden,
        )


def _dropped(x: Tensor, share: float, training: bool) -> Tensor:
    """Dropout of whole features of a row, the same at every position (arXiv 1512.05287).

    One random number for `time` values: drawing one a value would cost a tenth of a training step.
    """
    if share == 0.0 or not training:
        return x
    return x * F.dropout(torch.ones_like(x[:, :1]), share, True)


class LlamaLayer(nn.Module):
    """Attention and SwiGLU, each normalized before and added after."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, places: _Places, cached: _Cached | None = None) -> Tensor:
        """(batch, time, hidden_size) to the same."""
        attended = self.self_attn(self.input_layernorm(x), places, cached)
        x = x + _dropped(attended, self.dropout, self.training)
        fed = self.mlp(self.post_attention_layernorm(x))
        return x + _dropped(fed, self.dropout, self.training)


class LlamaAttention(nn.Module):
    """Causal self-attention with rotary positions; key-value heads may be shared.

    Written as two matrix products and a softmax: a forward and backward of this alone took 0.96 to
    1.14 times as long as `scaled_dot_product_attention` (fp32, one thread, 8..32 x 32..64 tokens),
    a whole training step as long within the noise, and it traces to plain operations.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size = config.head_size
        self.heads, self.shared_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = size
        self.q_proj = nn.Linear(config.hidden_size, self.heads * size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.shared_heads * size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.shared_heads * size, bias=False)
        self.o_proj = nn.Linear(self.heads * size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, places: _Places, cached: _Cached | None = None) -> Tensor:
        """(batch, time, hidden_size) to the same; float32 at least between the projections."""
        batch, time, _ = x.shape
        exact = places.hidden.dtype
        q = self._split(self.q_proj(x), self.heads).to(exact)
        k = self._split(self.k_proj(x), self.shared_heads).to(exact)
        v = self._split(self.v_proj(x), self.shared_heads).to(exact)
        q, k = _rotated(q * self.head_size**-0.5, places), _rotated(k, places)
        if cached is not None:
            k, v = cached.extended(k, v)
        if self.shared_heads != self.heads:
            times = self.heads // self.shared_heads
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        weights = (q @ k.transpose(-1, -2) + places.hidden).softmax(-1)
        mixed = (weights @ v).to(x.dtype).transpose(1, 2).reshape(batch, time, -1)
        out: Tensor = self.o_proj(mixed)
        return out

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """(batch, time, heads * head_size) to (batch, heads, time, head_size)."""
        return x.view(x.shape[0], x.shape[1], heads, self.head_size).transpose(1, 2)


def _rotated(x: Tensor, places: _Places) -> Tensor:
    """Feature i is paired with i + head_size / 2, as Hugging Face stores Llama weights."""
    return x * places.cosine + x.roll(x.shape[-1] // 2, -1) * places.sine


class LlamaMLP(nn.Module):
    """SwiGLU (arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, hidden_size) to the same."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class RMSNorm(nn.Module):
    """Divide by the root mean square of the features, then scale (arXiv 1910.07467, eq. 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(…, size) to the same."""
        if torch.is_grad_enabled() and x.requires_grad and not self.weight.requires_grad:
            # While adapters are trained beside frozen weights: a third of the time of autograd's.
            result: Tensor = _frozen_norm(x, self.weight, self.eps)[0]
            return result
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normalized.to(x.dtype) * self.weight


class _FrozenNorm(torch.autograd.Function):
    """`RMSNorm` whose weight has no gradient; of the input only the normalized one is kept.

    Written with `setup_context`, so that `torch.func.grad` and a tracer see through it: what
    backward needs is returned beside the result.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normalized = wide * inverse
        return normalized.to(x.dtype) * weight, normalized, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:], inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        normalized, inverse, weight = ctx.saved_tensors
        wide = gradient.mul(weight).to(normalized.dtype)
        # d x / |x| has nothing along x itself.
        along = torch.linalg.vecdot(wide, normalized).unsqueeze(-1).div_(normalized.shape[-1])
        wide = wide.addcmul_(normalized, along, value=-1).mul_(inverse)
        return wide.to(gradient.dtype), None, None


_frozen_norm: Any = _FrozenNorm.apply


def load_llama(folder: Path) -> Llama:
    """Read `config.json` and `model.safetensors`; weights are upcast to float32, in eval mode.

    Raises ValueError if a tensor is missing, unknown or of another shape.
    """
    config = LlamaConfig.from_hugging_face(json.loads((folder / "config.json").read_text("utf-8")))
    model = Llama(config)
    found = {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}
    found.setdefault(TIED, found.get("model.embed_tokens.weight", torch.empty(0)))
    expected = model.state_dict()
    for name in sorted(expected.keys() | found.keys()):
        want = tuple(expected[name].shape) if name in expected else None
        have = tuple(found[name].shape) if name in found else None
        if want != have:
            raise ValueError(
                f"{folder.name}/model.safetensors: {name} is {have or 'missing'}, config.json asks"
                f" for {want or 'no such tensor'}. The two files are not of the same model."
            )
    model.load_state_dict(found)
    return model.eval()
