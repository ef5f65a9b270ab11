"""LoRA adapters as immutable values, and their algebra. NumPy only.

A layer's adapter is the product ``scaling * B @ A`` (LoRA, arXiv:2106.09685, equation 3) that is
added to a frozen weight. All of the algebra here works on the factors; the product itself is only
formed by `LoraLayer.delta_weight`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from fedlora.errors import (
    AdapterError,
    BaseMismatchError,
    LayerMismatchError,
    NonFiniteError,
    ShapeMismatchError,
    UnsupportedError,
)
from fedlora.lora_config import LoraConfig, Variant, check_rank
from fedlora.low_rank import svd_of_product

__all__ = ["Adapter", "Array", "Kind", "LoraConfig", "LoraLayer", "Variant", "common_base", "stack"]

Array: TypeAlias = npt.NDArray[np.float32]
Kind = Literal["linear", "conv", "embedding"]


@dataclass(frozen=True, slots=True, eq=False)
class LoraLayer:
    """One layer's adapter: ``delta_weight = scaling * B @ A``.

    Arrays are float32, finite and read-only (a writable argument is copied).

    A: (rank, in_features); convolution: (rank, in_channels, *kernel); embedding: (rank, rows).
    B: (out_features, rank); embedding: (dim, rank).
    magnitude: (out_features,), DoRA (arXiv:2402.09353) only.

    Raises `ShapeMismatchError` and `NonFiniteError`.
    """

    A: Array
    B: Array
    scaling: float
    magnitude: Array | None = None
    kind: Kind = "linear"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise AdapterError(
                f"kind: expected one of {', '.join(get_args(Kind))}, found {self.kind!r}"
            )
        object.__setattr__(self, "A", _frozen(self.A, "A"))
        object.__setattr__(self, "B", _frozen(self.B, "B"))
        dims = (3, 4, 5) if self.kind == "conv" else (2,)
        if self.A.ndim not in dims or 0 in self.A.shape:
            raise ShapeMismatchError(
                f"A: expected {'(rank, in, *kernel)' if self.kind == 'conv' else '(rank, in)'} "
                f"with every size >= 1, found {self.A.shape}"
            )
        if self.B.ndim != 2 or 0 in self.B.shape or self.B.shape[1] != self.A.shape[0]:
            raise ShapeMismatchError(
                f"B: expected (out, rank) with rank {self.A.shape[0]} of A, found {self.B.shape}"
            )
        if not math.isfinite(self.scaling):
            raise NonFiniteError(f"scaling: expected a finite number, found {self.scaling!r}")
        object.__setattr__(self, "scaling", float(self.scaling))
        if self.magnitude is not None:
            object.__setattr__(self, "magnitude", _frozen(self.magnitude, "magnitude"))
            if self.magnitude.shape != (self.out_features,):
                raise ShapeMismatchError(
                    f"magnitude: expected ({self.out_features},), found {self.magnitude.shape}"
                )

    def __reduce__(self) -> tuple[Any, ...]:  # through the checks: unpickled arrays are writable
        return LoraLayer, (self.A, self.B, self.scaling, self.magnitude, self.kind)

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])

    @property
    def out_features(self) -> int:
        return int(self.B.shape[0])

    @property
    def in_shape(self) -> tuple[int, ...]:
        """``(in_features,)``, or ``(in_channels, *kernel)`` for a convolution."""
        return tuple(int(size) for size in self.A.shape[1:])

    @property
    def num_parameters(self) -> int:
        return self.A.size + self.B.size + (0 if self.magnitude is None else self.magnitude.size)

    @property
    def delta_weight(self) -> Array:
        """``scaling * B @ A``: (out, in) or (out, in, *kernel) float32, summed in float64.

        For an embedding it is (dim, rows), the transpose of the table. Raises `UnsupportedError`
        for DoRA, whose weight is not the base's plus a product.
        """
        _refuse_dora("delta_weight", [self])
        product = self.B.astype(np.float64) @ self._flat_A()
        return (self.scaling * product).astype(np.float32).reshape(-1, *self.in_shape)

    def scaled(self, factor: float) -> LoraLayer:
        """Return the layer whose delta_weight is `factor` times this one's."""
        _refuse_dora("scaled", [self])
        return replace(self, scaling=self.scaling * factor)

    def normalized(self) -> LoraLayer:
        """Fold the scaling into B, so that `scaling` is 1."""
        return replace(self, B=_float32(self.B.astype(np.float64) * self.scaling), scaling=1.0)

    def truncated(self, rank: int) -> LoraLayer:
        """Return the best approximation of delta_weight at `rank` (Eckart-Young); balanced factors.

        `fedlora.low_rank` says how the SVD is taken from the factors. The scaling stays as it is; a
        layer of at most that rank comes back unchanged.
        """
        _refuse_dora("truncated", [self])
        check_rank("rank", rank)
        if rank >= self.rank:
            return self
        spectrum = svd_of_product(self.B, self.A.reshape(self.rank, -1)).cut(rank)
        B, A = spectrum.balanced()
        missing = rank - spectrum.rank  # over 0 where the layer itself is smaller than `rank`
        B, A = np.pad(B, ((0, 0), (0, missing))), np.pad(A, ((0, missing), (0, 0)))
        return replace(self, A=_float32(A.reshape(rank, *self.in_shape)), B=_float32(B))

    def norm(self) -> float:
        """Frobenius norm of delta_weight, from the Gram matrices of the factors."""
        _refuse_dora("norm", [self])
        B, A = self.B.astype(np.float64), self._flat_A()
        squared = float(np.sum((B.T @ B) * (A @ A.T)))
        return abs(self.scaling) * math.sqrt(max(squared, 0.0))

    def same_shape(self, other: LoraLayer) -> bool:
        """Whether two layers fit on the same module (their ranks may differ)."""
        return (
            self.kind == other.kind
            and self.in_shape == other.in_shape
            and self.out_features == other.out_features
        )

    def _flat_A(self) -> npt.NDArray[np.float64]:
        return self.A.reshape(self.rank, -1).astype(np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A set of `LoraLayer`s, keyed by the module paths of the base. Immutable.

    `layers` decides ranks and scalings; `config` describes how it was made; `base` is the base's
    fingerprint, or None for an adapter that fits wherever its shapes fit. Two adapters are equal
    when their `fingerprint` is.

    >>> layer = LoraLayer(A=np.ones((2, 3)), B=np.ones((4, 2)), scaling=0.5)
    >>> Adapter({"fc": layer}, LoraConfig(rank=2, lora_alpha=1)).num_parameters
    14
    """

    layers: Mapping[str, LoraLayer]
    config: LoraConfig
    base: str | None = None
    # The flat row that some of the factors are views of, and its form (`fedlora.flat` sets it).
    made_of: tuple[Any, Array] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise LayerMismatchError("an adapter needs at least one layer, found none")
        for path, layer in self.layers.items():
            if not isinstance(path, str) or not path:
                raise LayerMismatchError(f"expected the path of a module, found {path!r}")
            if self.config.uses_dora != (layer.magnitude is not None):
                raise AdapterError(
                    f"layer {path!r}: variant {self.config.variant!r} and a magnitude that is "
                    f"{'missing' if layer.magnitude is None else 'present'} do not go together"
                )
        in_order = {path: self.layers[path] for path in sorted(self.layers)}
        object.__setattr__(self, "layers", MappingProxyType(in_order))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adapter) and self.fingerprint() == other.fingerprint()

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def __reduce__(self) -> tuple[Any, ...]:
        return Adapter, (dict(self.layers), self.config, self.base)

    def __getitem__(self, path: str) -> LoraLayer:
        return self.layers[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        low, high = min(self.ranks), max(self.ranks)
        rank = str(low) if low == high else f"{low}..{high}"
        return f"Adapter({len(self)} layers, rank {rank}, {self.num_parameters:,} parameters)"

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(layer.rank for layer in self.layers.values())

    @property
    def num_parameters(self) -> int:
        return sum(layer.num_parameters for layer in self.layers.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the factors in float32."""
        return 4 * self.num_parameters

    def delta_weight(self, path: str) -> Array:
        """Return ``scaling * B @ A`` of one layer; see `LoraLayer.delta_weight`."""
        if path not in self.layers:
            raise LayerMismatchError(f"no layer {path!r} in this adapter of {len(self)} layers")
        return self.layers[path].delta_weight

    def scaled(self, factor: float) -> Adapter:
        """Return the adapter whose every delta_weight is `factor` times this one's."""
        return self.map(lambda layer: layer.scaled(factor))

    def normalized(self) -> Adapter:
        """Fold every scaling into its B; the config still describes how the adapter was made."""
        return self.map(LoraLayer.normalized)

    def truncated(self, rank: int) -> Adapter:
        """Cut every layer to at most `rank`; see `LoraLayer.truncated`."""
        cut = self.map(lambda layer: layer.truncated(rank))
        return replace(cut, config=replace(self.config, rank=max(cut.ranks), rank_pattern={}))

    def norm(self) -> float:
        """Frobenius norm over the delta_weights of all layers."""
        return math.hypot(*(layer.norm() for layer in self.layers.values()))

    def fingerprint(self) -> str:
        """SHA-256 over paths, kinds, scalings, shapes and the factors' bytes."""
        digest = hashlib.sha256()
        for path, layer in self.layers.items():
            parts = {"A": layer.A, "B": layer.B, "magnitude": layer.magnitude}
            shapes = {name: part.shape for name, part in parts.items() if part is not None}
            digest.update(repr((path, layer.kind, layer.scaling, shapes)).encode())
            for part in parts.values():
                if part is not None:
                    digest.update(np.ascontiguousarray(part, dtype="<f4").tobytes())
        return digest.hexdigest()

    def map(self, change: Any) -> Adapter:
        """Return the adapter with ``change(layer)`` in place of each layer."""
        return replace(self, layers={path: change(layer) for path, layer in self.layers.items()})

    def require_same_layout(self, other: Adapter, who: str, *, ranks: bool = True) -> None:
        """Raise unless `other` has this one's layers and shapes; `who` opens the text."""
        missing, extra = self.layers.keys() - other.layers.keys(), other.layers.keys() - self.layers
        if missing or extra:
            raise LayerMismatchError(f"{who}: {_difference(missing, extra)}")
        for path, mine in self.layers.items():
            theirs = other.layers[path]
            if not mine.same_shape(theirs) or (ranks and mine.rank != theirs.rank):
                raise ShapeMismatchError(
                    f"{who}, layer {path!r}: expected A {mine.A.shape} and B {mine.B.shape}, "
                    f"found A {theirs.A.shape} and B {theirs.B.shape}"
                )


def with_views(
    like: Adapter, layers: dict[str, tuple[Array, Array, Array | None]], made_of: tuple[Any, Array]
) -> Adapter:
    """Return `like` with other arrays (A, B, magnitude) in its layers, none of them checked.

    Only for `fedlora.flat`, which checks a whole row at once: the arrays must be finite, of the
    same shapes as those of `like`, and views of memory that nobody can write to.
    """
    put, new = object.__setattr__, object.__new__  # past the checks of a frozen dataclass
    built: dict[str, LoraLayer] = {}
    for path, (A, B, magnitude) in layers.items():
        before = like.layers[path]
        layer = new(LoraLayer)
        put(layer, "A", A)
        put(layer, "B", B)
        put(layer, "scaling", before.scaling)
        put(layer, "magnitude", magnitude)
        put(layer, "kind", before.kind)
        built[path] = layer
    adapter = new(Adapter)
    put(adapter, "layers", MappingProxyType(built))
    put(adapter, "config", like.config)
    put(adapter, "base", like.base)
    put(adapter, "made_of", made_of)
    return adapter


def stack(adapters: Sequence[Adapter]) -> Adapter:
    """Return the adapter whose delta_weights are the sums of the given ones'.

    Exact, by concatenation along the rank: ``B = [s1 B1, s2 B2]``, ``A = [A1; A2]``, scaling 1. An
    adapter that lacks a layer adds nothing there. Raises `ShapeMismatchError`, `BaseMismatchError`,
    and `UnsupportedError` for DoRA.
    """
    if not adapters:
        raise LayerMismatchError("stack: expected at least one adapter, found none")
    layers: dict[str, LoraLayer] = {}
    for path in sorted({path for adapter in adapters for path in adapter}):
        layers[path] = _stack_layers(path, [a[path] for a in adapters if path in a.layers])
    rank = max(layer.rank for layer in layers.values())
    config = replace(
        adapters[0].config, rank=rank, lora_alpha=float(rank), variant="lora",
        rank_pattern={}, alpha_pattern={},
    )  # fmt: skip
    return Adapter(layers, config, common_base(adapters))


def common_base(adapters: Sequence[Adapter]) -> str | None:
    """Return the one fingerprint that the adapters name, None if none does.

    Raises `BaseMismatchError` when two name different bases.
    """
    bases = {adapter.base for adapter in adapters if adapter.base is not None}
    if len(bases) > 1:
        raise BaseMismatchError(
            f"expected adapters of one base, found {', '.join(sorted(b[:12] for b in bases))}; "
            "an adapter only means something on the base that it was trained on"
        )
    return bases.pop() if bases else None


def _stack_layers(path: str, layers: Sequence[LoraLayer]) -> LoraLayer:
    _refuse_dora(f"stack, layer {path!r}", layers)
    first = layers[0]
    for layer in layers[1:]:
        if not first.same_shape(layer):
            raise ShapeMismatchError(
                f"stack, layer {path!r}: expected {first.kind} {first.in_shape} -> "
                f"{first.out_features}, found {layer.kind} {layer.in_shape} -> {layer.out_features}"
            )
    return LoraLayer(
        A=np.concatenate([layer.A for layer in layers]),
        B=np.concatenate([layer.normalized().B for layer in layers], axis=1),
        scaling=1.0,
        kind=first.kind,
    )


def _frozen(value: npt.ArrayLike, name: str) -> Array:
    """Return a read-only, finite float32 array; copy it if anyone else could write to it."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise ShapeMismatchError(f"{name}: expected real numbers, found dtype {array.dtype}")
    # Copied also when read-only: it may be a view of memory that its owner can still write.
    owned = array.base is None and not array.flags.writeable and array.dtype == np.float32
    if not (owned and array.flags.c_contiguous):
        array = _float32(array)
        array.flags.writeable = False
    # One reduction instead of a mask: a NaN or an infinity makes the sum of squares not finite, and
    # so does overflow, which the slower look then tells apart.
    if array.size and not np.isfinite(np.vdot(array, array)) and not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))
        raise NonFiniteError(
            f"{name}: expected finite numbers, found {array[tuple(where[0])]} at "
            f"{tuple(map(int, where[0]))} and {len(where) - 1} more"
        )
    return array


def _float32(array: npt.NDArray[Any]) -> Array:
    if array.dtype == np.float32:  # nothing can overflow
        return np.array(array, order="C")
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is reported as infinity
        return np.array(array, dtype=np.float32, order="C")


def _refuse_dora(what: str, layers: Sequence[LoraLayer]) -> None:
    if any(layer.magnitude is not None for layer in layers):
        raise UnsupportedError(
            f"{what}: DoRA normalizes the base's weight, so it is not a product of factors alone; "
            "merge it into the base, or use variant 'lora'"
        )


def _difference(missing: set[str], extra: set[str]) -> str:
    parts = []
    for word, paths in (("missing", missing), ("unexpected", extra)):
        if paths:
            shown = ", ".join(repr(path) for path in sorted(paths)[:3])
            parts.append(f"{len(paths)} {word} layer(s): {shown}{' …' if len(paths) > 3 else ''}")
    return "; ".join(parts)
