"""A tokenizer and a small federation of text, made once."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from fedlora.bases import tokenizer_file
from fedlora.data import FederatedData, load_data


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_file("tiny-chat")))


@pytest.fixture(scope="session")
def small_text(tokenizer: Tokenizer) -> FederatedData:
    return load_data("chitchat-small", tokenizer=tokenizer, clients=3)
