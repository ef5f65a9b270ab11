"""Bases come back frozen, in float32, with a card that a server can read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedlora.adapter import LoraConfig
from fedlora.bases import BaseCard, base_path, load_card, write_card
from fedlora.data import collate, load_data
from fedlora.errors import ConfigError, DigestMismatchError, FormatError
from fedlora.nn import (
    base_fingerprint,
    extract_adapter,
    inject_lora,
    layer_specs,
    load_base,
    train_local,
)
from fedlora.targets import initial_adapter
from fedlora.training import TrainConfig


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("id", ["tiny-chat", "watch-cnn"])
def test_a_bundled_base_is_what_its_card_says(id: str) -> None:
    base = load_base(id)
    assert base_fingerprint(base.model) == base.card.fingerprint
    assert layer_specs(base.model) == dict(base.card.layers)
    assert sum(p.numel() for p in base.model.parameters()) == base.card.parameters
    assert not base.model.training
    for parameter in base.model.parameters():
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad


def test_damaged_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "watch-cnn"
    shutil.copytree(base_path("watch-cnn"), copy)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    monkeypatch.setattr("fedlora.nn.load.base_path", lambda id: copy)
    with pytest.raises(DigestMismatchError, match=r"model\.safetensors: expected SHA-256"):
        load_base("watch-cnn")


def test_a_hugging_face_folder_gives_the_same_base_as_the_bundled_files(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base_path("tiny-chat"), folder)
    theirs, ours = load_base(str(folder)), load_base("tiny-chat")
    assert theirs.card.fingerprint == ours.card.fingerprint
    assert theirs.card.layers == ours.card.layers
    assert theirs.card.task == "next-token"
    assert load_card(str(folder)) == theirs.card
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        # Two implementations of one architecture: sums are taken in another order.
        assert torch.allclose(theirs.model(ids).logits, ours.model(ids), atol=2e-4)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json: expected the config\.json of a Hugging"):
        load_base(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(FormatError, match="cannot be loaded as a next-token model"):
        load_base(str(tmp_path))


FUNCTIONS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).half()

def text():
    return nn.Embedding(5, 2), "tokenizer.json"

def number():
    return 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "their_models.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return "their_models"


def test_a_function_gives_a_base_and_its_card_is_kept(module: str) -> None:
    base = load_base(f"{module}:net")
    assert base.tokenizer is None
    assert not base.model.training
    assert next(base.model.parameters()).dtype == torch.float32
    card = load_card(f"{module}:net")
    assert card == base.card
    assert list(card.layers) == ["0", "2"]
    assert load_base(f"{module}:text").tokenizer == "tokenizer.json"


def test_a_server_draws_the_adapter_that_a_client_has(module: str) -> None:
    base = load_base(f"{module}:net")
    config = LoraConfig(rank=2, target_modules=("0",))
    inject_lora(base.model, config, seed=3, base=base.card.fingerprint)
    card = load_card(f"{module}:net")
    assert initial_adapter(card.layers, config, 3, card.fingerprint) == extract_adapter(base.model)


def test_a_function_has_to_return_a_module(module: str) -> None:
    with pytest.raises(ConfigError, match=r"to return an nn\.Module, .* found int"):
        load_base(f"{module}:number")


def test_a_new_head_is_zero_and_its_card_is_kept() -> None:
    base = load_base("tiny-chat", num_classes=5)
    assert base.card.task == "classification"
    assert not base.card.layers["zero_head"].is_output
    assert base.card.layers["zero_head"].out_features == 5
    assert not any(path.startswith("lm_head") for path in base.card.layers)
    assert load_card("tiny-chat", 5) == base.card
    assert base.card.fingerprint != load_base("tiny-chat").card.fingerprint
    with torch.no_grad():
        assert base.model(torch.ones(2, 3, dtype=torch.int64)).tolist() == [[0.0] * 5] * 2


def test_the_new_head_does_not_see_padding() -> None:
    model = load_base("tiny-chat", num_classes=3).model
    with torch.no_grad():
        model.zero_head.weight.normal_()  # type: ignore[union-attr, operator]
        alone = model(torch.tensor([[0, 9, 8]]))
        padded = model(torch.tensor([[0, 9, 8, 0, 0], [0, 9, 8, 7, 6]]))
    # One row and two are multiplied in blocks of other sizes.
    assert torch.allclose(alone[0], padded[0], atol=1e-5)
    assert not torch.allclose(padded[0], padded[1], atol=1e-2)


def test_lora_of_the_rank_of_the_classes_learns_the_new_head() -> None:
    base = load_base("tiny-chat", num_classes=5)
    inject_lora(base.model, LoraConfig(rank=5, target_modules=("zero_head",)), seed=0)
    data = load_data("chitchat-punctuation", tokenizer=base.tokenizer, clients=1).client_ids
    client = load_data("chitchat-punctuation", tokenizer=base.tokenizer).client(data[0])
    batch = collate(client.train, np.arange(min(32, len(client.train))))
    config = TrainConfig(local_steps=15, learning_rate=0.05)
    result = train_local(base.model, [batch] * 15, config, task="classification")
    # The first loss is that of a zero head, log 5 = 1.609, and the mean over steps is below it.
    assert result.loss < 1.4


@pytest.mark.parametrize(
    ("id", "classes", "text"),
    [
        ("watch-cnn", 3, "num_classes: expected a language model"),
        ("tiny-chat", 1, "expected a whole number >= 2, found 1"),
    ],
)
def test_a_new_head_that_cannot_be_is_refused(id: str, classes: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_base(id, num_classes=classes)


def test_base_has_no_more_than_model_card_and_tokenizer() -> None:
    base = load_base("watch-cnn")
    assert isinstance(base.model, nn.Module)
    assert isinstance(base.card, BaseCard)
    assert base.tokenizer is None


@pytest.mark.slow
def test_smollm2_is_fetched_once_and_then_used_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedlora.nn.fetch import fetch_base

    lines: list[str] = []
    card = fetch_base("smollm2-135m", lines.append)
    assert card.parameters == 134_515_008
    assert len(lines) == 3
    monkeypatch.setenv("PATH", "")
    assert fetch_base("smollm2-135m", lines.append) == card
    assert len(lines) == 4
    base = load_base("smollm2-135m")
    assert base_fingerprint(base.model) == card.fingerprint
    assert base.tokenizer == tmp_path / "home" / "bases" / "smollm2-135m" / "tokenizer.json"


def test_a_wrong_config_beside_the_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "tiny-chat"
    shutil.copytree(base_path("tiny-chat"), copy)
    config = json.loads((copy / "config.json").read_text()) | {"num_hidden_layers": 2}
    (copy / "config.json").write_text(json.dumps(config))
    card = load_card("tiny-chat")
    write_card(
        BaseCard(card.id, card.fingerprint, card.layers, card.parameters, card.task),
        copy / "card.json",
    )
    monkeypatch.setattr("fedlora.nn.load.base_path", lambda id: copy)
    monkeypatch.setattr("fedlora.nn.load.load_card", lambda id: load_card_of(copy))
    with pytest.raises(FormatError, match="not of the same model"):
        load_base("tiny-chat")


def load_card_of(folder: Path) -> BaseCard:
    from fedlora.bases import read_card

    return read_card(folder / "card.json")
