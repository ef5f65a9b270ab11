"""The last check before anything leaves a device: only what is declared, and nothing else.

It looks at the finished records, not at the code that made them. So a trainer or a later change
that adds a metric, a factor or a record is stopped here, on the client.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar, cast

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedlora.errors import FederationError
from fedlora.federation.buffers import LAYOUT_KEYS, BufferForm
from fedlora.federation.control import CONTROL, CONTROL_RECORDS, DIGEST

__all__ = ["ANSWER_KEYS", "METRICS", "check_answer", "check_reply"]

R = TypeVar("R")

# What a client may tell of a round; seconds: how long it took its process to answer.
METRICS = frozenset({"loss", "num-examples", "seconds", "steps"})
ANSWER_KEYS = frozenset({"client_id", "num_examples", "rank"})  # what it may tell of itself
_METRICS_UNCOUNTED = METRICS - {"num-examples"}
_ANSWER_KEYS_UNCOUNTED = ANSWER_KEYS - {"num_examples"}
_REPLY_RECORDS = frozenset({"factors", "layout", "metrics"})
_REPLY_RECORDS_CONTROLLED = _REPLY_RECORDS | CONTROL_RECORDS
_ANSWER_RECORDS = frozenset({"client"})
_ARRAYS = frozenset({"factors"})
_DIGEST = frozenset({"digest"})


def check_answer(content: RecordDict, *, share_num_examples: bool) -> None:
    """Raise `FederationError` unless `content` is an answer to a query and nothing more."""
    _refuse_others("the reply", content.keys(), _ANSWER_RECORDS)
    client = _record(content, "client", ConfigRecord)
    allowed = ANSWER_KEYS if share_num_examples else _ANSWER_KEYS_UNCOUNTED
    _refuse_others("record client", client.keys(), allowed)


def check_reply(
    content: RecordDict, form: BufferForm, *, share_num_examples: bool, controlled: bool = False
) -> None:
    """Raise `FederationError` unless `content` is a round's reply and nothing more.

    `form` is of the factors that the method shares in this round. controlled: whether one row of
    the same size, the change of a control variate, is asked for beside them.
    """
    records = _REPLY_RECORDS_CONTROLLED if controlled else _REPLY_RECORDS
    _refuse_others("the reply", content.keys(), records)
    factors = _record(content, "factors", ArrayRecord)
    layout = _record(content, "layout", ConfigRecord)
    metrics = _record(content, "metrics", MetricRecord)
    _refuse_others("record factors", factors.keys(), _ARRAYS)
    _refuse_others("record layout", layout.keys(), LAYOUT_KEYS)
    texts = cast(list[str], layout["segments"])
    if texts != list(form.texts):  # a list that is the form's own is nothing but what is allowed
        _refuse_others("the layout", texts, frozenset(form.texts))
    _require_size("factors", factors, form)
    if controlled:
        control = _record(content, CONTROL, ArrayRecord)
        _refuse_others("record control", control.keys(), _ARRAYS)
        _require_size(CONTROL, control, form)
        _refuse_others(f"record {DIGEST}", _record(content, DIGEST, ConfigRecord).keys(), _DIGEST)
    allowed = METRICS if share_num_examples else _METRICS_UNCOUNTED
    _refuse_others("the metrics", metrics.keys(), allowed)
    for name, value in metrics.items():
        if type(value) not in (int, float):
            raise FederationError(f"refused to send metric {name!r}: it is not one number")


def _require_size(name: str, record: ArrayRecord, form: BufferForm) -> None:
    array = record["factors"]
    if array.shape != (form.size,) or len(array.data) != len(form.header) + 4 * form.size:
        raise FederationError(f"refused to send {name}: their number is not that of the layout")


def _record(content: RecordDict, name: str, kind: type[R]) -> R:
    record = content.get(name)
    if not isinstance(record, kind):
        raise FederationError(f"refused to send: record {name!r} is missing or of another kind")
    return record


def _refuse_others(where: str, found: Collection[str], allowed: frozenset[str]) -> None:
    if allowed.issuperset(found):
        return
    others = sorted(set(found) - allowed)
    raise FederationError(
        f"refused to send {others[0]!r} in {where}: only {', '.join(sorted(allowed)[:6])} "
        "may leave this client"
    )
