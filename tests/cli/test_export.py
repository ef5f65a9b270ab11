"""fedlora export: options, results, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.cli.export import _lora, _targets
from fedlora.cli.main import app
from fedlora.device.manifest import read_manifest
from fedlora.errors import UsageError
from fedlora.experiment import ExperimentConfig, find_experiment


def export(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["export", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_export_prints_sizes_and_differences(tmp_path: Path) -> None:
    out = tmp_path / "b"
    arguments = ("watch-cnn", "--out", str(out), "--target-modules", "hidden", "--train", "4")
    result = json.loads(export(*arguments, "--rank", "3", "--json"))
    assert result["files"].keys() == {
        "base.onnx.data", "canaries.safetensors", "infer.onnx", "train_4.onnx",
    }  # fmt: skip
    assert result["bytes"] == sum(result["files"].values())
    assert 0 < result["graphs"]["infer.onnx"]["difference"] < 1e-5
    assert read_manifest(out).lora.rank == 3
    text = export(*arguments, "--rank", "3")  # there already: the same result, at once
    assert f"{result['files']['infer.onnx']:,} bytes  differs from torch by" in text


def test_an_experiment_gives_base_lora_and_task(tmp_path: Path) -> None:
    export("--experiment", "watch", "--out", str(tmp_path / "b"), "--train", "none")
    manifest = read_manifest(tmp_path / "b")
    config = ExperimentConfig.from_toml(find_experiment("watch"))
    assert manifest.base_id == config.base.id
    assert manifest.task == config.data.task
    assert manifest.lora == config.lora
    assert set(manifest.graphs) == {"infer.onnx"}


def test_options_change_an_experiments_lora() -> None:
    config = ExperimentConfig.from_toml(find_experiment("watch"))
    assert _lora(config, None, None, None) == config.lora
    changed = _lora(config, 2, None, "hidden")
    assert (changed.rank, changed.lora_alpha) == (2, config.lora.lora_alpha)
    assert changed.target_modules == ("hidden",)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all-linear", "all-linear"),
        ("q_proj,v_proj", ("q_proj", "v_proj")),
        ("layers.0.q_proj", ("layers.0.q_proj",)),
        (r".*\.q_proj", r".*\.q_proj"),
    ],
)
def test_targets_are_names_or_an_expression(text: str, expected: str | tuple[str, ...]) -> None:
    assert _targets(text) == expected


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "name a base, or an experiment"),
        (["watch-cnn", "--experiment", "watch"], "name a base, or an experiment"),
        (["watch-cnn", "--quantize", "int2"], "--quantize: expected int8 or int4"),
        (["watch-cnn", "--input-shape", "6,x"], "--input-shape: expected sizes"),
    ],
)
def test_wrong_usage_is_named(arguments: list[str], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        CliRunner().invoke(app, ["export", *arguments], catch_exceptions=False)


def test_the_command_line_ends_with_one_line_and_code_2(run: Any, tmp_path: Path) -> None:
    code, out, err = run("export", "no-such-base", "--out", tmp_path / "b")
    assert (code, out) == (2, "")
    assert err.startswith("fedlora: unknown base 'no-such-base'")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
