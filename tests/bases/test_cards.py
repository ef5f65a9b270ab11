"""A card survives its file, and nothing else is taken for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.bases import BaseCard, read_card, write_card
from fedlora.errors import FormatError
from fedlora.targets import LayerSpec

CARD = BaseCard(
    id="b",
    fingerprint="f" * 64,
    layers={
        "fc": LayerSpec("linear", (3,), 4, is_output=True, parameters=16),
        "conv": LayerSpec("conv", (2, 5), 4, parameters=44),
    },
    parameters=60,
    task="classification",
    labels=("no", "yes"),
    tokenizer=None,
    licence="MIT",
    description="…",
    files={"model.safetensors": "0" * 64},
)


def test_a_card_survives_its_file(tmp_path: Path) -> None:
    write_card(CARD, tmp_path / "card.json")
    assert read_card(tmp_path / "card.json") == CARD
    assert list(CARD.layers) == ["conv", "fc"]


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"version": 2}, "expected a card of version 1, found another"),
    ({"colour": 1}, "a card has no key 'colour'"),
    ({"fingerprint": None}, "expected the key 'fingerprint', found none"),
    ({"layers": {"fc": {"kind": "linear"}}}, "expected the card of a base, found 'in_shape'"),
    ({"layers": {"fc": 3}}, "expected the card of a base"),
]


@pytest.mark.parametrize(("change", "text"), BROKEN)
def test_a_broken_card_is_refused(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    write_card(CARD, path)
    record = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))
    with pytest.raises(FormatError) as caught:
        read_card(path)
    assert text in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_what_is_no_json_object_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="expected the card of a base, found"):
        read_card(path)
