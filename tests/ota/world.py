"""A repository, a device and adapters for the tests of over-the-air updating."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

import fedlora as fl
from fedlora.device.manifest import FileInfo, GraphInfo, Manifest, sha256_of, write_manifest
from fedlora.ota import DeviceUpdater, Keys, Limits, Publisher
from fedlora.store import Store
from fedlora.targets import LayerSpec
from tests.ota.web import Web
from tests.store.states import BASE, adapter, make_bundle

__all__ = ["QUICK", "World", "big_adapter", "big_bundle", "make_world"]

# Tests wait for nothing that long: a stall of a second ends in a fifth of one.
QUICK = Limits(gap=0.5, metadata_deadline=3.0, deadline=8.0, attempts=2, pause=0.01)
WIDTH = 4096


@dataclass
class World:
    """A repository with its keys, and a device that was shipped with its first root."""

    folder: Path
    publisher: Publisher
    store: Store
    root: bytes

    @property
    def repository(self) -> Path:
        return self.publisher.path

    def publish(self, seed: int, **about: object) -> fl.Adapter:
        """Publish the adapter of a seed."""
        path = self.folder / f"{seed}.safetensors"
        fl.save_adapter(adapter(seed), path)
        self.publisher.publish(path, **about)  # type: ignore[arg-type]
        return adapter(seed)

    def updater(self, web: Web, **about: object) -> DeviceUpdater:
        given = {"limits": QUICK, "bootstrap": self.root, **about}
        return DeviceUpdater(web.url, self.store, **given)  # type: ignore[arg-type]


def make_world(folder: Path, *, bundle: Path | None = None, **about: object) -> World:
    """Make a repository and a state folder; the keys are as few as can be, to save time."""
    given = {"thresholds": {"root": (1, 1)}, **about}
    keys = Keys(folder / "keys")
    publisher = Publisher.create(folder / "repository", keys, **given)  # type: ignore[arg-type]
    store = Store.create(folder / "state", bundle or make_bundle(folder / "bundle"))
    root = (publisher.path / "metadata" / "1.root.json").read_bytes()
    return World(folder, publisher, store, root)


def big_adapter(seed: int, megabytes: float = 1.0) -> fl.Adapter:
    """Return an adapter whose packed file has about so many megabytes, for `big_bundle`."""
    rank = round(megabytes * 1e6 / (2 * WIDTH * 4))
    generator = np.random.default_rng(seed)
    config = fl.LoraConfig(rank=rank, lora_alpha=rank, target_modules=("a",))
    layer = fl.LoraLayer(
        generator.normal(size=(rank, WIDTH)).astype(np.float32),
        generator.normal(size=(WIDTH, rank)).astype(np.float32),
        1.0,
    )
    return fl.Adapter({"a": layer}, config, BASE)


def big_bundle(folder: Path) -> Path:
    """Write what looks like the bundle of a base with one wide layer."""
    folder.mkdir()
    for name in ("base.onnx.data", "infer.onnx"):
        (folder / name).write_bytes(name.encode())
    files = {path.name: FileInfo(sha256_of(path), path.stat().st_size) for path in folder.iterdir()}
    manifest = Manifest(
        base=BASE,
        base_id="toy",
        task="classification",
        layers={"a": LayerSpec("linear", (WIDTH,), WIDTH)},
        lora=big_adapter(0, 0.04).config,
        graphs={"infer.onnx": GraphInfo("infer")},
        files=files,
        input_dtype="float32",
        input_shape=(4,),
        outputs=5,
        made_by={"fedlora": "0.1.0"},
    )
    write_manifest(manifest, folder)
    return folder
