"""Which layers of a base get LoRA: selection, the starting adapter A₀ and its budget. NumPy only.

A base describes itself as `LayerSpec`s, so that a server draws the same A₀ as a client does without
having torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedlora.adapter import Adapter, Array, Kind, LoraConfig, LoraLayer
from fedlora.errors import ConfigError, UnsupportedError, nearest
from fedlora.randomness import rng

__all__ = ["Budget", "LayerSpec", "budget", "initial_A", "initial_adapter", "select_targets"]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What LoRA needs to know of one module of a base."""

    kind: Kind
    in_shape: tuple[int, ...]  # (in_features,); convolution: (in_channels / groups, *kernel)
    out_features: int
    is_output: bool = False  # the head, which "all-linear" leaves out
    parameters: int = 0  # of the module's own weight and bias

    def num_lora_parameters(self, rank: int) -> int:
        return rank * (math.prod(self.in_shape) + self.out_features)


def select_targets(specs: Mapping[str, LayerSpec], config: LoraConfig) -> tuple[str, ...]:
    """Return the sorted paths that `config` puts LoRA on.

    A name matches a path that is it or ends with ``.name``; a regular expression must match the
    whole path; "all-linear" means every linear layer but the output. `layers` and
    `layers_to_transform` then keep some blocks. Raises `ConfigError` when nothing, or not every
    name, matches.
    """
    targets = config.target_modules
    if targets == "all-linear":
        chosen = [p for p, spec in specs.items() if spec.kind == "linear" and not spec.is_output]
    elif isinstance(targets, str):
        chosen = [path for path in specs if re.fullmatch(targets, path)]
    else:
        chosen = [p for p in specs if any(p == t or p.endswith(f".{t}") for t in targets)]
        for name in targets:
            if not any(path == name or path.endswith(f".{name}") for path in specs):
                known = {part for path in specs for part in (path, path.rpartition(".")[2])}
                raise ConfigError(
                    f"target_modules: no layer of the base is called {name!r}{nearest(name, known)}"
                )
    wanted = _blocks(specs, config)
    if wanted is not None:
        chosen = [p for p in chosen if _block_index(p, config.layers_pattern) in wanted]
    if not chosen:
        raise ConfigError(
            f"target_modules {targets!r} with layers {config.layers or config.layers_to_transform} "
            f"selects none of the base's {len(specs)} layers"
        )
    return tuple(sorted(chosen))


def initial_adapter(
    specs: Mapping[str, LayerSpec], config: LoraConfig, seed: int, base: str | None = None
) -> Adapter:
    """Return the adapter that training starts from: A₀ random, B zero, so that it changes nothing.

    Raises `UnsupportedError` for DoRA, whose magnitude is taken from the base's weights.
    """
    if config.uses_dora:
        raise UnsupportedError(
            "variant 'dora' starts from the norms of the base's weights: inject it into the model "
            "(fedlora.nn.inject_lora) instead"
        )
    layers = {}
    for path in select_targets(specs, config):
        spec, rank = specs[path], config.rank_of(path)
        layers[path] = LoraLayer(
            A=initial_A(path, rank, spec.in_shape, seed),
            B=np.zeros((spec.out_features, rank), np.float32),
            scaling=config.scaling_of(path),
            kind=spec.kind,
        )
    return Adapter(layers, config, base)


def initial_A(path: str, rank: int, in_shape: tuple[int, ...], seed: int) -> Array:
    """Return A₀, (rank, *in_shape) float32, uniform in ±1/sqrt(fan_in), keyed by (seed, path)."""
    bound = 1.0 / math.sqrt(math.prod(in_shape))
    values = rng(seed, "init", path).uniform(-bound, bound, (rank, *in_shape))
    return values.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Budget:
    """What an adapter costs. Bytes are of the factors alone, without a file's header."""

    layers: int
    parameters: int
    base_parameters: int

    @property
    def share(self) -> float:
        """Parameters of the adapter as a fraction of the base's."""
        return self.parameters / self.base_parameters

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes by number format."""
        widths = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}
        return {name: math.ceil(self.parameters * width) for name, width in widths.items()}


def budget(specs: Mapping[str, LayerSpec], config: LoraConfig, base_parameters: int) -> Budget:
    """Count an adapter before it exists: ``rank * (in + out)`` per layer."""
    paths = select_targets(specs, config)
    parameters = sum(specs[path].num_lora_parameters(config.rank_of(path)) for path in paths)
    return Budget(len(paths), parameters, base_parameters)


def _blocks(specs: Mapping[str, LayerSpec], config: LoraConfig) -> frozenset[int] | None:
    if config.layers is None:
        wanted = config.layers_to_transform
        return None if wanted is None else frozenset(wanted)
    found = {_block_index(path, config.layers_pattern) for path in specs} - {None}
    blocks = sorted(index for index in found if index is not None)
    count = int(config.layers.removeprefix("last:"))
    if count > len(blocks):
        raise ConfigError(
            f"layers: expected at most 'last:{len(blocks)}', the number of blocks of this base, "
            f"found {config.layers!r}"
        )
    return frozenset(blocks[-count:])


def _block_index(path: str, patterns: tuple[str, ...]) -> int | None:
    """Return the index of the outermost block that `path` lies in.

    As PEFT does, which however finds none in ``h.0.fc`` unless `patterns` names ``h``.
    """
    for pattern in patterns or (r"[^.]*",):
        # Lazy: the first number is the block's, a later one may be an expert's.
        if match := re.match(rf"(?:.*?\.)??{pattern}\.(\d+)\.", path):
            return int(match.group(1))
    return None
