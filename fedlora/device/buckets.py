"""Batches of any size through train graphs of fixed sizes. NumPy only.

A train graph takes so many rows of so many tokens. A batch is cut into pieces, each put into a
graph that holds it and filled up with what is not counted; their losses and gradients, weighted by
the share of the batch's counted targets that each holds, add up to those of the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedlora.data.examples import IGNORED
from fedlora.device.manifest import GraphInfo, Manifest
from fedlora.errors import ConfigError, DataError

__all__ = ["Batch", "Piece", "pieces_of", "require_targets"]

Batch: TypeAlias = Mapping[str, npt.NDArray[Any]]

# What a pass costs before its first position, in positions: reading all weights once. A matrix
# product of 64 rows takes little longer than one of a few.
_PASS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A part of a batch in the shape of one train graph.

    inputs: (rows, positions) int64 or (rows, *shape) float32; targets: (rows, positions) or (rows,)
    int64. weight: the share of the batch's counted targets, in (0, 1].
    """

    graph: str  # its file name
    inputs: npt.NDArray[Any]
    targets: npt.NDArray[np.int64]
    weight: float


def pieces_of(batch: Batch, manifest: Manifest) -> list[Piece]:
    """Cut a batch for the train graphs of a bundle; none when nothing in it is counted.

    The pieces have as few positions in all, filled ones included, as the graphs allow. Rows without
    a counted target are left out.

    Raises `ConfigError` when no graph holds a row, and `DataError` for a batch that is not of the
    base's kind.
    """
    inputs, targets = _checked(batch, manifest)
    counted = (targets != IGNORED).reshape(len(targets), -1).sum(1)
    needed = _lengths(inputs, targets, manifest)
    used = np.flatnonzero(counted)
    # The shortest first, so that a piece's rows are of similar lengths; equal ones in their order.
    order = used[np.argsort(needed[used], kind="stable")]
    total = int(counted.sum())
    graphs = dict(manifest.buckets())
    pieces = []
    start = 0
    for name, count in _plan([int(n) for n in needed[order]], list(graphs.items()), manifest):
        rows = order[start : start + count]
        start += count
        weight = int(counted[rows].sum()) / total
        pieces.append(_piece(name, graphs[name], inputs[rows], targets[rows], weight))
    return pieces


def require_targets(targets: npt.NDArray[Any], manifest: Manifest, where: str) -> None:
    """Raise `DataError` for a target that is no token or class of the bundle, nor -100.

    Numbers are looked up by these: a negative one would count from the end.
    """
    wrong = targets[(targets != IGNORED) & ((targets < 0) | (targets >= manifest.outputs))]
    if wrong.size:
        raise DataError(
            f"{where}: expected 0 to {manifest.outputs - 1}, or {IGNORED} where not counted, "
            f"found {wrong[0]}"
        )


def _plan(
    lengths: Sequence[int], graphs: Sequence[tuple[str, GraphInfo]], manifest: Manifest
) -> list[tuple[str, int]]:
    """Divide rows, sorted by length, among graphs: (name, rows of it), in order, at least cost.

    The cheapest way to do the first n rows ends with one graph that does the last of them and as
    many before as it has rows.
    """
    if lengths:
        _require_room(lengths[-1], graphs, manifest)
    cheapest: list[tuple[int, str, int]] = [(0, "", 0)]
    for n, length in enumerate(lengths, start=1):
        found = []
        for name, graph in graphs:
            rows, width = graph.rows or 0, graph.positions or 1
            if graph.positions is None or length <= width:
                count = min(n, rows)
                found.append((cheapest[n - count][0] + rows * width + _PASS, name, count))
        cheapest.append(min(found))
    plan = []
    left = len(lengths)
    while left:
        _, name, count = cheapest[left]
        plan.append((name, count))
        left -= count
    return plan[::-1]


def _require_room(longest: int, graphs: Sequence[tuple[str, GraphInfo]], at: Manifest) -> None:
    if not graphs:
        form = "16" if at.input_shape else "8x32"
        raise ConfigError(
            "this bundle has no train graph and can only be used for inference; export it again "
            f"with --train {form}"
        )
    widths = [graph.positions for _, graph in graphs]
    if all(width is not None and width < longest for width in widths):
        most = max(width for width in widths if width is not None)
        wide = -(-longest // 16) * 16
        raise ConfigError(
            f"a row has {longest} tokens, and this bundle's train graphs take rows of up to "
            f"{most}; export it again with a train graph of longer rows, as --train 2x{wide}, or "
            "cut the texts (max_length)"
        )


def _piece(
    name: str,
    graph: GraphInfo,
    inputs: npt.NDArray[Any],
    targets: npt.NDArray[np.int64],
    weight: float,
) -> Piece:
    rows, width = graph.rows or 0, graph.positions
    # Rows to fill up are copies of the first: zeros might become NaN in a model that divides by a
    # norm or by the number of tokens that are not padding, and NaN times no weight is NaN.
    take = np.arange(rows)
    take[len(inputs) :] = 0
    kept = inputs.shape[1:] if width is None else (min(width, inputs.shape[1]),)
    shape = (rows, *kept) if width is None else (rows, width)
    filled = np.zeros(shape, inputs.dtype)
    wanted = np.full((rows, width or 1) if targets.ndim == 2 else (rows,), IGNORED, np.int64)
    if width is None:
        filled[:] = inputs[take]
    else:
        filled[:, : kept[0]] = inputs[take, : kept[0]]
    if targets.ndim == 2:
        wanted[: len(targets), : kept[0]] = targets[:, : kept[0]]
    else:
        wanted[: len(targets)] = targets
    return Piece(name, filled, wanted, weight)


def _lengths(
    inputs: npt.NDArray[Any], targets: npt.NDArray[np.int64], manifest: Manifest
) -> npt.NDArray[np.int64]:
    """(rows,) tokens that each row needs; 1 for inputs of a fixed shape.

    Up to the last counted target, behind which a causal model has nothing to say; for one target a
    row up to the last id that is not 0.
    """
    if manifest.input_shape:
        return np.ones(len(inputs), np.int64)
    used = targets != IGNORED if targets.ndim == 2 else inputs != 0
    last = used.shape[1] - np.argmax(used[:, ::-1], axis=1)
    return np.where(used.any(axis=1), last, 1).astype(np.int64)


def _checked(batch: Batch, manifest: Manifest) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    inputs, targets = np.asarray(batch["inputs"]), np.asarray(batch["targets"])
    ids = manifest.input_dtype == "int64"
    shape = manifest.input_shape
    fits = inputs.shape[1:] == shape if shape else inputs.ndim == 2 and inputs.shape[1] > 0
    if not fits or inputs.dtype.kind != ("i" if ids else "f"):
        expected = f"(rows, {', '.join(map(str, shape))})" if shape else "(rows, tokens)"
        raise DataError(
            f"a batch's inputs: expected {expected} {manifest.input_dtype}, found {inputs.shape} "
            f"{inputs.dtype}"
        )
    per_token = manifest.task == "next-token"
    expected_shape = inputs.shape[:2] if per_token else inputs.shape[:1]
    if targets.shape != expected_shape or targets.dtype.kind != "i":
        raise DataError(
            f"a batch's targets: expected {expected_shape} int64, found {targets.shape} "
            f"{targets.dtype}"
        )
    require_targets(targets, manifest, "a batch's targets")
    if ids and inputs.size and inputs.min() < 0:
        raise DataError(f"a batch's inputs: expected token ids >= 0, found {inputs.min()}")
    return inputs.astype(manifest.input_dtype, copy=False), targets.astype(np.int64, copy=False)
