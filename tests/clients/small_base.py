"""The hand-made classifier as a base in torch, "module:function", beside its bundle."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedlora.nn import load_base
from tests.device.hand_made import HandMade, rewrite_manifest, write_classifier
from tests.device.twins import Classifier

BASE = f"{__name__}:base"


def base() -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        weights: Any = write_classifier(Path(folder) / "bundle").weights
    model = Classifier()
    model.load_state_dict({name: torch.tensor(weight) for name, weight in weights.items()})
    return model.eval()


def write_bundle(folder: Path) -> HandMade:
    """Write the bundle of `base`, with its fingerprint."""
    made = write_classifier(folder, rows=(4, 16))
    about = replace(made.manifest, base=load_base(BASE).card.fingerprint)
    return replace(made, manifest=rewrite_manifest(folder, about))
