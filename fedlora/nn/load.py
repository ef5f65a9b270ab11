"""Load a frozen base: a bundled or fetched one, a Hugging Face folder, or a user's function."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import nn

from fedlora.bases.card import BaseCard, write_card
from fedlora.bases.registry import (
    base_kind,
    base_path,
    cached_card_path,
    load_card,
    tokenizer_file,
    verify_files,
)
from fedlora.errors import ConfigError, FormatError, MissingExtraError
from fedlora.imports import import_function
from fedlora.nn.classifier import Classifier
from fedlora.nn.inject import base_fingerprint, layer_specs
from fedlora.nn.llama import load_llama
from fedlora.nn.watch_cnn import WatchCNN, WatchCNNConfig

__all__ = ["Base", "card_of", "load_base", "load_encoder"]

BaseTask = Literal["next-token", "classification", "embedding"]


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A base that is ready for `inject_lora`: frozen, float32, in eval mode."""

    model: nn.Module
    card: BaseCard
    tokenizer: Any | None  # what `load_data` takes: a Path, or the object a function returned


def load_base(id: str, *, num_classes: int | None = None, task: BaseTask | None = None) -> Base:
    """Load the base called `id`: bundled, fetched, a local Hugging Face folder, "module:function".

    num_classes: put a new head for so many classes on a language model or an encoder, see
    `Classifier`. task: what a Hugging Face folder is loaded for; "classification" keeps the head in
    its weights, "embedding" is a body without one. None: as its config.json says.

    The files of a bundled or fetched base are compared with the digests in its card, the weights
    with its fingerprint when they are not. Nothing is downloaded. For a folder, a function or a new
    head the card is written to the cache, from which `fedlora.bases.load_card` reads it without
    torch. Raises `ConfigError`, `UnknownNameError`, `FormatError`, `DigestMismatchError`.
    """
    kind = base_kind(id)
    if kind in ("bundled", "fetched"):
        base = _from_registry(id)
    elif kind == "folder":
        base = _from_folder(id, task)
    else:
        base = _from_function(id)
    if num_classes is not None:
        model = _ready(Classifier(base.model, num_classes))
        card = card_of(
            model, id, "classification", tokenizer=base.card.tokenizer, licence=base.card.licence,
            description=f"{base.card.description or id}, with a new head for {num_classes} classes",
        )  # fmt: skip
        base = Base(model, card, base.tokenizer)
    if num_classes is not None or kind in ("folder", "function"):
        write_card(base.card, cached_card_path(id, num_classes))
    return base


def card_of(model: nn.Module, id: str, task: str, **more: Any) -> BaseCard:
    """Describe a model; `more` are the card's other fields."""
    return BaseCard(
        id=id,
        fingerprint=base_fingerprint(model),
        layers=layer_specs(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        task=task,
        **more,
    )


def _from_registry(id: str) -> Base:
    card, folder = load_card(id), base_path(id)
    verify_files(card, folder)
    architecture = _json(folder / "config.json").get("model_type")
    model: nn.Module
    if architecture == "watch-cnn":
        model = load_watch_cnn(folder)
    elif architecture == "llama":  # the same numbers as transformers', and a tenth faster
        try:
            model = load_llama(folder)
        except ValueError as error:
            raise FormatError(str(error)) from error
    else:
        model = _transformers(folder, card.task)
    return Base(_ready(model), card, tokenizer_file(id))


def load_watch_cnn(folder: Path) -> WatchCNN:
    """Read config.json and model.safetensors of a `WatchCNN`."""
    config = _json(folder / "config.json")
    config.pop("model_type", None)
    lists = {key: tuple(value) for key, value in config.items() if isinstance(value, list)}
    model = WatchCNN(WatchCNNConfig(**config | lists))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def _from_folder(id: str, task: BaseTask | None) -> Base:
    folder = base_path(id)
    config = _json(folder / "config.json")
    if task is None:
        names = config.get("architectures") or [""]
        task = _task_of(names[0])
    model = _ready(_transformers(folder, task))
    labels = config.get("id2label") if task == "classification" else None
    tokenizer = tokenizer_file(id)
    card = card_of(
        model,
        id,
        task,
        labels=None if labels is None else tuple(labels[key] for key in sorted(labels, key=int)),
        tokenizer=None if tokenizer is None else tokenizer.name,
    )
    return Base(model, card, tokenizer)


def _task_of(architecture: str) -> BaseTask:
    """Return what a folder is for by the class that its config.json names."""
    if architecture.endswith("ForSequenceClassification"):
        return "classification"
    # BertModel, MPNetModel, ...: a body. GPT2LMHeadModel has a head in spite of its name.
    headless = architecture.endswith("Model") and "Head" not in architecture
    return "embedding" if headless else "next-token"


def _from_function(id: str) -> Base:
    made = import_function(id, "base")()
    model, tokenizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"base {id!r}: expected the function to return an nn.Module, or a tuple of one and a "
            f"tokenizer, found {type(model).__name__}"
        )
    task = "classification" if tokenizer is None else "next-token"
    model = _ready(model)
    return Base(model, card_of(model, id, task), tokenizer)


def load_encoder(folder: Path) -> nn.Module:
    """Load a body without a head from a Hugging Face folder, frozen, in float32."""
    return _ready(_transformers(folder, "embedding"))


def _transformers(folder: Path, task: str) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("a base in a Hugging Face folder", "text") from error
    auto = {
        "classification": transformers.AutoModelForSequenceClassification,
        "embedding": transformers.AutoModel,
    }.get(task, transformers.AutoModelForCausalLM)
    try:
        model: nn.Module = auto.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise FormatError(f"{folder}: cannot be loaded as a {task} model: {text}") from error
    model.config.use_cache = False  # type: ignore[union-attr]  # it costs time in training
    return model


def _ready(model: nn.Module) -> nn.Module:
    """Upcast, freeze, switch dropout off."""
    return model.float().eval().requires_grad_(False)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FormatError(
            f"{path}: expected the config.json of a Hugging Face folder, found none"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: expected JSON, found {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
