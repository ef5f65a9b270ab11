"""How well a device's session does on examples: the sums that `fedlora.nn.tasks` adds up in torch.

The session's logits are scored a few rows at a time, so that no more than about `SCORED_LOGITS` of
them exist at once, whatever the vocabulary. NumPy only.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from fedlora.adapter import Array
from fedlora.data.examples import IGNORED, Examples, eval_batches
from fedlora.device.buckets import require_targets
from fedlora.device.manifest import Manifest
from fedlora.errors import DataError, NonFiniteError
from fedlora.metrics import means_of

__all__ = ["Scored", "classification_sums", "evaluate", "next_token_sums"]

Targets: TypeAlias = npt.NDArray[np.int64]

SCORED_LOGITS = 1 << 22  # at once: 16 MB, and as much again for their exponentials
POSITIONS = 512  # of one pass; attention grows with the square of a row


class Scored(Protocol):
    """What is evaluated: a `fedlora.device.Session`, with the adapter that it serves."""

    @property
    def manifest(self) -> Manifest:
        """What its bundle says."""

    def run(self, inputs: npt.NDArray[Any]) -> Array:
        """Return logits, (rows, time, vocabulary) or (rows, classes) float32."""


def evaluate(session: Scored, examples: Examples, who: str = "evaluate") -> dict[str, float]:
    """Return the measures of what `session` serves, by the names of `fedlora.evaluation`.

    Always ``loss`` (nats per counted target). Next-token: ``perplexity``, ``bits_per_character``,
    ``top1`` and ``top3`` (share of word starts whose next token is the likeliest, or one of the
    three likeliest). Classification: ``accuracy``. `who` opens an error's text.

    Raises `DataError` without examples or for those of another task, and `NonFiniteError` when the
    loss is not finite.
    """
    if len(examples) == 0:
        raise DataError(f"{who}: expected held-out examples to evaluate on, found none")
    about = session.manifest
    by_token = about.task == "next-token"
    if (examples.targets.ndim == 2) != by_token:
        raise DataError(
            f"{who}: expected targets {'per token' if by_token else 'per row'} for this bundle's "
            f"task {about.task}, found shape {examples.targets.shape}"
        )
    per_row = about.outputs if by_token else 1
    positions = max(1, min(POSITIONS, SCORED_LOGITS // per_row)) if examples.is_text else POSITIONS
    require_targets(examples.targets, about, f"{who}: targets")
    if (examples.targets == IGNORED).all():
        raise DataError(f"{who}: expected a target that counts, found {IGNORED} everywhere")
    sums: Counter[str] = Counter()
    for batch in eval_batches(examples, positions):
        logits = session.run(batch["inputs"])
        if by_token:
            sums.update(next_token_sums(logits, batch["targets"], batch.get("word_starts")))
        else:
            sums.update(classification_sums(logits, batch["targets"]))
    characters = None if examples.characters is None else int(examples.characters.sum())
    values = means_of(sums, characters)
    if not math.isfinite(values["loss"]):
        raise NonFiniteError(
            f"{who}: the held-out loss is {values['loss']}; lower the learning rate"
        )
    return values


def next_token_sums(
    logits: Array, targets: Targets, word_starts: npt.NDArray[np.bool_] | None = None
) -> dict[str, float]:
    """Sums over counted targets: nats, tokens; at word starts, right first and top three guesses.

    logits: (rows, time, vocabulary); targets: (rows, time), -100 where not counted. As
    `fedlora.nn.tasks.next_token_score`, but that a token which shares its logit with others counts
    as before them.
    """
    sums = dict.fromkeys(("nats", "tokens", "top1", "top3", "word_starts"), 0.0)
    if word_starts is None:
        word_starts = np.zeros(targets.shape, bool)
    for row, wanted, starts in zip(logits, targets, word_starts, strict=True):
        counted = wanted != IGNORED
        found, wanted, starts = row[counted], wanted[counted], starts[counted]
        sums["nats"] += float(_nats(found, wanted).sum())
        sums["tokens"] += len(wanted)
        before = _before(found[starts], wanted[starts])
        sums["top1"] += int((before == 0).sum())
        sums["top3"] += int((before < 3).sum())
        sums["word_starts"] += int(starts.sum())
    return sums


def classification_sums(logits: Array, targets: Targets) -> dict[str, float]:
    """Sums of nats, examples and examples whose most probable class is the right one.

    logits: (rows, classes); targets: (rows,), -100 where not counted. As
    `fedlora.nn.tasks.classification_score`.
    """
    counted = targets != IGNORED
    logits, targets = logits[counted], targets[counted]
    return {
        "nats": float(_nats(logits, targets).sum()),
        "examples": float(len(targets)),
        "correct": float((logits.argmax(-1) == targets).sum()),
    }


def _nats(logits: Array, targets: Targets) -> npt.NDArray[np.float64]:
    """(n,) float64 of logits (n, classes) float32: ``log Σ exp(z - top) - (z[target] - top)``."""
    if not len(targets):
        return np.zeros(0)
    shifted = logits - logits.max(-1, keepdims=True)
    right = np.take_along_axis(shifted, targets[:, None], -1)[:, 0].astype(np.float64)
    np.exp(shifted, out=shifted)
    total: npt.NDArray[np.float64] = np.log(shifted.sum(-1, dtype=np.float64)) - right
    return total


def _before(logits: Array, targets: Targets) -> npt.NDArray[np.int64]:
    """(n,) how many logits are larger than the target's."""
    right = np.take_along_axis(logits, targets[:, None], -1)
    return np.asarray((logits > right).sum(-1), np.int64)
