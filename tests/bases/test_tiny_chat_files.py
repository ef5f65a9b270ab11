"""The bundled tiny-chat: small, whole, readable here and by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import fedlora
from fedlora.nn.llama import load_llama

tokenizers = pytest.importorskip("tokenizers")
FOLDER = Path(fedlora.__file__).parent / "bases" / "files" / "tiny-chat"
MESSAGES = ["That sounds like a lot of fun!", "what are you up to this weekend?", "lol same"]


def test_the_weights_are_half_precision_and_small_enough_to_bundle() -> None:
    file = FOLDER / "model.safetensors"
    assert file.stat().st_size <= 8_000_000
    tensors = load_file(file)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert all(t.isfinite().all() for t in tensors.values())


def test_transformers_computes_the_same_logits() -> None:
    transformers = pytest.importorskip("transformers")
    ours = load_llama(FOLDER)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    ids = torch.tensor([[0, *tokenizer.encode(MESSAGES[0]).ids, 0]])
    with torch.no_grad():
        # float32 with other orders of summation, at logits of order ten
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-5)


def test_the_tokenizer_keeps_every_text_and_knows_the_separator() -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    assert tokenizer.get_vocab_size() == load_llama(FOLDER).config.vocab_size
    for text in [*MESSAGES, " spaces  and\ttabs ", "日本 😀"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_chat_costs_far_less_than_the_same_words_in_disorder() -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    model = load_llama(FOLDER)

    def nats(text: str) -> float:
        ids = torch.tensor([[0, *tokenizer.encode(text).ids, 0]])
        with torch.no_grad():
            return float(F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="sum"))

    assert nats("what are you up to this weekend?") < 30
    assert nats("weekend? you what this to are up") > 60
