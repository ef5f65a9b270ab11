"""The manifest of a bundle: read as written, and refused in one line when it is anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedlora as fl
from fedlora.device.manifest import (
    FileInfo,
    GraphInfo,
    Manifest,
    factors_of,
    read_manifest,
    sha256_of,
    verify_files,
    write_manifest,
)
from fedlora.errors import DigestMismatchError, FormatError
from fedlora.targets import LayerSpec
from tests.matching import raises


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    for name in ("base.onnx.data", "infer.onnx", "train_8x32.onnx", "train_4x64.onnx"):
        (tmp_path / name).write_bytes(name.encode())
    write_manifest(manifest_of(tmp_path), tmp_path)
    return tmp_path


def manifest_of(folder: Path) -> Manifest:
    return Manifest(
        base="ab" * 32,
        base_id="tiny-chat",
        task="next-token",
        layers={"b": LayerSpec("linear", (4,), 3), "a": LayerSpec("conv", (2, 5), 3)},
        lora=fl.LoraConfig(rank=2, lora_alpha=4, target_modules=("a", "b")),
        graphs={
            "infer.onnx": GraphInfo("infer", difference=1e-6),
            "train_4x64.onnx": GraphInfo("train", 4, 64),
            "train_8x32.onnx": GraphInfo("train", 8, 32),
        },
        files={
            path.name: FileInfo(sha256_of(path), path.stat().st_size)
            for path in folder.iterdir()
            if path.name != "manifest.json"
        },
        outputs=3,
        made_by={"fedlora": "1"},
    )


def test_it_is_read_as_it_was_written(bundle: Path) -> None:
    found = read_manifest(bundle)
    assert found == manifest_of(bundle)
    assert list(found.layers) == ["a", "b"]
    assert found.graph_of("infer") == "infer.onnx"
    assert found.graph_of("decode") is None
    assert [name for name, _ in found.buckets()] == ["train_8x32.onnx", "train_4x64.onnx"]
    verify_files(bundle, found)
    before = (bundle / "manifest.json").read_bytes()
    write_manifest(found, bundle)
    assert (bundle / "manifest.json").read_bytes() == before


def test_a_changed_file_is_named(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    (bundle / "infer.onnx").write_bytes(b"infer.onnX")
    with raises(DigestMismatchError, "infer.onnx", "export or install it again"):
        verify_files(bundle, manifest)


def test_a_link_out_of_the_bundle_is_refused(bundle: Path, tmp_path_factory: Any) -> None:
    manifest = read_manifest(bundle)
    outside = tmp_path_factory.mktemp("outside") / "infer.onnx"
    outside.write_bytes((bundle / "infer.onnx").read_bytes())
    (bundle / "infer.onnx").unlink()
    (bundle / "infer.onnx").symlink_to(outside)
    with raises(FormatError, "infer.onnx", "found none or a link"):
        verify_files(bundle, manifest)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("base", 3, "base: expected a fingerprint"),
        ("task", "embedding", "task: expected next-token or classification"),
        ("outputs", 0, "outputs: expected a whole number >= 1"),
        ("outputs", True, "outputs"),
        ("layers", {}, "layers: expected an object"),
        ("layers", {"a": {"kind": "linear"}}, "expected the key 'in_shape'"),
        ("graphs", {"../infer.onnx": {"kind": "infer"}}, "expected one of the bundle"),
        ("graphs", {"infer.onnx": {"kind": "serve"}}, "expected a kind"),
        ("graphs", {"infer.onnx": {"kind": "infer", "difference": "0"}}, "a difference to torch"),
        ("graphs", {"train_8x32.onnx": {"kind": "train"}}, "expected the rows"),
        ("files", {"base.onnx.data": {"sha256": "00", "num_bytes": 1}}, "expected one of the"),
        ("input_shape", [0], "input_shape: expected a list of sizes"),
        ("precision", "fp8", "precision"),
        ("labels", [], "labels"),
        ("extra", 1, "unknown key 'extra'"),
        ("version", 2, "version 1"),
    ],
)
def test_anything_else_is_one_line(bundle: Path, key: str, value: Any, text: str) -> None:
    path = bundle / "manifest.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, key: value}))
    with raises(FormatError, "manifest.json", text):
        read_manifest(bundle)


def test_a_missing_or_broken_manifest(tmp_path: Path) -> None:
    with raises(FormatError, "expected a bundle with manifest.json", "fedlora export"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"{")
    with raises(FormatError, "expected JSON"):
        read_manifest(tmp_path)


def test_factors_carry_the_scaling_in_b() -> None:
    A, B = np.full((2, 4), 2, np.float32), np.full((3, 2), 3, np.float32)
    config = fl.LoraConfig(rank=2, lora_alpha=4, target_modules=("x",))
    adapter = fl.Adapter({"x": fl.LoraLayer(A, B, 2.0)}, config)
    found = dict(factors_of(adapter))
    assert list(found) == ["x.lora_A.weight", "x.lora_B.weight"]
    np.testing.assert_array_equal(found["x.lora_A.weight"], A)
    np.testing.assert_array_equal(found["x.lora_B.weight"], 2 * B)
    assert next(iter(dict(factors_of(adapter, frozen=True)))) == "x.frozen_A.weight"
