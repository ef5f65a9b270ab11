"""A base with an adapter in its weights, for as long as it is exported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from fedlora.adapter import Adapter
from fedlora.errors import BaseMismatchError, LayerMismatchError, nearest
from fedlora.nn.inject import (
    inject_lora,
    layer_specs,
    load_adapter_into,
    lora_modules,
    merge_lora,
    remove_lora,
)

__all__ = ["merged_into"]


@contextmanager
def merged_into(model: nn.Module, adapter: Adapter, base: str) -> Iterator[None]:
    """Give the model the weights that do alone what it and the adapter do; DoRA too.

    base: the model's fingerprint. Raises `BaseMismatchError`, `LayerMismatchError`, and what
    `load_adapter_into` and `merge_lora` raise.
    """
    if adapter.base is not None and adapter.base != base:
        raise BaseMismatchError(
            f"merge: the adapter was made for base {adapter.base[:12]}, this model is {base[:12]}; "
            "export its own base"
        )
    specs = layer_specs(model)
    if missing := sorted(adapter.layers.keys() - specs.keys()):
        raise LayerMismatchError(
            f"merge: the model has no layer {missing[0]!r}{nearest(missing[0], specs)}"
        )
    targets = "|".join(re.escape(path) for path in adapter.layers)
    inject_lora(model, replace(adapter.config, target_modules=targets, layers=None), base=base)
    try:
        load_adapter_into(model, adapter)
        merge_lora(model)
        merged = {path: layer.base_layer.weight.data for path, layer in lora_modules(model).items()}
    finally:
        remove_lora(model)
    weights = {path: model.get_submodule(path).get_parameter("weight") for path in merged}
    originals = {path: weight.data for path, weight in weights.items()}
    try:
        for path, weight in weights.items():
            weight.data = merged[path]
        yield
    finally:
        for path, weight in weights.items():
            weight.data = originals[path]
