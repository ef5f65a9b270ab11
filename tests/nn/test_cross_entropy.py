"""A frozen head's cross-entropy in chunks, against all logits at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.adapter import LoraConfig
from fedlora.nn import get_task, inject_lora, outputs
from fedlora.nn.cross_entropy import head_cross_entropy
from fedlora.nn.llama import Llama, LlamaConfig


def head(features: int = 8, vocabulary: int = 13, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(features, vocabulary, bias=bias).requires_grad_(False)


def plain(hidden: Tensor, layer: nn.Linear, targets: Tensor) -> Tensor:
    """The slow twin."""
    return F.cross_entropy(layer(hidden).float(), targets, reduction="none")


@pytest.mark.parametrize("count", [0, 1, 7, 20])
@pytest.mark.parametrize("chunk_logits", [1, 40, 1 << 20])
@pytest.mark.parametrize("bias", [False, True])
def test_nats_and_gradient_equal_those_of_all_logits(
    count: int, chunk_logits: int, bias: bool
) -> None:
    layer = head(bias=bias)
    hidden = (4 * torch.randn(count, 8)).requires_grad_()
    targets, weights = torch.randint(0, 13, (count,)), torch.rand(count)
    found = head_cross_entropy(hidden, layer, targets, chunk_logits)
    expected = plain(hidden, layer, targets)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    (mine,) = torch.autograd.grad((found * weights).sum(), hidden)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), hidden)
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


def test_gradient_is_that_of_finite_differences_in_float64() -> None:
    layer = head(bias=True).double()
    hidden = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 13, (5,))
    assert torch.autograd.gradcheck(lambda h: head_cross_entropy(h, layer, targets, 30), hidden)


def test_improbable_target_stays_finite() -> None:
    layer = head()
    hidden = (1e4 * torch.ones(2, 8)).requires_grad_()
    targets = layer(hidden).argmin(1)
    nats = head_cross_entropy(hidden, layer, targets)
    torch.testing.assert_close(nats, plain(hidden, layer, targets))
    nats.sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_nothing_is_kept_where_no_gradient_is_asked_for() -> None:
    layer, targets = head(), torch.tensor([1, 2])
    assert not head_cross_entropy(torch.randn(2, 8), layer, targets).requires_grad
    with torch.no_grad():
        hidden = torch.randn(2, 8, requires_grad=True)
        assert not head_cross_entropy(hidden, layer, targets).requires_grad


def test_bfloat16_head_gives_float32_nats_within_its_rounding() -> None:
    layer = head(64).bfloat16()
    hidden = torch.randn(6, 64).bfloat16().requires_grad_()
    targets = torch.randint(0, 13, (6,))
    nats = head_cross_entropy(hidden, layer, targets)
    assert nats.dtype == torch.float32
    # The logits are rounded to 8 bits alike on both sides; the gradient once more, 2^-8 of it.
    torch.testing.assert_close(nats, plain(hidden, layer, targets), atol=1e-6, rtol=1e-6)
    (mine,) = torch.autograd.grad(nats.sum(), hidden)
    (theirs,) = torch.autograd.grad(plain(hidden, layer, targets).sum(), hidden)
    torch.testing.assert_close(mine, theirs, atol=1e-2, rtol=1e-2)


def own() -> nn.Module:
    return Llama(LlamaConfig(50, 32, 2, 2, 1, 64)).eval()


def hugging_face() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def scaled_logits() -> nn.Module:
    config = transformers.CohereConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, logit_scale=0.5, pad_token_id=0,
    )  # fmt: skip
    return transformers.CohereForCausalLM(config).eval()


@pytest.mark.parametrize("make", [own, hugging_face, scaled_logits])
@pytest.mark.parametrize("adapts_head", [False, True])
def test_language_models_have_the_loss_of_their_logits(make: object, adapts_head: bool) -> None:
    torch.manual_seed(0)
    model = make()  # type: ignore[operator]
    names = ("q_proj", "lm_head") if adapts_head else ("q_proj",)
    inject_lora(model, LoraConfig(rank=2, lora_alpha=4, target_modules=names))
    ids = np.array([[3, 4, 5, 6], [7, 8, 0, 0]])
    targets = np.array([[4, 5, 6, 1], [8, 1, -100, -100]])
    batch = {"inputs": ids, "targets": targets}
    out = model(torch.from_numpy(ids))
    logits = (out if isinstance(out, Tensor) else out.logits).flatten(0, 1)
    expected = F.cross_entropy(logits, torch.from_numpy(targets).flatten(), ignore_index=-100)
    task = get_task("next-token")
    assert task.losses is not None
    for found in (task.loss(model, batch), task.losses(model, [batch])[0]):
        # Sums in another order, of losses of up to 30 nats.
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_model_that_scales_its_logits_is_not_taken_apart() -> None:
    ids = torch.tensor([[3, 4]])
    assert outputs._is_divided(hugging_face(), ids)
    assert not outputs._is_divided(scaled_logits(), ids)
