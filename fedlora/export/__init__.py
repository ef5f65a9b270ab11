"""From torch to a device bundle: the graphs of a base, its weights once, and a manifest."""

from fedlora.errors import MissingExtraError

try:
    import onnx as _onnx  # noqa: F401
    import torch as _torch  # noqa: F401
except ImportError:  # pragma: no cover - the tests have both
    raise MissingExtraError("fedlora.export", "export") from None

from fedlora.export.bundle import export_bundle

__all__ = ["export_bundle"]
