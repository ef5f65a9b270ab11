"""Fetch a base that is too large to bundle, and put it into a Hugging Face folder once."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedlora.bases.card import BaseCard, write_card
from fedlora.bases.fetch import Report, fetch_files, source_of
from fedlora.bases.registry import FETCHABLE, cache_home, load_card
from fedlora.errors import FormatError, MissingExtraError
from fedlora.files import replace_folder
from fedlora.nn.load import card_of, load_encoder

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
    files = fetch_files(source, report)
    report("converting (once)")
    convert = CONVERTERS[id]
    replace_folder(folder, lambda new: convert(id, files, new), owned=("*",))
    for path in files.values():
        path.unlink()
    report(f"{id} is in {folder} after {time.monotonic() - start:.0f} s")
    return load_card(id)


def _copy_encoder(id: str, files: Mapping[str, Path], folder: Path) -> None:
    """Put the published files of an encoder into `folder` as they are, and write its card."""
    for suffix, path in files.items():
        shutil.copyfile(path, folder / suffix.rpartition("/")[2])
    _write_card(id, load_encoder(folder), folder)


def _convert_gguf(id: str, files: Mapping[str, Path], folder: Path) -> None:
    """Write weights (float32), config, tokenizer, chat template and card."""
    import transformers

    (weights,) = files.values()
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
    _write_card(id, model, folder)


CONVERTERS: dict[str, Callable[[str, Mapping[str, Path], Path], None]] = {
    "minilm": _copy_encoder,
    "smollm2-135m": _convert_gguf,
}


def _write_card(id: str, model: nn.Module, folder: Path) -> None:
    """Describe `model` and the files that are in `folder`."""
    known = FETCHABLE[id]
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file()]
    card = card_of(
        model,
        id,
        known.task,
        tokenizer="tokenizer.json",
        licence=known.licence,
        description=known.description,
        files={name: _digest(folder / name) for name in names},
    )
    write_card(card, folder / "card.json")


def _require_extras(id: str) -> None:
    needed = ["transformers", *(["gguf"] if CONVERTERS[id] is _convert_gguf else [])]
    if any(find_spec(name) is None for name in needed):
        raise MissingExtraError(f"fetching {id}", "text")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
