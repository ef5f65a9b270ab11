"""What a base says about itself, so that a server can work without torch and without the weights.

A card is a JSON file beside the weights of a bundled or fetched base, and in the cache for a folder
or a function.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedlora.errors import FormatError
from fedlora.files import write_atomic
from fedlora.targets import LayerSpec

__all__ = ["BaseCard", "read_card", "write_card"]

VERSION = 1
REQUIRED = {"id", "fingerprint", "layers", "parameters", "task"}


@dataclass(frozen=True, slots=True)
class BaseCard:
    """A base's identity and layers.

    fingerprint: SHA-256 of the weights as `fedlora.nn.base_fingerprint` computes it.
    layers: every module that can carry LoRA, by its path.
    tokenizer: name of the tokenizer file in the base's folder; None for other than text.
    files: SHA-256 of each file that is loaded, by its name in the base's folder.
    """

    id: str
    fingerprint: str
    layers: Mapping[str, LayerSpec]
    parameters: int
    task: str
    labels: tuple[str, ...] | None = None
    tokenizer: str | None = None
    licence: str = ""
    description: str = ""
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(sorted(self.layers.items()))))
        object.__setattr__(self, "files", MappingProxyType(dict(sorted(self.files.items()))))


def write_card(card: BaseCard, path: Path) -> None:
    """Write `card` as JSON, atomically, with a layer a line. Raises `RunError`."""
    layers = {name: asdict(spec) for name, spec in card.layers.items()}
    record = {
        "version": VERSION,
        "id": card.id,
        "fingerprint": card.fingerprint,
        "parameters": card.parameters,
        "task": card.task,
        "labels": card.labels,
        "tokenizer": card.tokenizer,
        "licence": card.licence,
        "description": card.description,
        "files": dict(card.files),
    }
    lines = [f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in record.items()]
    rows = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in layers.items())
    lines.append(f'  "layers": {{\n{rows}\n  }}' if rows else '  "layers": {}')
    write_atomic(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def read_card(path: Path) -> BaseCard:
    """Read a card. Raises `FormatError` on anything that is not one, unknown keys included."""
    try:
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict):
            raise FormatError(f"{path}: expected the card of a base, found no JSON object")
        if record.pop("version", None) != VERSION:
            raise FormatError(f"{path}: expected a card of version {VERSION}, found another")
        known = set(BaseCard.__dataclass_fields__)
        if unknown := sorted(record.keys() - known):
            raise FormatError(f"{path}: a card has no key {unknown[0]!r}; known: {sorted(known)}")
        if missing := sorted(REQUIRED - record.keys()):
            raise FormatError(f"{path}: expected the key {missing[0]!r}, found none")
        layers = {name: _spec(value) for name, value in record.pop("layers").items()}
        labels = record.pop("labels", None)
        return BaseCard(layers=layers, labels=None if labels is None else tuple(labels), **record)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError, KeyError) as error:
        raise FormatError(f"{path}: expected the card of a base, found {error}") from error


def _spec(value: dict[str, Any]) -> LayerSpec:
    fields = dict(value)
    return LayerSpec(in_shape=tuple(int(size) for size in fields.pop("in_shape")), **fields)
