"""What `simulations.bench.device` measures: bases, cases, and inputs of both sides. No torch here.

A case is called ``<kind>-<base>``. Kinds: ``train`` one training step, ``infer`` one batch,
``loss`` 20 steps' losses, ``adapters`` swapping and loading, ``mapping`` inference and training in
one process, ``metric`` what an int8 base does to held-out data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.bases import list_bases
from fedlora.errors import ConfigError
from fedlora.randomness import rng
from fedlora.targets import LayerSpec

__all__ = [
    "BASES", "DEFAULT", "KINDS", "MAPPING_SIDES", "QUICK", "ROUNDED", "TOKENS",
    "TRAIN_SIDES", "DeviceBase",
    "DeviceCase", "device_case", "is_here", "random_adapter",
]  # fmt: skip

RANK = 8
TOKENS = 32  # of a row that is inferred
EFFECT = 0.1  # of a random adapter's B: the logits move by about as much as by training
# Exact training on a rounded base, and approximate training on the base itself.
ROUNDED = ("int8", "int8-backward", "int8-training")
TRAIN_SIDES = ("torch", "fast", "low", *ROUNDED, *(f"{side}-low" for side in ROUNDED))
# What is open at once; with "-low" in low-memory mode.
MAPPING_SIDES = ("infer", "train", "both", "infer-low", "train-low", "both-low")
KINDS = ("train", "infer", "loss", "adapters", "mapping", "metric")


@dataclass(frozen=True, slots=True)
class DeviceBase:
    """A base as it is measured."""

    id: str  # of `fedlora.nn.load_base`
    vocabulary: int
    query_value: tuple[str, ...]
    bucket: tuple[int, int]  # rows and tokens of a training batch
    classes: int = 0  # of a new head; 0: a language model

    @property
    def lora(self) -> LoraConfig:
        """LoRA of the bundle: query and value, and the new head, which is nothing without it."""
        head = ("zero_head",) if self.classes else ()
        targets = (*self.query_value, *head)
        return LoraConfig(rank=RANK, lora_alpha=2.0 * RANK, target_modules=targets)

    @property
    def task(self) -> str:
        return "classification" if self.classes else "next-token"

    @property
    def data(self) -> str:
        """A data set for it."""
        return "chitchat-punctuation" if self.classes else "chitchat"

    def batch(self, rows: int, tokens: int, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
        """Rows without padding: both sides compute every token."""
        generator = rng(seed, "bench device", rows, tokens)
        ids = generator.integers(1, self.vocabulary, (rows, tokens + 1))
        targets = generator.integers(0, self.classes, rows) if self.classes else ids[:, 1:]
        return {"inputs": ids[:, :-1].copy(), "targets": targets.copy()}


BASES = {
    "tiny-chat": DeviceBase("tiny-chat", 2048, ("q_proj", "v_proj"), (8, 32)),
    "minilm": DeviceBase("minilm", 30522, ("query", "value"), (8, 32), classes=5),
    "smollm2": DeviceBase("smollm2-135m", 49152, ("q_proj", "v_proj"), (2, 64)),
}
DEFAULT = tuple(
    f"{kind}-{base}"
    for base in BASES
    for kind in KINDS
    if (kind, base) != ("adapters", "smollm2")
)  # fmt: skip
QUICK = ("train-tiny-chat", "infer-tiny-chat", "adapters-tiny-chat")


@dataclass(frozen=True, slots=True)
class DeviceCase:
    """One kind of measurement on one base."""

    name: str
    kind: str
    base_name: str

    @property
    def base(self) -> DeviceBase:
        return BASES[self.base_name]


def device_case(name: str) -> DeviceCase:
    """Return the case of that name. Raises `ConfigError` with the form of a name."""
    found = re.fullmatch(rf"({'|'.join(KINDS)})-({'|'.join(BASES)})", name)
    if found is None:
        raise ConfigError(
            f"case {name!r}: expected <kind>-<base> with a kind of {', '.join(KINDS)} and a base "
            f"of {', '.join(BASES)}"
        )
    return DeviceCase(name, *found.groups())


def is_here(base: DeviceBase) -> bool:
    """Whether the base is bundled or was fetched."""
    return any(info.id == base.id and info.ready for info in list_bases())


def random_adapter(
    specs: Mapping[str, LayerSpec], config: LoraConfig, seed: int, base: str
) -> Adapter:
    """Return an adapter that changes the logits, as an untrained one would not: its B is random."""
    generator = rng(seed, "bench device adapter")
    layers = {}
    for path, spec in sorted(specs.items()):
        rank = config.rank_of(path)
        A = generator.normal(size=(rank, *spec.in_shape)) / np.sqrt(np.prod(spec.in_shape))
        B = generator.normal(size=(spec.out_features, rank)) * (EFFECT / np.sqrt(rank))
        layers[path] = LoraLayer(A, B, config.scaling_of(path), kind=spec.kind)
    return Adapter(layers, config, base)
