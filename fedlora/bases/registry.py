"""Where bases are: bundled with fedlora, fetched into the cache, a folder, or a user's function."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from fedlora.bases.card import BaseCard, read_card
from fedlora.errors import ConfigError, DigestMismatchError, FormatError, unknown_name
from fedlora.imports import is_function

__all__ = [
    "FETCHABLE",
    "BaseInfo",
    "Fetchable",
    "Kind",
    "base_kind",
    "base_path",
    "cache_home",
    "cached_card_path",
    "list_bases",
    "load_card",
    "tokenizer_file",
    "verify_files",
]

Kind = Literal["bundled", "fetched", "folder", "function"]


@dataclass(frozen=True, slots=True)
class Fetchable:
    """What is known of a base before it is fetched; its card repeats it."""

    task: str
    licence: str
    description: str


FETCHABLE = {
    "minilm": Fetchable(
        "embedding",
        "Apache-2.0",
        "all-MiniLM-L6-v2, an English BERT encoder of sentences (the mean over its tokens); it has "
        "no head: base.num_classes puts one on; 84 MB to download",
    ),
    "smollm2-135m": Fetchable(
        "next-token",
        "Apache-2.0",
        "SmolLM2-135M-Instruct, a Llama language model; 98 MB to download",
    ),
}


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """What `fedlora models list` shows of one base."""

    id: str
    ready: bool  # on this machine
    parameters: int | None  # None before it is fetched
    task: str
    licence: str
    description: str


def list_bases() -> tuple[BaseInfo, ...]:
    """Return the bundled bases and those that can be fetched, by id."""
    found = []
    for name in (*_bundled(), *FETCHABLE):
        if name in FETCHABLE and not _is_fetched(name):
            known = FETCHABLE[name]
            found.append(BaseInfo(name, False, None, known.task, known.licence, known.description))
            continue
        card = load_card(name)
        found.append(
            BaseInfo(name, True, card.parameters, card.task, card.licence, card.description)
        )
    return tuple(sorted(found, key=lambda info: info.id))


def base_kind(id: str) -> Kind:
    """Return what `id` names: a bundled or fetched base, a folder, or "module:function".

    Raises `UnknownNameError`, and `ConfigError` for a base that has to be fetched first.
    """
    if id in _bundled():
        return "bundled"
    if id in FETCHABLE:
        if not _is_fetched(id):
            raise ConfigError(f"base {id!r} is not on this machine: run fedlora models fetch {id}")
        return "fetched"
    if Path(id).is_dir():
        return "folder"
    if is_function(id):
        return "function"
    if "/" in id or os.sep in id:
        raise ConfigError(
            f"base {id!r}: expected a folder with config.json and weights, found none; a model of "
            "the Hugging Face hub has to be downloaded into a folder first"
        )
    raise unknown_name("base", id, (*_bundled(), *FETCHABLE, "module:function"))


def base_path(id: str) -> Path:
    """Return the folder of a bundled or fetched base or a folder's absolute path."""
    kind = base_kind(id)
    if kind == "function":
        raise ConfigError(f"base {id!r} is a function and has no folder")
    if kind == "folder":
        return Path(id).resolve()
    return _files() / id if kind == "bundled" else cache_home() / "bases" / id


def load_card(id: str, num_classes: int | None = None) -> BaseCard:
    """Return the card of a base without torch.

    Bundled and fetched bases have one. For a folder or a function, and for a model with a new
    classification head (`num_classes`), `fedlora.nn.load_base` wrote it into the cache. Raises
    `ConfigError` where it has not, `UnknownNameError` and `FormatError`.
    """
    kind = base_kind(id)
    if num_classes is None and kind in ("bundled", "fetched"):
        return read_card(base_path(id) / "card.json")
    path = cached_card_path(id, num_classes)
    if not path.is_file():
        call = f"{id!r}" if num_classes is None else f"{id!r}, num_classes={num_classes}"
        raise ConfigError(
            f"base {id!r}: no card at {path}; where torch is installed run fedlora.nn.load_base"
            f"({call}) once, and copy that file to this machine if it is another"
        )
    return read_card(path)


def tokenizer_file(id: str) -> Path | None:
    """Return the tokenizer.json of a base, None where it has none."""
    if base_kind(id) == "function":
        return None
    path = base_path(id) / "tokenizer.json"
    return path if path.is_file() else None


def verify_files(card: BaseCard, folder: Path) -> None:
    """Compare the files of a base with their digests in its card.

    Raises `DigestMismatchError`, and `FormatError` for a missing file.
    """
    for name, expected in card.files.items():
        path = folder / name
        if not path.is_file():
            raise FormatError(f"{path}: expected a file of base {card.id!r}, found none")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise DigestMismatchError(
                f"{path}: expected SHA-256 {expected[:12]}, found {found[:12]}; the file is "
                "damaged: install or fetch the base again"
            )


def cache_home() -> Path:
    """Return $FEDLORA_HOME, or fedlora's folder in the platform's cache."""
    if home := os.environ.get("FEDLORA_HOME"):
        return Path(home).expanduser().resolve()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fedlora"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) / "fedlora" if local else Path.home() / "AppData" / "Local" / "fedlora"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedlora"


def cached_card_path(id: str, num_classes: int | None = None) -> Path:
    """Return where the cache keeps the card of a folder, a function or a new head."""
    kind = base_kind(id)
    name = str(Path(id).resolve()) if kind == "folder" else id
    digest = hashlib.sha256(f"{name}\n{num_classes}".encode()).hexdigest()[:16]
    return cache_home() / "cards" / f"{digest}.json"


def _bundled() -> tuple[str, ...]:
    return tuple(sorted(path.parent.name for path in _files().glob("*/card.json")))


def _files() -> Path:
    return Path(str(files("fedlora.bases"))) / "files"


def _is_fetched(name: str) -> bool:
    return (cache_home() / "bases" / name / "card.json").is_file()
