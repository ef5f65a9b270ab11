"""The last check before anything leaves a device: only what is declared, and nothing else.

It looks at the finished records, not at the code that made them. So a trainer or a later change
that adds a metric, a factor or a record is stopped here, on the client.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar, cast

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedlora.errors import FederationError
from fedlora.federation.buffers import BufferForm
from fedlora.federation.control import CONTROL, CONTROL_RECORDS, DIGEST
from fedlora.federation.limits import REASONS, read_declined

__all__ = [
    "ADAPTERS",
    "ANSWER_KEYS",
    "KEPT_GLOBAL",
    "MEASURES",
    "METRICS",
    "SCORES",
    "check_advertised",
    "check_answer",
    "check_declined",
    "check_masked",
    "check_parts",
    "check_reply",
    "check_scores",
]

R = TypeVar("R")

# What a client may tell of a round; seconds: how long it took its process to answer.
METRICS = frozenset({"loss", "num-examples", "seconds", "steps"})
# What it may tell of itself.
ANSWER_KEYS = frozenset({"client_id", "codecs", "num_examples", "rank"})
# What a client may tell of its adapters in the evaluation at the end of a run: means over its
# held-out examples.
ADAPTERS = ("base", "own", "global", "personal")
MEASURES = ("loss", "accuracy", "perplexity", "bits_per_character", "top1", "top3")
SCORES = frozenset(f"{adapter}.{measure}" for adapter in ADAPTERS for measure in MEASURES)
KEPT_GLOBAL = "kept-global"  # whether it serves the global adapter, which did better in validation
_METRICS_UNCOUNTED = METRICS - {"num-examples"}
_ANSWER_KEYS_UNCOUNTED = ANSWER_KEYS - {"num_examples"}
_REPLY_RECORDS = frozenset({"factors", "layout", "metrics"})
_REPLY_RECORDS_CONTROLLED = _REPLY_RECORDS | CONTROL_RECORDS
_ANSWER_RECORDS = frozenset({"client"})
_ARRAYS = frozenset({"factors"})
_DIGEST = frozenset({"digest"})


def check_answer(content: RecordDict, *, share_num_examples: bool, remembers: bool = False) -> None:
    """Raise `FederationError` unless `content` is an answer to a query and nothing more.

    remembers: whether it was asked whether this client keeps its own rows over restarts.
    """
    _refuse_others("the reply", content.keys(), _ANSWER_RECORDS)
    client = _record(content, "client", ConfigRecord)
    allowed = ANSWER_KEYS if share_num_examples else _ANSWER_KEYS_UNCOUNTED
    if remembers:
        allowed |= {"remembers"}
    _refuse_others("record client", client.keys(), allowed)


def check_reply(
    content: RecordDict,
    form: BufferForm,
    *,
    share_num_examples: bool,
    control: BufferForm | None = None,
    share_metrics: bool = True,
) -> None:
    """Raise `FederationError` unless `content` is a round's reply and nothing more.

    form: of the factors that the method shares in this round, as they travel. control: of the
    change of a control variate, where that is asked for beside them. share_metrics: whether metrics
    may leave; with privacy not one does.
    """
    records = _REPLY_RECORDS if control is None else _REPLY_RECORDS_CONTROLLED
    if not share_metrics:
        records -= {"metrics"}
    _refuse_others("the reply", content.keys(), records)
    factors = _record(content, "factors", ArrayRecord)
    layout = _record(content, "layout", ConfigRecord)
    _refuse_others("record factors", factors.keys(), _ARRAYS)
    _refuse_others("record layout", layout.keys(), form.keys)
    texts = cast(list[str], layout["segments"])
    if texts != list(form.texts):  # a list that is the form's own is nothing but what is allowed
        _refuse_others("the layout", texts, frozenset(form.texts))
    _require_size("factors", factors, form)
    if control is not None:
        change = _record(content, CONTROL, ArrayRecord)
        _refuse_others("record control", change.keys(), _ARRAYS)
        _require_size(CONTROL, change, control)
        _refuse_others(f"record {DIGEST}", _record(content, DIGEST, ConfigRecord).keys(), _DIGEST)
    if not share_metrics:
        return
    metrics = _record(content, "metrics", MetricRecord)
    allowed = METRICS if share_num_examples else _METRICS_UNCOUNTED
    _refuse_others("the metrics", metrics.keys(), allowed)
    for name, value in metrics.items():
        if type(value) not in (int, float):
            raise FederationError(f"refused to send metric {name!r}: it is not one number")


def check_scores(content: RecordDict) -> None:
    """Raise `FederationError` unless `content` is an evaluation's reply and nothing more."""
    _refuse_others("the reply", content.keys(), frozenset({"scores"}))
    scores = _record(content, "scores", MetricRecord)
    _refuse_others("the scores", scores.keys(), SCORES | {KEPT_GLOBAL})
    for name, value in scores.items():
        if type(value) not in (int, float):
            raise FederationError(f"refused to send score {name!r}: it is not one number")


def check_declined(content: RecordDict) -> None:
    """Raise `FederationError` unless `content` declines by one of the fixed words, and no more."""
    if read_declined(content) is None:
        raise FederationError(
            f"refused to send: a device that declines says one of {', '.join(REASONS)} and nothing "
            "else"
        )


def check_advertised(content: RecordDict) -> None:
    """Raise `FederationError` unless `content` is a client's advertisement and nothing more."""
    _refuse_others("the reply", content.keys(), frozenset({"advertisement"}))
    record = _record(content, "advertisement", ConfigRecord)
    _refuse_others("the advertisement", record.keys(), frozenset({"bytes", "signer"}))
    _require_bytes("advertisement", record)


def check_parts(content: RecordDict, name: str, places: Collection[int]) -> None:
    """Raise `FederationError` unless `content` is bytes by place in one record, and no more.

    places: those that it may name; of others' secrets a client has nothing to tell.
    """
    _refuse_others("the reply", content.keys(), frozenset({name}))
    record = _record(content, name, ConfigRecord)
    _refuse_others(f"the {name}", record.keys(), frozenset(map(str, places)))
    _require_bytes(name, record)


def check_masked(content: RecordDict, length: int, bits: int) -> None:
    """Raise `FederationError` unless `content` is a masked row of the round and nothing more."""
    _refuse_others("the reply", content.keys(), frozenset({"masked", "masked-digest"}))
    masked = _record(content, "masked", ArrayRecord)
    digest = _record(content, "masked-digest", ConfigRecord)
    _refuse_others("record masked", masked.keys(), frozenset({"row"}))
    _refuse_others("record masked-digest", digest.keys(), _DIGEST)
    row = masked.get("row")
    if row is None or row.shape != (length,) or row.dtype != f"uint{bits}":
        raise FederationError("refused to send masked: it is not of the round's size and type")


def _require_bytes(name: str, record: ConfigRecord) -> None:
    if not all(type(value) is bytes for value in record.values()):
        raise FederationError(f"refused to send {name}: it is not bytes alone")


def _require_size(name: str, record: ArrayRecord, form: BufferForm) -> None:
    array = record["factors"]
    if array.shape != (form.length,) or len(array.data) != form.num_bytes:
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
