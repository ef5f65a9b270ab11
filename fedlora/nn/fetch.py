"""Fetch a base that is too large to bundle, and convert it once into a Hugging Face folder."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import torch

from fedlora.bases.card import BaseCard, write_card
from fedlora.bases.fetch import Report, fetch_file, source_of
from fedlora.bases.registry import FETCHABLE, cache_home, load_card
from fedlora.errors import FormatError, MissingExtraError
from fedlora.files import replace_folder
from fedlora.nn.load import card_of

__all__ = ["fetch_base"]


def fetch_base(id: str, report: Report = print, *, again: bool = False) -> BaseCard:
    """Download the base called `id` into the cache unless it is there; return its card.

    Afterwards it is used without a network. `again` fetches it even if it is there. The folder
    appears complete or not at all, and a download that was complete is not repeated. Raises
    `UnknownNameError`, `RunError`, `DigestMismatchError`, `MissingExtraError`.
    """
    source = source_of(id)
    folder = cache_home() / "bases" / id
    if (folder / "card.json").is_file() and not again:
        report(f"{id} is in {folder}")
        return load_card(id)
    _require_extras(id)
    start = time.monotonic()
    weights = fetch_file(source, report)
    report("converting (once)")
    replace_folder(folder, lambda new: _convert(id, weights, new), owned=("*",))
    weights.unlink()
    report(f"{id} is in {folder} after {time.monotonic() - start:.0f} s")
    return load_card(id)


def _convert(id: str, weights: Path, folder: Path) -> None:
    """Write weights (float32), config, tokenizer, chat template and card."""
    import transformers

    from_gguf: dict[str, Any] = {"gguf_file": weights.name, "local_files_only": True}
    try:
        read = transformers.AutoModelForCausalLM.from_pretrained(
            weights.parent, dtype=torch.float32, **from_gguf
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(weights.parent, **from_gguf)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise FormatError(f"{weights}: cannot be read by transformers: {text}") from error
    # A model read from GGUF refuses save_pretrained: its weights go into a fresh one.
    config = transformers.LlamaConfig.from_dict(
        {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    )
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file()]
    card = card_of(
        model,
        id,
        "next-token",
        tokenizer="tokenizer.json",
        licence="Apache-2.0",
        description=FETCHABLE[id],
        files={name: _digest(folder / name) for name in names},
    )
    write_card(card, folder / "card.json")


def _require_extras(id: str) -> None:
    try:
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"fetching {id}", "text") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
