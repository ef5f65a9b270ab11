"""Write the card of a bundled base from the files in its folder; run it when they change.

python -m simulations.bases.write_card tiny-chat
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import fedlora.bases
from fedlora.bases.card import write_card
from fedlora.data.watch import LABELS
from fedlora.nn.llama import load_llama
from fedlora.nn.load import card_of, load_watch_cnn

__all__ = ["FILES", "write_bundled_card"]

FILES = Path(fedlora.bases.__file__).parent / "files"
CARDS: dict[str, tuple[Callable[[Path], nn.Module], dict[str, Any]]] = {
    "tiny-chat": (
        load_llama,
        {
            "task": "next-token",
            "tokenizer": "tokenizer.json",
            "licence": "MIT",
            "description": "Llama of 2.9 million parameters, trained on English chat messages",
        },
    ),
    "watch-cnn": (
        load_watch_cnn,
        {
            "task": "classification",
            "labels": LABELS,
            "licence": "BSD-3-Clause",
            "description": "1-D CNN that names seven exercises from a smartwatch's six axes",
        },
    ),
}


def write_bundled_card(id: str) -> None:
    """Write card.json beside config.json and the weights, with fingerprint and digests."""
    load, about = CARDS[id]
    folder = FILES / id
    names = ["config.json", "model.safetensors"]
    if tokenizer := about.get("tokenizer"):
        names.append(tokenizer)
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    model = load(folder).float().eval()
    write_card(card_of(model, id, files=digests, **about), folder / "card.json")


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(CARDS):
        write_bundled_card(name)
