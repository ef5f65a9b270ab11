"""A bundle and adapters for the tests of the store."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import fedlora as fl
from fedlora.device.manifest import FileInfo, GraphInfo, Manifest, sha256_of, write_manifest
from fedlora.targets import LayerSpec

BASE = "ab" * 32
SIZES = {"a": (4, 3), "b": (3, 5)}


def adapter(seed: int, *, base: str | None = BASE) -> fl.Adapter:
    """Return another adapter for each seed, the same for the same."""
    generator = np.random.default_rng(seed)
    config = fl.LoraConfig(rank=2, lora_alpha=4, target_modules=tuple(SIZES))
    layers = {
        path: fl.LoraLayer(
            generator.normal(size=(2, width)).astype(np.float32),
            generator.normal(size=(out, 2)).astype(np.float32),
            2.0,
        )
        for path, (width, out) in SIZES.items()
    }
    return fl.Adapter(layers, config, base)


def make_bundle(folder: Path) -> Path:
    """Write a folder that looks like a bundle to whoever does not run it."""
    folder.mkdir()
    for name in ("base.onnx.data", "infer.onnx"):
        (folder / name).write_bytes(name.encode() * 1000)
    files = {p.name: FileInfo(sha256_of(p), p.stat().st_size) for p in folder.iterdir()}
    manifest = Manifest(
        base=BASE,
        base_id="toy",
        task="classification",
        layers={path: LayerSpec("linear", (width,), out) for path, (width, out) in SIZES.items()},
        lora=adapter(0).config,
        graphs={"infer.onnx": GraphInfo("infer")},
        files=files,
        input_dtype="float32",
        input_shape=(4,),
        outputs=5,
    )
    write_manifest(manifest, folder)
    return folder
