"""The last check before anything leaves a device: only what is declared, and nothing else.

It looks at the finished records, not at the code that made them. So a trainer or a later change
that adds a metric, a factor or a record is stopped here, on the client.
"""

from __future__ import annotations

import math
from typing import TypeVar, cast

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedlora.errors import FederationError
from fedlora.federation.layout import Segment
from fedlora.federation.records import LAYOUT_KEYS

__all__ = ["ANSWER_KEYS", "METRICS", "check_answer", "check_reply"]

R = TypeVar("R")

METRICS = frozenset({"loss", "num-examples", "steps"})  # what a client may tell of a round
ANSWER_KEYS = frozenset({"client_id", "num_examples", "rank"})  # what it may tell of itself


def check_answer(content: RecordDict, *, share_num_examples: bool) -> None:
    """Raise `FederationError` unless `content` is an answer to a query and nothing more."""
    _refuse_others("the reply", set(content), {"client"})
    client = _record(content, "client", ConfigRecord)
    allowed = ANSWER_KEYS if share_num_examples else ANSWER_KEYS - {"num_examples"}
    _refuse_others("record client", set(client), allowed)


def check_reply(
    content: RecordDict, segments: tuple[Segment, ...], *, share_num_examples: bool
) -> None:
    """Raise `FederationError` unless `content` is a round's reply and nothing more.

    `segments` are the factors that the method shares in this round.
    """
    _refuse_others("the reply", set(content), {"factors", "layout", "metrics"})
    factors = _record(content, "factors", ArrayRecord)
    layout = _record(content, "layout", ConfigRecord)
    metrics = _record(content, "metrics", MetricRecord)
    _refuse_others("record factors", set(factors), {"factors"})
    _refuse_others("record layout", set(layout), LAYOUT_KEYS)
    texts = {str(segment) for segment in segments}
    _refuse_others("the layout", set(cast(list[str], layout["segments"])), texts)
    if math.prod(factors["factors"].shape) != sum(segment.size for segment in segments):
        raise FederationError("refused to send factors: their number is not that of the layout")
    allowed = METRICS if share_num_examples else METRICS - {"num-examples"}
    _refuse_others("the metrics", set(metrics), allowed)
    for name, value in metrics.items():
        if type(value) not in (int, float):
            raise FederationError(f"refused to send metric {name!r}: it is not one number")


def _record(content: RecordDict, name: str, kind: type[R]) -> R:
    record = content.get(name)
    if not isinstance(record, kind):
        raise FederationError(f"refused to send: record {name!r} is missing or of another kind")
    return record


def _refuse_others(where: str, found: set[str], allowed: set[str] | frozenset[str]) -> None:
    others = sorted(found - allowed)
    if others:
        raise FederationError(
            f"refused to send {others[0]!r} in {where}: only {', '.join(sorted(allowed)[:6])} "
            "may leave this client"
        )
