"""Which format a path means."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedlora.adapter import LoraConfig
from fedlora.errors import ConfigError, FormatError, RunError, UnsupportedError
from fedlora.files import interrupted_folder
from fedlora.formats import load_adapter, read_info, save_adapter
from tests.formats.adapters import small_adapter
from tests.matching import raises


@pytest.mark.parametrize(
    ("name", "kind"), [("a", "peft"), ("v1.2/", "peft"), ("a.safetensors", "packed")]
)
def test_suffix_picks_the_format_and_saving_again_replaces(name, kind, tmp_path):
    path = f"{tmp_path}/{name}"
    save_adapter(small_adapter(seed=1), path)
    save_adapter(small_adapter(), path)
    info = read_info(path)
    assert (info.format, info.adapter) == (kind, small_adapter())
    assert len(list(tmp_path.iterdir())) == 1


def test_folder_that_exists_is_written_as_a_folder(tmp_path):
    (tmp_path / "v1.2").mkdir()
    save_adapter(small_adapter(), tmp_path / "v1.2")
    assert load_adapter(tmp_path / "v1.2") == small_adapter()


def test_model_card_is_kept_and_anything_else_stops_the_writing(tmp_path):
    save_adapter(small_adapter(seed=1), tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("mine")
    save_adapter(small_adapter(), tmp_path / "a")
    assert (tmp_path / "a" / "README.md").read_text() == "mine"
    assert load_adapter(tmp_path / "a") == small_adapter()
    (tmp_path / "a" / "tokenizer.json").write_text("mine")
    with raises(RunError, "found 'tokenizer.json', which would be lost"):
        save_adapter(small_adapter(seed=1), tmp_path / "a")
    assert load_adapter(tmp_path / "a") == small_adapter()


def test_formats_need_neither_torch_nor_the_safetensors_library():
    code = (
        "import sys, fedlora.formats, fedlora.cli.adapters; "
        "print([m for m in ('torch', 'safetensors', 'flwr') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_onnx_adapter_is_not_there_yet(tmp_path):
    for call in (load_adapter, lambda path: save_adapter(small_adapter(), path)):
        with raises(UnsupportedError, "x.onnx_adapter: the .onnx_adapter format is not available"):
            call(tmp_path / "x.onnx_adapter")


def test_unknown_suffix_is_refused(tmp_path):
    with raises(FormatError, "expected no suffix (a PEFT folder) or .safetensors", "found '.npz'"):
        save_adapter(small_adapter(), tmp_path / "a.npz")


def test_folder_has_no_codec_and_no_digest(tmp_path):
    with raises(UnsupportedError, "is written with codec 'fp32'", "found codec 'int8'"):
        save_adapter(small_adapter(), tmp_path / "a", codec="int8")
    save_adapter(small_adapter(), tmp_path / "a")
    with raises(ConfigError, "sha256 is of a packed file; a folder has none"):
        load_adapter(tmp_path / "a", sha256="0" * 64)


def test_config_is_refused_for_formats_that_have_their_own(tmp_path):
    save_adapter(small_adapter(), tmp_path / "a")
    with raises(ConfigError, "config: this format has its own; leave config out"):
        load_adapter(tmp_path / "a", config=LoraConfig())


def test_missing_path_is_named(tmp_path):
    with raises(FormatError, f"{tmp_path}/none: expected a PEFT folder"):
        load_adapter(tmp_path / "none")
    with raises(FormatError, f"{tmp_path}/none.safetensors: expected"):
        load_adapter(tmp_path / "none.safetensors")


def test_interrupted_folder_says_how_to_get_it_back(tmp_path):
    save_adapter(small_adapter(), tmp_path / "a")
    (tmp_path / "a").rename(interrupted_folder(tmp_path / "a"))
    with raises(FormatError, "writing it was interrupted; rename .a.old back to a"):
        load_adapter(tmp_path / "a")
    save_adapter(small_adapter(seed=1), tmp_path / "a")
    assert load_adapter(tmp_path / "a") == small_adapter(seed=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
