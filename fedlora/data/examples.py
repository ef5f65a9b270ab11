"""A client's examples as arrays, and the batches drawn from them. NumPy only.

`draw_batches` makes every engine see the same batches: its order is keyed by the run's seed, the
client and the round, never by who calls it or when.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from fedlora.errors import ConfigError, DataError
from fedlora.randomness import rng
from fedlora.training import TrainConfig

__all__ = ["IGNORED", "Batch", "Examples", "collate", "draw_batches", "eval_batches"]

Batch: TypeAlias = dict[str, npt.NDArray[Any]]
IGNORED = -100  # a target that is not counted


@dataclass(frozen=True, eq=False)
class Examples:
    """Some examples of one client. Arrays are read-only; a writable argument is copied.

    inputs: (n, T) int64 token ids, right-padded with 0; or (n, ...) float32 features.
    targets: (n, T) int64, -100 where not counted; or (n,) int64 classes.
    word_starts: (n, T) bool, the targets that begin a word; language only.
    characters: (n,) int64, characters that the counted targets spell; language only.

    Raises `DataError` when shapes or dtypes do not go together, or a feature is not finite.
    """

    inputs: npt.NDArray[Any]
    targets: npt.NDArray[np.int64]
    word_starts: npt.NDArray[np.bool_] | None = None
    characters: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        inputs = np.asarray(self.inputs)
        if inputs.dtype.kind not in "iuf":
            raise DataError(f"inputs: expected token ids or features, found dtype {inputs.dtype}")
        dtype: type = np.float32 if inputs.dtype.kind == "f" else np.int64
        object.__setattr__(self, "inputs", _frozen(inputs, dtype))
        object.__setattr__(self, "targets", _frozen(np.asarray(self.targets), np.int64))
        for name, kind in (("word_starts", np.bool_), ("characters", np.int64)):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _frozen(np.asarray(value), kind))
        self._check()

    def _check(self) -> None:
        if self.inputs.ndim < 2 or self.targets.ndim not in (1, 2):
            raise DataError(
                "expected inputs (n, ...) of 2 dimensions or more and targets (n,) or (n, T), "
                f"found {self.inputs.shape} and {self.targets.shape}"
            )
        parts = (self.targets, self.word_starts, self.characters)
        if any(part is not None and len(part) != len(self.inputs) for part in parts):
            lengths = [len(part) for part in parts if part is not None]
            raise DataError(f"expected {len(self.inputs)} targets, as inputs has, found {lengths}")
        if self.targets.ndim == 2 and self.targets.shape != self.inputs.shape[:2]:
            raise DataError(
                f"targets: expected {self.inputs.shape[:2]}, as inputs has, "
                f"found {self.targets.shape}"
            )
        if self.word_starts is not None and self.word_starts.shape != self.targets.shape:
            raise DataError(
                f"word_starts: expected {self.targets.shape}, found {self.word_starts.shape}"
            )
        if self.inputs.dtype == np.float32 and not np.isfinite(self.inputs).all():
            row = int(np.argwhere(~np.isfinite(self.inputs))[0][0])
            raise DataError(f"inputs: expected finite features, found NaN or infinity in row {row}")

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def is_text(self) -> bool:
        """Whether the inputs are token ids."""
        return self.inputs.dtype == np.int64 and self.inputs.ndim == 2

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(n,) positions that a row needs; the width of all rows for features.

        For token ids: up to the last counted target, or without targets per position up to the last
        id that is not 0, at least 1.
        """
        if not self.is_text:
            series = self.inputs.ndim > 2  # the last axis is time, or a row of an image
            return np.full(len(self), self.inputs.shape[-1] if series else 1, np.int64)
        used = self.targets != IGNORED if self.targets.ndim == 2 else self.inputs != 0
        last = used.shape[1] - np.argmax(used[:, ::-1], axis=1)
        return np.where(used.any(axis=1), last, 1).astype(np.int64)

    @cached_property
    def mean_length(self) -> float:
        """Mean of `lengths`; 0 without examples."""
        return float(self.lengths.mean()) if len(self) else 0.0

    def take(self, indices: npt.ArrayLike) -> Examples:
        """Return the examples at `indices`, in that order."""
        rows = np.asarray(indices, np.int64)
        return Examples(
            self.inputs[rows],
            self.targets[rows],
            None if self.word_starts is None else self.word_starts[rows],
            None if self.characters is None else self.characters[rows],
        )


def collate(examples: Examples, indices: npt.ArrayLike) -> Batch:
    """Return the batch of the examples at `indices`; text is cut to the longest row among them.

    Keys: "inputs", "targets" and, where the examples have them, "word_starts".
    """
    rows = np.asarray(indices, np.int64)
    batch: Batch = {"inputs": examples.inputs[rows], "targets": examples.targets[rows]}
    if examples.word_starts is not None:
        batch["word_starts"] = examples.word_starts[rows]
    if examples.is_text and len(rows):
        width = int(examples.lengths[rows].max())
        batch = {k: v[:, :width] if v.ndim == 2 else v for k, v in batch.items()}
    return {name: np.ascontiguousarray(values) for name, values in batch.items()}


def draw_batches(
    examples: Examples, config: TrainConfig, seed: int, client_id: str, round: int | str
) -> Iterator[Batch]:
    """Yield the ``config.steps_for(len(examples))`` batches of one client in one round.

    With `local_epochs` each pass is a new order, cut into batches of which the last may be smaller:
    every example comes once a pass. With `local_steps` the passes follow one another without a seam
    and every batch has ``min(batch_size, n)`` rows, so that engines can rely on one shape.

    >>> examples = Examples(np.arange(5.0)[:, None], np.arange(5))
    >>> config = TrainConfig(local_steps=2, batch_size=3)
    >>> [batch["targets"].tolist() for batch in draw_batches(examples, config, 0, "alice", 1)]
    [[0, 3, 1], [2, 4, 2]]
    """
    if len(examples) == 0:
        return
    generator = rng(seed, "batches", client_id, round)
    if config.local_steps is None:
        for _ in range(cast(int, config.local_epochs)):
            order = generator.permutation(len(examples))
            for start in range(0, len(order), config.batch_size):
                yield collate(examples, order[start : start + config.batch_size])
        return
    rows = min(config.batch_size, len(examples))
    order = np.empty(0, np.int64)
    for _ in range(config.local_steps):
        if len(order) < rows:
            order = np.concatenate([order, generator.permutation(len(examples))])
        yield collate(examples, order[:rows])
        order = order[rows:]


def eval_batches(examples: Examples, max_tokens: int = 4096) -> Iterator[Batch]:
    """Yield batches that hold every example once, of at most `max_tokens` positions each.

    Rows are sorted by length, shortest first and otherwise in their order, which bounds padding; a
    row longer than `max_tokens` is a batch of its own. Sums over batches do not depend on the cut.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens: expected a whole number >= 1, found {max_tokens!r}")
    order = np.argsort(examples.lengths, kind="stable")
    start = 0
    for stop in range(1, len(order) + 1):
        # Sorted, so the next row is the widest: its length times the rows is the padded size.
        is_last = stop == len(order)
        if is_last or (stop + 1 - start) * int(examples.lengths[order[stop]]) > max_tokens:
            yield collate(examples, order[start:stop])
            start = stop


def _frozen(array: npt.NDArray[Any], dtype: type) -> npt.NDArray[Any]:
    if array.dtype == dtype and not array.flags.writeable and array.base is None:
        return array
    frozen: npt.NDArray[Any] = np.array(array, dtype=dtype, order="C")
    frozen.flags.writeable = False
    return frozen
