"""The messages of a run's last stage: what a client is asked to evaluate, and what it answers.

    evaluate  down  "setup", "evaluate"               EvaluateOrder, flat scalars
                    "factors" + "layout"              what of the global adapter is trained
                    "frozen" + "frozen-layout"        the part of it that stays (if there is one)
                    "start" + "start-layout"          what a client of a smaller rank trains from
              up    "scores"                          "global.loss", "personal.accuracy", …

The answer holds means over the client's held-out examples and nothing else, neither counts nor an
adapter. It is empty from a client without held-out examples, and in a run with privacy from every
client.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedlora.adapter import Adapter
from fedlora.aggregation import Broadcast
from fedlora.errors import FederationError
from fedlora.federation.guard import ADAPTERS, KEPT_GLOBAL, MEASURES, check_scores
from fedlora.federation.records import (
    ClientSetup,
    EncodedAdapter,
    decode_broadcast,
    decode_start,
    from_record,
)
from fedlora.training import Factor, TrainConfig

__all__ = [
    "EvaluateOrder",
    "EvaluateTask",
    "Scores",
    "answer_scores",
    "decode_scores",
    "evaluate_content",
    "read_evaluate",
]

Scores = Mapping[str, Mapping[str, float]]  # by adapter, then by measure

LARGEST_SCORE = 1e305  # a perplexity is at most exp(700)
_SHARES = ("accuracy", "top1", "top3")
_WHO = "message from the server"


@dataclass(frozen=True, slots=True)
class EvaluateOrder:
    """One client's task after the rounds."""

    round: int  # rounds that made the global adapter
    seed: int
    train: TrainConfig  # of the personal adapter
    own_steps: int  # of the own adapter: those of the rounds and of `train`
    name: str  # of the experiment
    method: str
    proximal_weight: float = 0.0  # lambda of Ditto, for the personal adapter
    keep_better: bool = False  # who does worse with it on the validation part keeps the global one
    kind: Literal["personal", "mixed"] = "personal"
    kept: frozenset[Factor] = frozenset()  # factors of its own that the client goes on from
    tell: bool = True  # False with privacy: the client keeps its adapters and tells no score

    def __post_init__(self) -> None:
        for key, value in (("round", self.round), ("own_steps", self.own_steps)):
            if value < 0:
                raise FederationError(f"{key}: expected a whole number >= 0, found {value}")
        for key, text in (("name", self.name), ("method", self.method)):
            if not text or len(text) > 200 or not text.isprintable():
                raise FederationError(
                    f"{key}: expected 1 to 200 printable characters, found {text[:40]!r}"
                )


@dataclass(frozen=True, slots=True, eq=False)
class EvaluateTask:
    """An evaluation message, read."""

    setup: ClientSetup
    order: EvaluateOrder
    broadcast: Broadcast  # the global adapter, divided
    start: Adapter  # what the personal adapter begins with


def evaluate_content(
    setup: ConfigRecord,
    order: ConfigRecord,
    trainable: EncodedAdapter,
    frozen: EncodedAdapter | None = None,
    start: EncodedAdapter | None = None,
) -> RecordDict:
    """Return an evaluation message with records of its own."""
    content = RecordDict({"setup": setup.copy(), "evaluate": order.copy()})
    trainable.put_in(content, "factors", "layout")
    if frozen is not None:
        frozen.put_in(content, "frozen", "frozen-layout")
    if start is not None:
        start.put_in(content, "start", "start-layout")
    return content


def read_evaluate(content: RecordDict) -> EvaluateTask:
    """Read an evaluation message. Raises `FederationError` or an `AdapterError`."""
    found = {}
    for name in ("setup", "evaluate"):
        record = content.get(name)
        if not isinstance(record, ConfigRecord):
            raise FederationError(f"{_WHO}: expected a record {name!r}, found none")
        found[name] = record
    setup = from_record(ClientSetup, found["setup"], f"{_WHO}, setup")
    order = from_record(EvaluateOrder, found["evaluate"], f"{_WHO}, evaluate")
    broadcast = decode_broadcast(content, setup)
    start = decode_start(content, setup)
    if start is not None:
        broadcast.trainable.require_same_layout(start, f"{_WHO}, start", ranks=False)
    return EvaluateTask(setup, order, broadcast, broadcast.trainable if start is None else start)


def answer_scores(scores: Scores | None, kept_global: bool | None = None) -> RecordDict:
    """Return a client's answer; measures that are not declared stay here.

    scores: None from a client without held-out examples. kept_global: None where it was not asked.
    Raises `FederationError` for what must not leave.
    """
    told: dict[str, int | float] = {
        f"{adapter}.{measure}": float(value)
        for adapter, values in (scores or {}).items()
        for measure, value in values.items()
        if measure in MEASURES
    }
    if kept_global is not None:
        told[KEPT_GLOBAL] = int(kept_global)
    content = RecordDict({"scores": MetricRecord(dict(told))})
    check_scores(content)
    return content


def decode_scores(
    content: RecordDict, who: str, *, keep_better: bool
) -> tuple[dict[str, dict[str, float]] | None, bool | None]:
    """Read a client's answer: its scores by adapter, and whether it keeps the global one.

    Raises `FederationError`, which opens with `who`: an adapter without a loss, adapters with
    different measures, a number that no measure can be.
    """
    record = content.get("scores")
    if set(content) != {"scores"} or not isinstance(record, MetricRecord):
        raise FederationError(f"{who}: expected a record 'scores' and nothing else")
    told: dict[str, Any] = dict(record.items())
    kept = told.pop(KEPT_GLOBAL, None)
    if (kept is not None) != keep_better or (kept is not None and kept not in (0, 1)):
        asked = "0 or 1" if keep_better else "none"
        raise FederationError(f"{who}: {KEPT_GLOBAL}: expected {asked}, found {str(kept)[:20]}")
    if not told:
        return None, None if kept is None else bool(kept)
    measures = [name for name in MEASURES if f"global.{name}" in told]
    expected = {f"{adapter}.{measure}" for adapter in ADAPTERS for measure in measures}
    if "loss" not in measures or told.keys() != expected:
        raise FederationError(
            f"{who}: expected the same measures of {', '.join(ADAPTERS)}, the loss among them, "
            f"found {', '.join(sorted(told))[:80]}"
        )
    for name, value in told.items():
        most = 1.0 if name.rpartition(".")[2] in _SHARES else LARGEST_SCORE
        if type(value) is not float or not math.isfinite(value) or not 0 <= value <= most:
            raise FederationError(
                f"{who}: {name}: expected a number from 0 to {most:g}, found {str(value)[:20]}"
            )
    scores = {a: {m: float(told[f"{a}.{m}"]) for m in measures} for a in ADAPTERS}
    return scores, None if kept is None else bool(kept)
