"""A new head on a language model or an encoder: what it reads, and that padding is not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaModel

from fedlora.adapter import LoraConfig
from fedlora.bases import load_card
from fedlora.errors import ConfigError
from fedlora.nn import inject_lora, load_base, train_local
from fedlora.nn.classifier import Classifier
from fedlora.nn.fetch import _copy_encoder
from fedlora.training import TrainConfig

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "home"))


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES)).eval()


def with_random_head(model: nn.Module) -> Classifier:
    classifier = Classifier(model, 3).eval().requires_grad_(False)
    torch.manual_seed(1)
    classifier.zero_head.weight.normal_()
    return classifier


@torch.no_grad()
def test_an_encoder_is_pooled_by_the_mean_over_the_real_tokens() -> None:
    classifier = with_random_head(bert())
    assert classifier.is_encoder
    for row in ([2, 9, 8, 3], [2, 3], [2]):
        ids = torch.tensor([row])
        states = bert()(ids).last_hidden_state[0]
        expected = classifier.zero_head.weight @ sum(states[i] for i in range(len(row))) / len(row)
        for padding in (0, 1, 30):
            padded = nn.functional.pad(ids, (0, padding))
            # Sums of 16 float32 in another order.
            assert torch.allclose(classifier(padded)[0], expected, atol=1e-5)


@torch.no_grad()
def test_rows_of_an_encoder_do_not_see_one_another() -> None:
    classifier = with_random_head(bert())
    together = classifier(torch.tensor([[2, 9, 8, 7, 3], [2, 4, 3, 0, 0], [0, 0, 0, 0, 0]]))
    assert torch.allclose(together[1], classifier(torch.tensor([[2, 4, 3]]))[0], atol=1e-5)
    assert torch.isfinite(together).all()  # a row without tokens is its first place


@torch.no_grad()
def test_a_causal_body_is_read_at_its_last_token() -> None:
    torch.manual_seed(0)
    body = LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()
    classifier = with_random_head(body)
    assert not classifier.is_encoder
    states = body(torch.tensor([[2, 9, 8]])).last_hidden_state[0]
    found = classifier(torch.tensor([[2, 9, 8, 0, 0]]))[0]
    assert torch.allclose(found, classifier.zero_head.weight @ states[2], atol=1e-5)


def test_a_masked_language_model_is_an_encoder_too() -> None:
    classifier = Classifier(BertForMaskedLM(BertConfig(**SIZES)).eval(), 3)
    assert classifier.is_encoder
    assert isinstance(classifier.model, BertModel)


def test_the_pooler_is_left_out_since_the_mean_does_not_read_it() -> None:
    model = bert()
    assert model.pooler is not None
    names = [name for name, _ in Classifier(model, 3).named_parameters()]
    assert not any("pooler" in name for name in names)


class Blind(nn.Module):
    """An encoder that cannot be given a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.embed(ids)
        return states + states.mean(1, keepdim=True)


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Blind()


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Headed(), "Blind looks at all tokens of a row, the padding included"),
        (nn.Linear(2, 2), "expected a language model, whose body is its attribute `model`, or an"),
    ],
)
def test_what_cannot_be_masked_or_has_no_body_is_refused(model: nn.Module, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Classifier(model, 3)
    assert text in str(caught.value)


def encoder_folder(folder: Path, **config: Any) -> Path:
    bert().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_a_folder_with_a_body_alone_is_for_embedding(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "bert")
    base = load_base(str(folder))
    assert base.card.task == "embedding"
    assert type(base.model).__name__ == "BertModel"
    headed = load_base(str(folder), num_classes=4)
    assert headed.card.task == "classification"
    assert "zero_head" in headed.card.layers
    assert load_card(str(folder), 4) == headed.card


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertModel", "embedding"),
        ("BertForSequenceClassification", "classification"),
        ("LlamaForCausalLM", "next-token"),
        ("GPT2LMHeadModel", "next-token"),
        ("", "next-token"),
    ],
)
def test_the_class_in_config_json_says_what_a_folder_is_for(architecture: str, task: str) -> None:
    from fedlora.nn.load import _task_of

    assert _task_of(architecture) == task


def test_lora_on_an_encoder_learns_its_new_head(tmp_path: Path) -> None:
    base = load_base(str(encoder_folder(tmp_path / "bert")), num_classes=3)
    inject_lora(base.model, LoraConfig(rank=3, target_modules=("query", "zero_head")), seed=0)
    ids = torch.tensor([[2, 9, 3, 0], [2, 8, 7, 3], [2, 3, 0, 0]]).numpy()
    batch = {"inputs": ids, "targets": torch.tensor([0, 1, 2]).numpy()}
    config = TrainConfig(local_steps=30, learning_rate=0.05)
    result = train_local(base.model, [batch] * 30, config, task="classification")
    assert result.loss < 0.8  # the mean over steps; a zero head is at log 3 = 1.099


def test_the_published_files_of_an_encoder_are_kept_as_they_are(tmp_path: Path) -> None:
    given = encoder_folder(tmp_path / "given")
    (given / "tokenizer.json").write_text("{}")
    names = ("config.json", "model.safetensors", "tokenizer.json")
    (tmp_path / "new").mkdir()
    _copy_encoder("minilm", {f"/model/{name}": given / name for name in names}, tmp_path / "new")
    from fedlora.bases import read_card

    card = read_card(tmp_path / "new" / "card.json")
    assert sorted(card.files) == sorted(names)
    for name in names:
        assert (tmp_path / "new" / name).read_bytes() == (given / name).read_bytes()
    assert (card.task, card.licence, card.tokenizer) == (
        "embedding",
        "Apache-2.0",
        "tokenizer.json",
    )
    assert card.parameters == sum(p.numel() for p in bert().parameters())


@pytest.mark.slow
def test_minilm_is_fetched_once_and_then_used_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlora.nn import base_fingerprint
    from fedlora.nn.fetch import fetch_base

    lines: list[str] = []
    card = fetch_base("minilm", lines.append)
    assert card.parameters == 22_713_216
    assert len(lines) == 3
    monkeypatch.setenv("PATH", "")
    assert fetch_base("minilm", lines.append) == card
    base = load_base("minilm")
    assert base_fingerprint(base.model) == card.fingerprint
    assert base.tokenizer == tmp_path / "home" / "bases" / "minilm" / "tokenizer.json"
    assert load_base("minilm", num_classes=5).card.task == "classification"
