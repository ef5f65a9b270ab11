"""The plain-torch Llama against transformers' and against what "causal" and "apart" mean."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call, grad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fedlora.nn.llama import TIED, Llama, LlamaConfig, RMSNorm, load_llama

FULL = LlamaConfig(
    vocab_size=67,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=48,
)
GROUPED = replace(FULL, num_key_value_heads=2, rope_theta=500.0, rms_norm_eps=1e-6)
SHAPES = pytest.mark.parametrize("config", [FULL, GROUPED], ids=["full", "grouped"])


def model_of(config: LlamaConfig) -> Llama:
    torch.manual_seed(0)
    model = Llama(config)
    with torch.no_grad():  # weights of order one: a wrong rotation must not hide in small logits
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.lm_head.weight.mul_(0.3)  # logits of order one too, so that 1e-5 means rounding
    return model.eval()


def ids_of(config: LlamaConfig, batch: int, time: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, config.vocab_size, (batch, time), generator=generator)


def save(model: Llama, folder: Path) -> None:
    state = {name: t for name, t in model.state_dict().items() if name != TIED}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_hugging_face(separator_id=0)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@SHAPES
def test_logits_and_gradient_are_those_of_transformers(config: LlamaConfig, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = model_of(config)
    save(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {n for n, _ in theirs.named_parameters()} == {n for n, _ in ours.named_parameters()}

    ids = ids_of(config, 3, 21)
    a, b = ours(ids), theirs(ids).logits
    # float32 with other orders of summation
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    for logits in (a, b):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    name = "model.layers.0.self_attn.k_proj.weight"
    mine, reference = ours.get_parameter(name).grad, theirs.get_parameter(name).grad
    assert mine is not None
    assert reference.abs().max() > 1e-3
    torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-4)


@SHAPES
def test_a_later_token_changes_nothing_before_it(config: LlamaConfig) -> None:
    model, ids = model_of(config), ids_of(config, 2, 12)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % config.vocab_size
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_rows_do_not_see_one_another() -> None:
    model, ids = model_of(GROUPED), ids_of(GROUPED, 4, 9)
    alone = torch.cat([model(row[None]) for row in ids])
    torch.testing.assert_close(model(ids), alone, atol=1e-5, rtol=1e-5)


def test_segments_of_a_row_are_as_if_alone() -> None:
    model, ids = model_of(GROUPED), ids_of(GROUPED, 1, 11)
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3]])
    parts = [model(ids[:, a:b]) for a, b in ((0, 4), (4, 9), (9, 11))]
    # positions are relative, so that only rounding differs
    torch.testing.assert_close(
        model(ids, segments=segments), torch.cat(parts, 1), atol=1e-4, rtol=1e-4
    )


def test_hidden_states_times_the_embedding_are_the_logits() -> None:
    model, ids = model_of(FULL), ids_of(FULL, 2, 5)
    hidden = model(ids, hidden_only=True)
    assert hidden.shape == (2, 5, FULL.hidden_size)
    assert torch.equal(hidden @ model.model.embed_tokens.weight.T, model(ids))


def test_a_forward_traces_to_a_graph_with_the_same_logits() -> None:
    model, ids = model_of(GROUPED), ids_of(GROUPED, 2, 6)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def forward(state: dict[str, Tensor], tokens: Tensor) -> Tensor:
        logits: Tensor = functional_call(model, state, (tokens,))
        return logits

    graph = make_fx(forward)(weights, ids)
    assert torch.equal(graph(weights, ids), model(ids))


def test_a_training_step_traces_to_a_graph_with_the_same_gradient() -> None:
    model, ids = model_of(GROUPED), ids_of(GROUPED, 2, 6)
    name = "model.layers.0.mlp.up_proj.weight"
    fixed = {n: p.detach() for n, p in model.named_parameters() if n != name}

    def loss(weight: Tensor, tokens: Tensor) -> Tensor:
        logits = functional_call(model, {**fixed, name: weight}, (tokens,))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    weight = model.get_parameter(name).detach()
    graph = make_fx(grad(loss))(weight, ids)
    loss(model.get_parameter(name), ids).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(
        graph(weight, ids), model.get_parameter(name).grad, atol=1e-6, rtol=1e-5
    )


def test_dropout_is_there_in_training_only() -> None:
    model, ids = model_of(replace(FULL, dropout=0.5)), ids_of(FULL, 1, 4)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.allclose(model(ids), model(ids))


def test_half_precision_file_is_loaded_as_float32(tmp_path: Path) -> None:
    model = model_of(FULL).half()
    save(model, tmp_path)
    loaded = load_llama(tmp_path)
    assert loaded.config == FULL
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor, model.state_dict()[name].float())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gemma"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("tie_word_embeddings", False),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("head_dim", 16),
    ],
)
def test_a_config_with_other_arithmetic_is_refused_and_named(key: str, value: object) -> None:
    config = FULL.to_hugging_face(separator_id=0) | {key: value}
    with pytest.raises(ValueError, match=key):
        LlamaConfig.from_hugging_face(config)


def test_a_file_of_another_shape_is_refused_and_named(tmp_path: Path) -> None:
    save(model_of(FULL), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8")) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.input_layernorm\.weight is missing"):
        load_llama(tmp_path)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_size": 36}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_an_impossible_shape_is_refused_and_named(changes: dict[str, float], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        replace(FULL, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 0.05)])
def test_the_norm_beside_frozen_weights_is_the_plain_one(dtype: torch.dtype, close: float) -> None:
    """Autograd's own gradient is the twin; bfloat16 has 8 bits, and values of order 1 are here."""
    norm = RMSNorm(8, 1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2.0, 8))
    found = []
    for frozen in (False, True):
        norm.weight.requires_grad_(not frozen)
        x = torch.linspace(-2.0, 3.0, 48).view(2, 3, 8).to(dtype).requires_grad_()
        y = norm(x)
        (y.float() * torch.linspace(1.0, -1.0, 48).view(2, 3, 8)).sum().backward()
        assert x.grad is not None
        assert (y.dtype, x.grad.dtype) == (dtype, dtype)
        found.append((y.detach().float(), x.grad.float()))
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, atol=close, rtol=0)
