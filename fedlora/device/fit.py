"""Whether an adapter fits a bundle; needs no ONNX Runtime, so that an updater can ask."""

from __future__ import annotations

from fedlora.adapter import Adapter
from fedlora.device.manifest import Manifest
from fedlora.errors import (
    BaseMismatchError,
    ConfigError,
    LayerMismatchError,
    ShapeMismatchError,
    UnsupportedError,
    nearest,
)

__all__ = ["check_adapter"]


def check_adapter(adapter: Adapter, manifest: Manifest) -> None:
    """Raise unless an adapter fits a bundle: its base, its layers and their shapes.

    Raises `UnsupportedError`, `BaseMismatchError`, `LayerMismatchError` and `ShapeMismatchError`.
    """
    if not isinstance(adapter, Adapter):
        raise ConfigError(
            f"expected an Adapter, found {type(adapter).__name__}; read a file with Session.load"
        )
    if adapter.config.uses_dora:
        raise UnsupportedError(
            "a DoRA adapter normalizes the base's weights, so no factors can be fed for it; "
            "export it merged: fedlora export --merge"
        )
    if manifest.merged is not None:
        raise BaseMismatchError(
            f"expected no adapter: {manifest.merged[:12]} is merged into this bundle's weights; "
            "export the base without --merge"
        )
    if adapter.base is not None and adapter.base != manifest.base:
        raise BaseMismatchError(
            f"expected an adapter of the bundle's base {manifest.base[:12]} ({manifest.base_id}), "
            f"found one of {adapter.base[:12]}"
        )
    for path, layer in adapter.layers.items():
        spec = manifest.layers.get(path)
        if spec is None:
            raise LayerMismatchError(
                f"the bundle takes no factors for layer {path!r}{nearest(path, manifest.layers)}"
            )
        found = layer.kind, layer.in_shape, layer.out_features
        if found != (spec.kind, spec.in_shape, spec.out_features):
            raise ShapeMismatchError(
                f"layer {path!r}: expected {spec.kind} {spec.in_shape} -> {spec.out_features}, "
                f"found {layer.kind} {layer.in_shape} -> {layer.out_features}"
            )
