"""The bundles that are measured: each is exported once, in a process of its own, and kept.

They lie in fedlora's cache folder under ``bench-device/``. Beside each stands what it was made
with, so that an exporter that was changed exports again.

    python -m simulations.bench.device_bundles tiny-chat fp32
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal, get_args

from fedlora.bases.registry import cache_home
from fedlora.device.manifest import TrainPrecision
from fedlora.errors import FedloraError
from fedlora.files import write_atomic
from fedlora.targets import select_targets
from simulations.bench.device_cases import BASES, random_adapter

__all__ = ["Variant", "bundle_of", "export_seconds", "main", "skipped"]

Variant = Literal["fp32", "merged", "int8", "int8-backward", "int8-training"]
# Of float32 bases with approximate training; see `fedlora.export.export_bundle`.
_TRAINING: dict[str, TrainPrecision] = {"int8-backward": "int8-backward", "int8-training": "int8"}
MERGED_SEED = 1  # of the adapter that goes into the weights of "merged"
_SOURCES = ("fedlora/export", "fedlora/device/manifest.py", "simulations/bench/device_cases.py")


def bundle_of(base: str, variant: Variant) -> Path | None:
    """Return a bundle's folder, exported if it has to be; None if it cannot be (see `skipped`)."""
    folder, note = _place(base, variant)
    if _note(note).get("sources") != _sources():
        print(f"exporting {folder.name}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "simulations.bench.device_bundles", base, variant]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return None if _note(note).get("skipped") else folder


def skipped(base: str, variant: Variant) -> str:
    """Return why there is no such bundle, "" if there is one."""
    return str(_note(_place(base, variant)[1]).get("skipped") or "")


def export_seconds(base: str, variant: Variant) -> float:
    """Return how much processor time the export took."""
    return float(_note(_place(base, variant)[1])["cpu"])


def _place(base: str, variant: Variant) -> tuple[Path, Path]:
    home = cache_home() / "bench-device"
    return home / f"{base}-{variant}", home / f"{base}-{variant}.json"


def _note(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def _sources() -> str:
    """Return a digest of what decides a bundle's bytes."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for name in _SOURCES:
        path = root / name
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Export one bundle."""
    from fedlora.export.bundle import export_bundle
    from fedlora.nn.load import load_base

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", choices=BASES)
    parser.add_argument("variant", choices=get_args(Variant))
    options = parser.parse_args(arguments)
    base, variant = BASES[options.base], options.variant
    folder, note = _place(options.base, variant)
    started = time.process_time()
    loaded = load_base(base.id, num_classes=base.classes or None)
    card, merged = loaded.card, None
    if variant == "merged":
        specs = {path: card.layers[path] for path in select_targets(card.layers, base.lora)}
        merged = random_adapter(specs, base.lora, MERGED_SEED, card.fingerprint)
    reason = ""
    try:
        export_bundle(
            loaded, folder, lora=base.lora, precision="int8" if variant == "int8" else "fp32",
            train_precision=_TRAINING.get(variant, "exact"),
            train=() if variant == "merged" else ["{}x{}".format(*base.bucket)], merge=merged,
            again=True, report=print,
        )  # fmt: skip
    except FedloraError as error:
        reason = str(error)
        print(f"no bundle {folder.name}: {reason}")
    record = {"sources": _sources(), "skipped": reason, "cpu": time.process_time() - started}
    write_atomic(note, json.dumps(record).encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
