"""Bases by name, folder or function; cards without torch; files checked against their card."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.bases import base_kind, base_path, cache_home, list_bases, load_card, tokenizer_file
from fedlora.bases.registry import cached_card_path, verify_files
from fedlora.errors import ConfigError, DigestMismatchError, FormatError, UnknownNameError


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "home"))


def test_bundled_bases_are_listed_beside_those_to_fetch() -> None:
    found = {info.id: info for info in list_bases()}
    assert sorted(found) == ["minilm", "smollm2-135m", "tiny-chat", "watch-cnn"]
    assert found["watch-cnn"].parameters == 32887
    assert found["tiny-chat"].ready
    assert not found["smollm2-135m"].ready
    assert not found["minilm"].ready
    assert found["minilm"].task == "embedding"
    assert "no head" in found["minilm"].description


@pytest.mark.parametrize("id", ["tiny-chat", "watch-cnn"])
def test_the_files_of_a_bundled_base_are_those_of_its_card(id: str) -> None:
    card = load_card(id)
    assert {"config.json", "model.safetensors"} <= set(card.files)
    verify_files(card, base_path(id))
    assert card.tokenizer is None or tokenizer_file(id) == base_path(id) / card.tokenizer


def test_a_changed_or_missing_file_is_refused(tmp_path: Path) -> None:
    card = dataclasses.replace(load_card("watch-cnn"), files={"x.bin": "0" * 64})
    with pytest.raises(FormatError, match=r"x\.bin: expected a file of base 'watch-cnn'"):
        verify_files(card, tmp_path)
    (tmp_path / "x.bin").write_bytes(b"other")
    with pytest.raises(DigestMismatchError, match="expected SHA-256 000000000000, found d9298a10d"):
        verify_files(card, tmp_path)


def test_a_base_is_a_name_a_folder_or_a_function(tmp_path: Path) -> None:
    assert base_kind("watch-cnn") == "bundled"
    assert base_kind(str(tmp_path)) == "folder"
    assert base_kind("my.models:make") == "function"
    assert base_path(str(tmp_path)) == tmp_path.resolve()


UNKNOWN = [
    ("watch-cn", UnknownNameError, "unknown base 'watch-cn'; did you mean 'watch-cnn'?"),
    ("smollm2-135m", ConfigError, "run fedlora models fetch smollm2-135m"),
    ("minilm", ConfigError, "run fedlora models fetch minilm"),
    ("org/model", ConfigError, "a model of the Hugging Face hub has to be downloaded"),
]


@pytest.mark.parametrize(("id", "error", "text"), UNKNOWN)
def test_a_base_that_is_not_here_is_refused(id: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        base_kind(id)
    assert text in str(caught.value)


def test_a_card_that_was_never_written_says_how_to_write_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no card at .*\.json; where torch is installed run"):
        load_card(str(tmp_path))
    with pytest.raises(ConfigError, match=r"load_base\('tiny-chat', num_classes=5\) once"):
        load_card("tiny-chat", 5)


def test_each_new_head_has_a_card_of_its_own() -> None:
    paths = {cached_card_path("tiny-chat", classes) for classes in (None, 2, 3)}
    assert len(paths) == 3
    assert {path.parent for path in paths} == {cache_home() / "cards"}


def test_cards_and_data_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from fedlora.bases import load_card; from fedlora.data import load_data\n"
        "print(len(load_card('tiny-chat').layers), len(load_data('watch').client('1_left').test))\n"
        "assert 'tokenizers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.split()[0] == str(len(load_card("tiny-chat").layers))
