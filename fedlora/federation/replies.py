"""A client's answer to a training message: made from one flat row, and read back with every check.

Nearly everything of a reply is known before it comes: its layout, its size, its base and its round.
A `ReplyForm` is prepared once from what was sent down. The client copies from it, the server
compares with it in one step, and looks closer only where something differs, to say what.

    "factors"  one array "factors"
    "layout"   segments, kinds, scalings, base, round, digest
    "metrics"  loss, steps, num-examples, seconds (may be left out)

With control variates, "control" and "control-digest" beside these (`fedlora.federation.control`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedlora.adapter import Adapter, Array
from fedlora.errors import FederationError, FedloraError, NonFiniteError
from fedlora.federation.buffers import (
    BufferForm,
    describe,
    read_array,
    read_layout,
    require_segments,
)
from fedlora.federation.control import LARGEST, put_control, read_control, require_no_control
from fedlora.flat import RowForm, Segment, pack
from fedlora.training import Factor

__all__ = [
    "LARGEST",
    "Reply",
    "ReplyForm",
    "decode_reply",
    "encode_reply",
    "encode_reply_row",
    "reply_bytes",
    "require_answerable",
]

LARGEST_LOSS = 1e30  # its sum over clients by weight stays finite


@dataclass(frozen=True, slots=True, eq=False)
class ReplyForm:
    """What all replies to one broadcast have in common."""

    rows: RowForm  # the uploaded factors; the others are those that were sent down
    buffer: BufferForm
    round: int
    layout: ConfigRecord  # of every reply, its digest left out
    _told: dict[str, Any]  # the same as plain values
    _types: list[type]  # of the scalings: 1 == 1.0 == True
    _bytes: int  # of the layout, without its digest's text
    controlled: bool = False  # whether a control variate's change comes beside the factors

    @classmethod
    def of(
        cls, sent: Adapter, uploaded: frozenset[Factor], round: int, *, controlled: bool = False
    ) -> ReplyForm:
        """Prepare the replies with factors `uploaded` to the trainable adapter `sent`."""
        rows = RowForm.of(sent, uploaded)
        buffer = BufferForm.of(rows.segments)
        layout = describe(sent, buffer, round)
        told: dict[str, Any] = dict(layout.items())
        texts = (*told, "digest", *told["segments"], *told["kinds"], told["base"])
        size = sum(map(len, texts)) + 8 * (len(sent) + 1)  # a float a layer, and the round
        types: list[type] = [float] * len(sent)
        return cls(rows, buffer, round, layout, told, types, size, controlled)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The factors in a reply's row, in order."""
        return self.rows.segments

    @property
    def sent(self) -> Adapter:
        """The trainable adapter that went down."""
        return self.rows.like

    def describes(self, layout: object) -> bool:
        """Whether a record is exactly what a right reply says of its factors, whatever digest."""
        if not isinstance(layout, ConfigRecord):
            return False
        found: dict[str, Any] = dict(layout.items())
        digest = found.pop("digest", None)
        return (
            type(digest) is str
            and found == self._told
            and type(found["round"]) is int
            and list(map(type, found["scalings"])) == self._types
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """One client's round as it arrived, checked."""

    adapter: Adapter  # the uploaded factors; the others are those that were sent down
    num_examples: int | None
    loss: float  # NaN when there was no step
    steps: int
    control: Array | None = None  # the change of its control variate, as a row of the factors
    seconds: float | None = None  # how long the client took, as it says itself


def encode_reply_row(
    form: ReplyForm,
    row: Array,
    metrics: Mapping[str, int | float],
    control: Array | None = None,
) -> RecordDict:
    """Return the reply with the uploaded factors in `row`, ``(size,)`` float32, which is copied.

    control: a row of the same layout, the change of the client's control variate.

    Raises `ShapeMismatchError` for another row. It does not look at the numbers: the server does.
    """
    array = form.buffer.array(row)
    factors = ArrayRecord()
    factors["factors"] = array
    layout = form.layout.copy()
    layout["digest"] = form.buffer.digest(array.data)
    content = RecordDict(
        {"factors": factors, "layout": layout, "metrics": MetricRecord(dict(metrics))}
    )
    if control is not None:
        put_control(content, form.buffer, control)
    return content


def encode_reply(
    adapter: Adapter, uploaded: frozenset[Factor], metrics: Mapping[str, int | float], round: int
) -> RecordDict:
    """Return the reply of one client alone; of many, `encode_reply_row` is the cheaper way."""
    form = ReplyForm.of(adapter, uploaded, round)
    return encode_reply_row(form, pack(adapter, form.segments), metrics)


def decode_reply(content: RecordDict, form: ReplyForm, who: str) -> Reply:
    """Read and check a client's answer. The adapter's factors are views of the message's bytes.

    Raises a `FedloraError` that opens with `who`: another layout, base, round, digest or size, a
    number that is not finite or over `LARGEST`, a missing or senseless metric.
    """
    layout: Any = content.get("layout")
    usual = form.describes(layout)
    if not usual:
        layout = read_layout(content, "layout", who)
        require_segments(layout, form.buffer, who)
    data = read_array(content, "factors", layout, form.buffer, who)
    if not usual:
        _require_same(layout, form, who)
    try:
        adapter = form.rows.read(data, len(form.buffer.header), largest=LARGEST)
    except FedloraError as error:
        raise type(error)(f"{who}: {error}") from None
    control = None
    if form.controlled:
        control = read_control(content, form.rows, form.buffer, who)
    else:
        require_no_control(content, who)
    count, loss, steps, seconds = _metrics(content, who)
    return Reply(adapter, count, loss, steps, control, seconds)


def require_answerable(adapter: Adapter) -> None:
    """Raise `NonFiniteError` when a client that trained nothing could not send this one back.

    A mean of replies stays below `LARGEST`. What is decomposed and factored anew need not: the
    largest number of ``U S`` is over those of the factors that it was made of. Were such an adapter
    sent, every honest reply would be refused from then on.
    """
    for path, layer in adapter.layers.items():
        for factor, array in (("A", layer.A), ("B", layer.B)):
            most = max(float(array.max(initial=0.0)), -float(array.min(initial=0.0)))
            if most > LARGEST:
                raise NonFiniteError(
                    f"layer {path!r}, {factor}: expected numbers up to {LARGEST:g}, found {most:g}"
                )


def reply_bytes(content: RecordDict, form: ReplyForm) -> int:
    """Return the bytes of a reply's records, as `content_bytes` does, but faster."""
    total = 0
    for name, record in content.items():
        if name == "layout" and form.describes(record):
            total += form._bytes + len(cast(str, record["digest"]))
        else:
            total += record.count_bytes()
    return total


def _require_same(layout: Mapping[str, Any], form: ReplyForm, who: str) -> None:
    if layout["round"] != form.round:
        raise FederationError(
            f"{who}: expected a reply to round {form.round}, found {layout['round']}"
        )
    if layout["base"] != (form.sent.base or ""):
        raise FederationError(
            f"{who}: expected an adapter for base {_short(form.sent.base)}, found "
            f"{_short(layout['base'])}"
        )
    if list(layout["scalings"]) != [layer.scaling for layer in form.sent.layers.values()]:
        raise FederationError(f"{who}: expected the server's scalings, found others")


def _metrics(content: RecordDict, who: str) -> tuple[int | None, float, int, float | None]:
    record = content.get("metrics")
    found = dict(record.items()) if isinstance(record, MetricRecord) else {}
    if "loss" not in found or "steps" not in found:
        raise FederationError(f"{who}: expected the metrics loss and steps")
    count, loss, steps = found.get("num-examples"), found["loss"], found["steps"]
    if count is not None and (type(count) is not int or not 1 <= count < 2**53):
        raise FederationError(f"{who}: expected num-examples, a whole number >= 1, found {count!r}")
    if type(steps) is not int or steps < 0:
        raise FederationError(f"{who}: expected steps, a whole number >= 0, found {steps!r}")
    if type(loss) is not float or (steps > 0 and not math.isfinite(loss)):
        raise FederationError(f"{who}: expected a finite loss, found {loss!r}")
    if abs(loss) > LARGEST_LOSS:
        raise FederationError(f"{who}: expected a loss up to {LARGEST_LOSS:g}, found {loss!r}")
    seconds = found.get("seconds")
    if seconds is not None and (type(seconds) is not float or not 0 <= seconds < math.inf):
        raise FederationError(f"{who}: expected seconds, a finite number >= 0, found {seconds!r}")
    return count, loss, steps, seconds


def _short(fingerprint: str | None) -> str:
    return fingerprint[:12] if fingerprint else "of no name"
