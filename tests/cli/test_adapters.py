"""fedlora inspect, convert and combine."""

from __future__ import annotations

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.cli.adapters import combine, convert, inspect
from fedlora.errors import BaseMismatchError, UnsupportedError, UsageError
from fedlora.formats import load_adapter, read_info, save_adapter
from tests.formats.adapters import small_adapter
from tests.matching import raises

app = typer.Typer()
for function in (inspect, convert, combine):
    app.command()(function)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(kind: type[Exception], text: str, *arguments: object) -> None:
    with raises(kind, text):
        CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_inspect_prints_json_with_all_facts(tmp_path):
    adapter = small_adapter()
    path = tmp_path / "a.safetensors"
    save_adapter(adapter, path, provenance={"round": 3}, tokenizer="cd" * 32)
    facts = json.loads(run("inspect", path, "--json"))
    layers = facts.pop("layers")
    assert facts == {
        "format": "packed", "codec": "fp32", "variant": "lora", "num_layers": 5, "rank": "1..3",
        "target_modules": "fc, embed, conv1, conv2", "parameters": adapter.num_parameters,
        "bytes": path.stat().st_size, "norm": round(adapter.norm(), 6),
        "fingerprint": adapter.fingerprint(), "base": "ab" * 32, "tokenizer": "cd" * 32,
        "provenance": {"round": 3},
    }  # fmt: skip
    assert layers["conv1"] == {
        "kind": "conv", "in": [4, 3], "out": 5, "rank": 3, "scaling": 1.0,
        "norm": adapter["conv1"].norm(),
    }  # fmt: skip


def test_inspect_prints_a_table_and_no_norm_for_dora(tmp_path):
    save_adapter(small_adapter("dora"), tmp_path / "a", provenance={"note": "[red]x\x1b[31m"})
    out = run("inspect", tmp_path / "a")
    assert "format" in out
    assert "h.0.fc" in out
    assert "[red]x" in out
    assert "\x1b" not in out
    assert json.loads(run("inspect", tmp_path / "a", "--json"))["norm"] is None


def test_convert_changes_format_codec_and_rank(tmp_path):
    adapter = small_adapter()
    save_adapter(adapter, tmp_path / "a", provenance={"round": 3})
    out = run("convert", tmp_path / "a", tmp_path / "b.safetensors", "--codec", "fp16")
    assert "b.safetensors: Adapter(5 layers, rank 1..3" in out
    info = read_info(tmp_path / "b.safetensors")
    assert (info.codec, info.provenance) == ("fp16", {"round": 3})
    np.testing.assert_allclose(info.adapter["conv1"].A, adapter["conv1"].A, rtol=2**-11)
    run("convert", tmp_path / "a", tmp_path / "c", "--rank", "1")
    assert set(load_adapter(tmp_path / "c").ranks) == {1}


def test_convert_replaces_only_when_told_to(tmp_path):
    save_adapter(small_adapter(), tmp_path / "a")
    save_adapter(small_adapter(seed=1), tmp_path / "b")
    arguments = ("convert", tmp_path / "a", tmp_path / "b")
    fails(UsageError, "there is something already; add --force to replace it", *arguments)
    run(*arguments, "--force")
    assert load_adapter(tmp_path / "b") == small_adapter()


def test_combine_is_the_weighted_sum(tmp_path):
    first, second = small_adapter(), small_adapter(seed=1)
    save_adapter(first, tmp_path / "a")
    save_adapter(second, tmp_path / "b.safetensors")
    run("combine", tmp_path / "a", tmp_path / "b.safetensors", "--weights", "0.25,-2",
        "--out", tmp_path / "c")  # fmt: skip
    both = load_adapter(tmp_path / "c")
    for path in first:
        expected = 0.25 * first.delta_weight(path) - 2 * second.delta_weight(path)
        # Float32 rounding of one sum and of B times its scaling.
        np.testing.assert_allclose(both.delta_weight(path), expected, rtol=1e-5, atol=1e-5)
    combined = read_info(tmp_path / "c").provenance["combined"]
    assert [entry["weight"] for entry in combined] == [0.25, -2.0]
    assert combined[0]["fingerprint"] == first.fingerprint()


def test_combine_without_weights_adds_and_rank_cuts(tmp_path):
    save_adapter(small_adapter(), tmp_path / "a")
    run("combine", tmp_path / "a", tmp_path / "a", "--out", tmp_path / "b", "--rank", "3")
    both = load_adapter(tmp_path / "b")
    # Twice the same adapter has the same rank, so that the cut loses nothing.
    expected = 2 * small_adapter().delta_weight("conv1")
    np.testing.assert_allclose(both.delta_weight("conv1"), expected, atol=1e-5)
    assert max(both.ranks) == 3


@pytest.mark.parametrize(
    ("weights", "text"),
    [("1", "expected 2 numbers, one for each adapter, found 1"), ("1,x", "found '1,x'")],
)
def test_wrong_weights_are_refused(weights, text, tmp_path):
    save_adapter(small_adapter(), tmp_path / "a")
    fails(UsageError, text, "combine", tmp_path / "a", tmp_path / "a", "--weights", weights,
          "--out", tmp_path / "b")  # fmt: skip
    assert not (tmp_path / "b").exists()


def test_adapters_that_cannot_be_added_are_refused(tmp_path):
    save_adapter(small_adapter("dora"), tmp_path / "dora")
    layer = LoraLayer(np.ones((1, 1)), np.ones((1, 1)), 1.0)
    for name in "ab":
        save_adapter(Adapter({"fc": layer}, LoraConfig(rank=1), base=name * 64), tmp_path / name)
    out = ("--out", tmp_path / "c")
    fails(UnsupportedError, "DoRA", "combine", tmp_path / "dora", tmp_path / "dora", *out)
    fails(BaseMismatchError, "adapters of one base", "combine", tmp_path / "a", tmp_path / "b",
          *out)  # fmt: skip


@pytest.mark.parametrize("command", ["inspect", "convert", "combine"])
def test_help_has_an_example(command):
    assert f"fedlora {command}" in run(command, "--help")
